"""A real daemon whose blocks are moved by another backend: a plug-in's, and NIXL's for files."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

SLAB_BYTES = 1 << 20
VENDOR = """
import os, time
from pathlib import Path
from kvstrata.testing.movers import PlainMover

ORDERS = Path(os.environ["VENDOR_ORDERS"])

class Plain(PlainMover):
    def submit(self, transfer, ops, source, target):
        if (ORDERS / "raise").exists():
            raise LookupError("the driver is gone")
        return super().submit(transfer, ops, source, target)

    def move(self, op, source, target):
        if (ORDERS / "fail").exists():
            raise OSError("the card is out")
        while (ORDERS / "hang").exists():
            time.sleep(0.01)
        super().move(op, source, target)
        with (ORDERS / "moved").open("a") as file:
            file.write(f"{op.length}\\n")

class Idle(PlainMover):
    def move(self, op, source, target):
        pass
"""
WRITER = """
import sys
import numpy as np
from kvstrata import Client
client = Client(block_shape=(3, 5), dtype=np.float32, block_tokens=4, address=sys.argv[1])
for seed in range(10**6):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50_000, 32).tolist()
    client.put(tokens, rng.random((8, 3, 5), dtype=np.float32))
    print(seed, client.stats()["node"]["counters"]["written_blocks"], flush=True)
