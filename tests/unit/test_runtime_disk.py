"""The disk under a Client: damage, kills while writing, other owners, other layouts."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvstrata.core.errors import ConfigError, LayoutError
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.slab import Slab

LAYOUT = BlockLayout((Dimension("axis0", 3), Dimension("axis1", 5)), "float32", 4, "array")
SLAB_BYTES = 1 << 20

WRITER = """
import sys
import numpy as np
from kvstrata import Client
client = Client(block_shape=(3, 5), dtype=np.float32, block_tokens=4, tiers=sys.argv[1])
print(client.stats()["pid"], flush=True)
for seed in range(10**6):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50_000, 32).tolist()
    client.put(tokens, rng.random((8, 3, 5), dtype=np.float32))
    print(seed, client.stats()["node"]["counters"]["written_blocks"], flush=True)
"""


def tiers(folder: Path) -> str:
    return f"host:128KiB,disk:{folder}:{SLAB_BYTES}"


def flip_payload(folder: Path, payload: bytes) -> None:
    """Flip one bit of the stored block that is `payload`."""
    path = folder / "blocks.slab"
    data = path.read_bytes()
    assert data.count(payload) == 1
    at = data.index(payload) + len(payload) // 2
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([data[at] ^ 1]))


@pytest.mark.parametrize("bad", [0, 3, 5])
def test_a_flipped_bit_is_never_served(connect, make_blocks, tmp_path, bad) -> None:
    client = connect(tiers=tiers(tmp_path))
    tokens, blocks = make_blocks(1, 6)
    client.put(tokens, blocks)
    client.wait_idle()
    client.clear(["host"])
    flip_payload(tmp_path, blocks[bad].tobytes())
    assert client.get(tokens).tobytes() == blocks[:bad].tobytes()
    assert client.stats()["node"]["counters"]["corrupt_blocks"] == 1
    assert client.put(tokens, blocks) >= 1
    assert client.get(tokens).tobytes() == blocks.tobytes()
    client.wait_idle()
    client.clear(["host"])
    assert client.get(tokens).tobytes() == blocks.tobytes(), "the disk has a good copy again"
    assert client.stats()["node"]["counters"]["corrupt_blocks"] == 1


def test_a_bit_flipped_between_two_lives(connect, make_blocks, tmp_path) -> None:
    tokens, blocks = make_blocks(1, 6)
    client = connect(tiers=tiers(tmp_path))
    client.put(tokens, blocks)
    client.wait_idle()
    client.close()
    flip_payload(tmp_path, blocks[2].tobytes())
    again = connect(tiers=tiers(tmp_path))
    assert again.get(tokens).tobytes() == blocks[:2].tobytes()
    again.close()
    assert connect(tiers=tiers(tmp_path)).lookup(tokens) == 8, "the damaged block was withdrawn"


def test_closing_writes_out_what_waits_for_the_disk(connect, tmp_path) -> None:
    rng = np.random.default_rng(7)
    tokens, blocks = list(range(4 * 48)), rng.random((48, 1 << 18), dtype=np.float32)
    large = {"block_shape": (1 << 18,), "tiers": f"host:64MiB,disk:{tmp_path}:64MiB"}
    client = connect(**large)
    assert client.put(tokens, blocks) == 48
    client.close()  # at once: most of these 48 MiB are not on disk yet
    again = connect(**large)
    assert again.get(tokens).tobytes() == blocks.tobytes()


@pytest.mark.parametrize("writes", [1, 40, 400])
def test_killed_while_writing(connect, tmp_path, writes, run_directory, eventually) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, tiers(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with writer:
        daemon = int(writer.stdout.readline())
        last, written = -1, 0
        while written < writes:
            last, written = map(int, writer.stdout.readline().split())
        os.kill(daemon, signal.SIGKILL)
        writer.kill()
    eventually(lambda: not Path(f"/proc/{daemon}").exists())
    client = connect(tiers=tiers(tmp_path))
    assert run_directory.is_dir()
    recovered = client.stats()["node"]["counters"]["recovered_blocks"]
    found = 0
    for seed in range(last + 100):  # some puts may have gone on after the last line was read
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, 50_000, 32).tolist()
        expected = rng.random((8, 3, 5), dtype=np.float32)
        got = client.get(tokens)
        assert got.tobytes() == expected[: len(got)].tobytes(), f"{seed=}"
        found += len(got)
    assert 0 < found <= recovered
    torn = client.stats()["node"]["counters"]["corrupt_blocks"]
    assert found + torn >= min(writes, recovered) // 2, "what had been written is there"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "other", [{"block_shape": (5, 3)}, {"dtype": np.int32}, {"block_tokens": 8}]
)
def test_a_slab_of_another_layout_is_left_alone(connect, make_blocks, tmp_path, other) -> None:
    client = connect(tiers=tiers(tmp_path))
    tokens, blocks = make_blocks(1, 3)
    client.put(tokens, blocks)
    client.close()
    before = digest(tmp_path / "blocks.slab")
    with pytest.raises(ConfigError, match="blocks of another layout") as caught:
        connect(tiers=tiers(tmp_path), **other)
    assert "another directory" in caught.value.hint
    assert digest(tmp_path / "blocks.slab") == before
    assert connect(tiers=tiers(tmp_path)).get(tokens).tobytes() == blocks.tobytes()


@pytest.mark.parametrize("content", [b"", b"a letter", bytes(SLAB_BYTES)])
def test_a_file_that_is_no_slab_is_left_alone(connect, tmp_path, content) -> None:
    (tmp_path / "blocks.slab").write_bytes(content)
    with pytest.raises(ConfigError, match="is not a kvstrata slab"):
        connect(tiers=tiers(tmp_path))
    assert (tmp_path / "blocks.slab").read_bytes() == content


def test_a_damaged_superblock_is_left_alone(connect, tmp_path) -> None:
    connect(tiers=tiers(tmp_path)).close()
    path = tmp_path / "blocks.slab"
    with path.open("r+b") as file:
        file.seek(200)
        file.write(b"!")
    before = digest(path)
    with pytest.raises(LayoutError, match="is damaged"):
        Slab.open(str(tmp_path), SLAB_BYTES, LAYOUT)
    with pytest.raises(ConfigError, match="is damaged"):
        connect(tiers=tiers(tmp_path))
    assert digest(path) == before


def test_another_size_is_refused(connect, tmp_path) -> None:
    connect(tiers=tiers(tmp_path)).close()
    with pytest.raises(ConfigError, match="slots, a size of") as caught:
        connect(tiers=f"host:128KiB,disk:{tmp_path}:{SLAB_BYTES * 2}")
    assert caught.value.message.startswith("tiers.disk: ")


def test_two_daemons_on_one_directory(serve, connect, make_blocks, tmp_path) -> None:
    one, two = serve(tiers(tmp_path), "1.sock"), serve(tiers(tmp_path), "2.sock")
    client = connect(address=one.address)
    tokens, blocks = make_blocks(1, 3)
    client.put(tokens, blocks)
    for where in ({"address": two.address}, {"tiers": tiers(tmp_path)}):
        with pytest.raises(ConfigError, match="in use by another kvstrata daemon") as caught:
            connect(**where)
        assert caught.value.hint
    assert client.get(tokens).tobytes() == blocks.tobytes()
    one.kill()
    late = connect(address=two.address)
    assert late.put(*make_blocks(2, 1)) == 1, "the other may take over once the first is gone"


def test_a_second_daemon_at_one_address(run_directory, serve, connect, make_blocks) -> None:
    daemon = serve()
    client = connect(address=daemon.address)
    command = [sys.executable, "-m", "kvstrata.apps.cli.main", "serve", "--tiers", "host:1MiB"]
    done = subprocess.run(
        [*command, "--address", daemon.address],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    error, blank, hint = done.stderr.splitlines()
    assert error == f"error: address: another daemon listens at {daemon.address!r}"
    assert (blank, hint[:6]) == ("", "hint: ")
    assert {path.name for path in run_directory.iterdir()} == {"n.sock", "n.sock.lock"}
    assert client.put(*make_blocks(1, 2)) == 2, "the first one never noticed"
    daemon.kill()
    assert serve().pid != daemon.pid, "files of a killed daemon are in nobody's way"
