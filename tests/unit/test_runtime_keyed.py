"""Shared directories and object stores under a real daemon: what comes back, what never does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvstrata.core.errors import ConfigError

SIZE = 4 << 20


def shared(folder, way: str = "") -> str:
    return f"shared:{folder}:{SIZE}{way}"


def tier_of(client, name: str = "shared") -> dict:
    return client.stats()["node"]["tiers"][name]


def counters(client) -> dict:
    return client.stats()["node"]["counters"]


def files(folder) -> list[Path]:
    return sorted(Path(folder).rglob("*.kv"))


def file_of(folder, payload: bytes) -> Path:
    [found] = [path for path in files(folder) if payload in path.read_bytes()]
    return found


# -- a shared directory ----------------------------------------------------------------------------


def test_blocks_come_back_from_files(connect, make_blocks, tmp_path) -> None:
    client = connect(tiers=f"host:128KiB,{shared(tmp_path)}")
    tokens, blocks = make_blocks(1, 6)
    client.put(tokens, blocks)
    client.wait_idle()
    assert len(files(tmp_path)) == 6
    client.clear(["host"])
    assert client.get(tokens).tobytes() == blocks.tobytes()
    assert tier_of(client)["hit_blocks"] == 6


@pytest.mark.parametrize("how", ["orderly", "kill -9"])
def test_a_restart_finds_what_the_directory_holds(connect, make_blocks, tmp_path, how) -> None:
    where = f"host:128KiB,{shared(tmp_path)}"
    tokens, blocks = make_blocks(1, 6)
    client = connect(tiers=where)
    client.put(tokens, blocks)
    client.wait_idle()
    if how == "kill -9":
        os.kill(client.stats()["pid"], signal.SIGKILL)
    client.close()
    again = connect(tiers=where)
    again.wait_idle()
    assert counters(again)["adopted_blocks"] == 6
    assert again.get(tokens).tobytes() == blocks.tobytes()
    again.wait_idle()
    assert again.forget(tokens[:8]) == 10, "five blocks in two tiers: parents are known again"
    again.wait_idle()
    assert len(files(tmp_path)) == 1


def test_what_was_cleared_is_deleted(connect, make_blocks, tmp_path) -> None:
    where = f"host:128KiB,{shared(tmp_path)}"
    tokens, blocks = make_blocks(1, 6)
    client = connect(tiers=where)
    client.put(tokens, blocks)
    client.wait_idle()
    assert client.clear() == 12
    client.wait_idle()
    assert files(tmp_path) == []
    assert counters(client)["deleted_blocks"] == 6
    client.close()
    assert connect(tiers=where).lookup(tokens) == 0


def test_cleared_and_stored_again_at_once_it_is_there(connect, make_blocks, tmp_path) -> None:
    client = connect(tiers=f"host:128KiB,{shared(tmp_path)}")
    tokens, blocks = make_blocks(1, 6)
    for _ in range(20):
        client.put(tokens, blocks)
        client.clear()
        client.put(tokens, blocks)
        client.wait_idle()
        assert len(files(tmp_path)) == tier_of(client)["idle"] == 6
    client.clear(["host"])
    assert client.get(tokens).tobytes() == blocks.tobytes()


def test_what_is_evicted_is_deleted(connect, make_blocks, tmp_path) -> None:
    client = connect(tiers=f"host:128KiB,shared:{tmp_path}:100KiB")
    for seed in range(8):
        client.put(*make_blocks(seed, 4))
        client.wait_idle()
    tier = tier_of(client)
    assert tier["total"] == 11
    assert len(files(tmp_path)) == tier["idle"] == 11
    assert counters(client)["deleted_blocks"] == 32 - 11


@pytest.mark.parametrize("what", ["payload", "header", "cut", "swapped"])
def test_a_damaged_file_is_never_served(connect, make_blocks, tmp_path, what) -> None:
    client = connect(tiers=f"host:128KiB,{shared(tmp_path)}")
    tokens, blocks = make_blocks(1, 4)
    client.put(tokens, blocks)
    client.wait_idle()
    client.clear(["host"])
    path = file_of(tmp_path, blocks[2].tobytes())
    data = bytearray(path.read_bytes())
    if what == "swapped":
        data = file_of(tmp_path, blocks[1].tobytes()).read_bytes()
    elif what == "cut":
        data = data[:5000] if len(data) > 5000 else data[:-4]
    else:
        data[-3 if what == "payload" else 30] ^= 1
    path.write_bytes(data)
    assert client.get(tokens).tobytes() == blocks[:2].tobytes()
    assert counters(client)["corrupt_blocks"] == 1
    assert not path.exists(), "damaged twice: deleted"
    client.put(tokens, blocks)
    client.wait_idle()
    client.clear(["host"])
    assert client.get(tokens).tobytes() == blocks.tobytes()


def test_a_directory_deleted_under_us_is_a_miss(connect, make_blocks, tmp_path) -> None:
    folder = tmp_path / "share"
    client = connect(tiers=f"host:128KiB,{shared(folder)}")
    tokens, blocks = make_blocks(1, 4)
    client.put(tokens, blocks)
    client.wait_idle()
    client.clear(["host"])
    shutil.rmtree(folder)
    assert client.get(tokens).shape[0] == 0
    assert client.put(tokens, blocks) == 4
    client.wait_idle()
    assert client.get(tokens).tobytes() == blocks.tobytes(), "the host works on"
    assert counters(client)["write_failed_blocks"] == 4
    assert not folder.exists(), "an unmounted share is not made anew"


def test_a_full_directory_refuses_blocks_and_nothing_else(connect, make_blocks, tmp_path) -> None:
    where = f"host:128KiB,shared:{tmp_path}:100KiB"
    first = connect(tiers=where)
    first.put(*make_blocks(1, 11))
    first.wait_idle()
    second = connect(tiers=where)
    second.wait_idle()
    tokens, blocks = make_blocks(2, 11)
    assert second.put(tokens, blocks) == 11
    second.wait_idle()
    assert second.get(tokens).tobytes() == blocks.tobytes()
    taken = sum(path.stat().st_size for path in files(tmp_path))
    assert taken <= 100 << 10


def test_two_daemons_on_one_directory_find_what_the_other_wrote(
    connect, make_blocks, tmp_path
) -> None:
    where = f"host:512KiB,{shared(tmp_path)}"
    first, second = connect(tiers=where), connect(tiers=where)
    second.wait_idle()
    tokens, blocks = make_blocks(1, 100)
    assert second.lookup(tokens[:40]) == 0, "nobody stored it yet"
    first.put(tokens, blocks)
    first.wait_idle()
    others, other_blocks = make_blocks(2, 3)
    assert first.put(others, other_blocks) == 3
    first.wait_idle()
    assert second.get(others).tobytes() == other_blocks.tobytes()
    assert counters(second)["found_blocks"] == 3
    assert second.put(tokens, blocks) == 100
    second.wait_idle()
    assert tier_of(second)["store"]["existed"] == 100
    assert len(files(tmp_path)) == 103


def test_a_long_prefix_of_another_daemon_is_found_whole(connect, make_blocks, tmp_path) -> None:
    where = f"host:1MiB,{shared(tmp_path)}"
    first, second = connect(tiers=where), connect(tiers=where)
    second.wait_idle()
    tokens, blocks = make_blocks(1, 200)
    first.put(tokens, blocks)
    first.wait_idle()
    assert second.get(tokens).tobytes() == blocks.tobytes()
    found = counters(second)
    assert (found["found_blocks"], found["lookups"]) == (200, 1)
    assert first.forget(tokens[:4]) == 400
    first.wait_idle()
    second.clear(["host"])
    assert second.get(tokens).shape[0] == 0, "what another daemon deleted is a miss"


def test_what_is_not_there_is_asked_for_once(connect, make_blocks, tmp_path) -> None:
    client = connect(tiers=f"host:128KiB,{shared(tmp_path)}")
    client.wait_idle()
    tokens, _ = make_blocks(1, 6)
    for _ in range(5):
        assert client.lookup(tokens) == 0
    assert counters(client)["probed_blocks"] == 6


def test_a_codec_is_recorded_and_read_by_a_tier_without_it(connect, make_blocks, tmp_path) -> None:
    pytest.importorskip("zstandard", reason="no zstandard installed (kvstrata[codecs])")
    tokens, blocks = make_blocks(1, 4)
    blocks[:] = 1.5
    client = connect(tiers=f"host:128KiB,{shared(tmp_path, ':zstd')}")
    client.put(tokens, blocks)
    client.wait_idle()
    assert tier_of(client)["codec"] == "zstd"
    assert blocks[0].tobytes() not in files(tmp_path)[0].read_bytes()
    client.close()
    again = connect(tiers=f"host:128KiB,{shared(tmp_path)}")
    again.wait_idle()
    assert again.get(tokens).tobytes() == blocks.tobytes()


def test_behind_a_disk_it_takes_what_the_disk_evicts(connect, make_blocks, tmp_path) -> None:
    where = f"host:128KiB,disk:{tmp_path / 'd'}:64KiB,{shared(tmp_path / 's', ':on-evict')}"
    client = connect(tiers=where)
    chains = [make_blocks(seed, 1) for seed in range(24)]
    for tokens, blocks in chains:
        client.put(tokens, blocks)
        client.wait_idle()
    assert tier_of(client, "disk")["total"] < 24 == tier_of(client, "host")["idle"]
    client.clear(["host"])
    for tokens, blocks in chains:
        assert client.get(tokens).tobytes() == blocks.tobytes()
        client.wait_idle()
    assert tier_of(client)["hit_blocks"] > 0


def test_a_tenant_is_cleared_after_a_restart_too(
    serve, connect, command, make_blocks, tmp_path
) -> None:
    daemon = serve(f"host:256KiB,{shared(tmp_path)}", "a.sock")
    chains = {name: make_blocks(seed, 4) for seed, name in enumerate(("chat", "batch"))}
    for name, (tokens, blocks) in chains.items():
        client = connect(address=daemon.address, tenant=name)
        client.put(tokens, blocks)
        client.wait_idle()
    assert daemon.end() == 0
    again = serve(f"host:256KiB,{shared(tmp_path)}", "b.sock")
    client = connect(address=again.address, tenant="chat")
    client.wait_idle()
    cleared = command("clear", "--tenant", "batch", "--address", again.address)
    assert cleared.stdout == "4 blocks forgotten\n"
    client.wait_idle()
    assert len(files(tmp_path)) == 4
    tokens, blocks = chains["chat"]
    assert client.get(tokens).tobytes() == blocks.tobytes()
    assert client.lookup(chains["batch"][0]) == 0


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


@pytest.mark.parametrize("writes", [1, 60, 300])
def test_killed_while_it_writes_and_evicts(connect, tmp_path, writes) -> None:
    where = f"host:128KiB,shared:{tmp_path}:1MiB"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, where], stdout=subprocess.PIPE, text=True
    )
    with writer:
        daemon = int(writer.stdout.readline())
        last, written = -1, 0
        while written < writes:
            last, written = map(int, writer.stdout.readline().split())
        os.kill(daemon, signal.SIGKILL)
        writer.kill()
    client = connect(tiers=where)
    client.wait_idle()
    assert counters(client)["adopted_blocks"] == min(len(files(tmp_path)), 115)
    served = 0
    for seed in range(last + 2):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, 50_000, 32).tolist()
        blocks = rng.random((8, 3, 5), dtype=np.float32)
        found = client.get(tokens)
        assert found.tobytes() == blocks[: len(found)].tobytes()
        served += len(found)
    assert served > 0
    assert counters(client)["corrupt_blocks"] == 0, "no file is ever torn by a kill"


# -- settings --------------------------------------------------------------------------------------


def test_an_object_tier_without_a_secret_is_refused(connect) -> None:
    pytest.importorskip("obstore", reason="no obstore installed (kvstrata[object])")
    with pytest.raises(ConfigError, match="needs a secret that outlives this daemon"):
        connect(tiers="host:128KiB,object:s3://nowhere:1MiB")


@pytest.mark.parametrize(
    ("tiers", "says"),
    [
        ("host:1MiB,object:ftp://nowhere:1MiB", "unknown scheme"),
        ("host:1MiB,object:s3://a?key=b:1MiB", "has no option"),
        ("host:1MiB,shared:/proc/nothing:1MiB", "tiers.shared: directory"),
        ("host:1MiB,shared:/tmp/kv:1MiB:rot13", "unknown codec"),
        ("host:1MiB,shared:/tmp/kv:1MiB,shared:/tmp/kv:1MiB", "two tiers"),
    ],
)
def test_what_cannot_work_is_said_at_the_start(command, tiers, says) -> None:
    ended = command("serve", "--tiers", tiers)
    assert ended.returncode == 2
    assert says in ended.stderr
    assert "hint: " in ended.stderr


def test_what_a_lossy_tier_gave_back_is_never_found_as_exact(
    connect, make_blocks, tmp_path
) -> None:
    """Blocks that fp8 changed, and what is computed behind them, belong to another namespace."""
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(32)))
    exact = f"shared:{tmp_path / 'exact'}:1MiB"
    tokens, blocks = make_blocks(1, 4)
    lossy = connect(
        tiers=f"host:128KiB,{exact},shared:{tmp_path / 'lossy'}:1MiB:fp8", secret_file=str(secret)
    )
    lossy.put(tokens, blocks)
    lossy.wait_idle()
    lossy.clear(["host", "shared"])
    lossy.wait_idle()
    changed = lossy.get(tokens)
    assert len(changed) == 4
    assert changed.tobytes() != blocks.tobytes(), "fp8 lost nothing, so this shows nothing"
    lossy.wait_idle()
    other = connect(tiers=f"host:128KiB,{exact}", secret_file=str(secret))
    assert other.get(tokens).tobytes() in {b"", blocks.tobytes()}
    lossy.close()
    again = connect(tiers=f"host:128KiB,{exact}", secret_file=str(secret))
    assert again.get(tokens).tobytes() in {b"", blocks.tobytes()}, "nor after fp8 was taken away"