"""


@pytest.fixture
def orders(tmp_path):
    folder = tmp_path / "orders"
    folder.mkdir()
    return folder


@pytest.fixture
def vendor(tmp_path, orders):
    """Variables of a process in whose environment the plug-in is installed."""
    site = tmp_path / "site"
    info = site / "vendor_mover-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "vendor_mover.py").write_text(VENDOR)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vendor-mover\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[kvstrata.backends]\nplain = vendor_mover:Plain\nidle = vendor_mover:Idle\n"
    )
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "VENDOR_ORDERS": str(orders)}


@pytest.fixture
def tier(tmp_path):
    folder = tmp_path / "tier"
    folder.mkdir()
    return folder


@pytest.fixture
def start(serve, vendor, tier):
    """Start a daemon over `tier` with a backend."""

    def go(backend, *more, host="128KiB"):
        tiers = f"host:{host},disk:{tier}:{SLAB_BYTES}"
        return serve(tiers, "n.sock", "--backend", backend, *more, **vendor)

    return go


BOTH = pytest.mark.parametrize("backend", ["plain", pytest.param("nixl", marks=pytest.mark.nixl)])


def stored(client, make_blocks, seed=1, count=6):
    """Put blocks, let them reach the disk, and empty the host."""
    tokens, blocks = make_blocks(seed, count)
    assert client.put(tokens, blocks) == count
    client.wait_idle()
    client.clear(["host"])
    return tokens, blocks


def counters(client):
    return client.stats()["node"]["counters"]


@BOTH
def test_blocks_go_down_and_come_back_by_it(start, connect, make_blocks, orders, tier, backend):
    daemon = start(backend)
    client = connect(address=daemon.address)
    tokens, blocks = stored(client, make_blocks)
    assert client.get(tokens).tobytes() == blocks.tobytes()
    said = client.stats()["backend"]
    assert (said["name"], said["setting"]) == (backend, backend)
    assert (said["failed_transfers"], said["odd_completions"], said["left_alone"]) == (0, 0, "")
    assert client.stats()["node"]["tiers"]["disk"]["hit_blocks"] == 6
    if backend == "plain":  # it, and not our threads, moved each payload; lines it never sees
        moved = [int(line) for line in (orders / "moved").read_text().split()]
        assert sum(moved) % 4096 == 0
        assert sum(moved[-32:]) >= 12 * 4096
    assert [path.name for path in tier.iterdir() if path.name.startswith(".kvstrata-trial")] == []


@BOTH
def test_a_restart_finds_them_whoever_wrote_them(start, connect, make_blocks, backend):
    daemon = start(backend)
    client = connect(address=daemon.address)
    tokens, blocks = stored(client, make_blocks)
    for again in (backend, "posix", backend):
        client.close()
        assert daemon.end() == 0
        daemon = start(again)
        client = connect(address=daemon.address)
        assert client.get(tokens).tobytes() == blocks.tobytes()
        assert client.stats()["backend"]["name"] == again


@BOTH
@pytest.mark.parametrize("bad", [0, 3])
def test_a_flipped_bit_is_never_served(start, connect, make_blocks, tier, backend, bad):
    client = connect(address=start(backend).address)
    tokens, blocks = stored(client, make_blocks)
    path = tier / "blocks.slab"
    data = path.read_bytes()
    at = data.index(blocks[bad].tobytes()) + 30
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([data[at] ^ 1]))
    assert client.get(tokens).tobytes() == blocks[:bad].tobytes()
    assert counters(client)["corrupt_blocks"] == 1
    client.put(tokens, blocks)
    assert client.get(tokens).tobytes() == blocks.tobytes()


@BOTH
@pytest.mark.parametrize("writes", [100])
def test_killed_while_writing(start, connect, backend, writes):
    daemon = start(backend)
    command = [sys.executable, "-c", WRITER, daemon.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        last = written = 0
        while written < writes:
            last, written = map(int, writer.stdout.readline().split())
        daemon.signal(signal.SIGKILL)
        writer.kill()
    daemon.kill()
    client = connect(address=start(backend).address)
    found = 0
    for seed in range(last + 100):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, 50_000, 32).tolist()
        expected = rng.random((8, 3, 5), dtype=np.float32)
        got = client.get(tokens)
        assert got.tobytes() == expected[: len(got)].tobytes(), f"{seed=}"
        found += len(got)
    told = counters(client)
    assert 0 < found <= told["recovered_blocks"]
    assert found + told["corrupt_blocks"] >= min(writes, told["recovered_blocks"]) // 2


def test_it_fails_at_run_time(start, connect, make_blocks, orders):
    """Blocks are misses and counted, then the device is left alone; the next start has them."""
    daemon = start("plain")
    client = connect(address=daemon.address)
    tokens, blocks = stored(client, make_blocks)
    (orders / "fail").touch()
    for _ in range(3):
        assert len(client.get(tokens)) == 0
    told = client.stats()
    assert told["backend"]["failed_transfers"] >= 1
    (device,) = told["node"]["tiers"]["disk"]["devices"]
    assert device["read_errors"] >= 1
    assert "backend plain: the card is out" in device["last_error"]
    client.put(*make_blocks(2, 4))
    assert len(client.get(make_blocks(2, 4)[0])) == 4, "the host goes on without it"
    client.close()
    assert daemon.end() == 0
    (orders / "fail").unlink()
    again = connect(address=start("plain").address)
    got = again.get(tokens)
    assert got.tobytes() == blocks[: len(got)].tobytes()
    stored(again, make_blocks)
    assert again.get(tokens).tobytes() == blocks.tobytes(), "the disk is used again"


@pytest.mark.nixl
def test_nixl_fails_at_run_time(start, connect, make_blocks, tier):
    client = connect(address=start("nixl").address)
    tokens, blocks = stored(client, make_blocks)
    path = tier / "blocks.slab"
    at = path.read_bytes().index(blocks[3].tobytes())
    os.truncate(path, at)
    got = client.get(tokens)
    assert got.tobytes() == blocks[: len(got)].tobytes()
    assert len(got) < 6
    assert client.stats()["backend"]["failed_transfers"] >= 1


def test_it_raises_at_run_time(start, connect, make_blocks, orders):
    client = connect(address=start("plain", "--staging-timeout-s", "0.3").address)
    tokens, _ = stored(client, make_blocks)
    (orders / "raise").touch()
    for _ in range(3):
        assert len(client.get(tokens)) == 0
    told = client.stats()["backend"]
    assert "LookupError: the driver is gone" in told["left_alone"]
    (orders / "raise").unlink()
    assert len(client.get(tokens)) == 0, "who raised once is not believed again"
    other, blocks = make_blocks(2, 4)
    client.put(other, blocks)
    assert client.get(other).tobytes() == blocks.tobytes()


def test_bytes_that_come_late_land_in_no_slot_that_is_used_again(
    start, connect, make_blocks, orders, eventually
):
    """A read is past its deadline, its slots are wanted by others, and then its bytes come."""
    daemon = start("plain", "--staging-timeout-s", "1")
    client = connect(address=daemon.address)
    tokens, blocks = stored(client, make_blocks)
    (orders / "hang").touch()
    began = time.monotonic()
    assert len(client.get(tokens)) == 0
    assert time.monotonic() - began < 6
    eventually(lambda: client.stats()["node"]["tiers"]["host"]["quarantined"] == 6)
    told = client.stats()
    assert told["backend"]["in_flight"] >= 1
    total = told["node"]["tiers"]["host"]["total"]
    others = [make_blocks(seed, 4) for seed in range(10, 10 + total // 4 + 2)]
    for each, data in others:  # more than there are slots: all that are free get used
        client.put(each, data)
    threading.Timer(0.2, (orders / "hang").unlink).start()
    deadline = time.monotonic() + 10
    while client.stats()["backend"]["in_flight"]:
        for each, data in random.sample(others, 5):
            got = client.get(each)
            assert got.tobytes() == data[: len(got)].tobytes()
        assert time.monotonic() < deadline
    for each, data in others:
        got = client.get(each)
        assert got.tobytes() == data[: len(got)].tobytes()
    assert client.stats()["node"]["tiers"]["host"]["quarantined"] == 0
    assert client.get(tokens).tobytes() == blocks.tobytes()


def test_a_daemon_ends_though_its_mover_does_not(start, connect, make_blocks, orders):
    daemon = start("plain", "--staging-timeout-s", "0.3")
    client = connect(address=daemon.address)
    tokens, _ = stored(client, make_blocks)
    (orders / "hang").touch()
    assert len(client.get(tokens)) == 0
    client.close()
    began = time.monotonic()
    assert daemon.end() == 0
    assert time.monotonic() - began < 9
    assert any("plain did not end" in line for line in daemon.lines)


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("carrier", "backend: unknown backend 'carrier'"),
        ("memcpy", "backend: memcpy does not move both ways between memory and files"),
        ("idle", "backend: idle: other bytes came back than it had written"),
    ],
)
def test_what_cannot_move_blocks_is_refused_at_start(
    command, vendor, tier, run_directory, backend, words
):
    arguments = ["serve", "--tiers", f"host:1MiB,disk:{tier}:1MiB", "--backend", backend]
    done = command(*arguments, "--address", f"ipc://{run_directory}/n.sock", **vendor)
    assert done.returncode == 2
    error, blank, hint = done.stderr.splitlines()[-3:]
    assert words in error
    assert (blank, hint[:6]) == ("", "hint: ")
    assert not (tier / "blocks.slab").exists()


def test_doctor_and_stats_say_the_same(start, command, vendor, tier):
    daemon = start("plain")
    shown = command("stats", "--address", daemon.address, **vendor).stdout
    assert "between host and disk blocks move by plain: it is the setting" in shown
    arguments = ["doctor", "--json", "--directory", str(tier)]
    done = command(*arguments, **vendor, KVSTRATA_BACKEND="plain")
    assert done.returncode == 0, done.stderr
    found = {tuple(each["pair"]): each for each in json.loads(done.stdout)["choices"]}
    for pair in (("memory", "file"), ("file", "memory")):
        assert found[pair]["name"] == "plain"
        assert found[pair]["reason"].startswith("plain is the setting; auto would take ")
        tried = {each["name"]: each for each in found[pair]["candidates"]}
        assert tried["plain"]["usable"]
        assert not tried["idle"]["usable"]
