"""What the linker promises, against a real daemon: leased pages, layer by layer, or a clear no."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import threading
import time

import numpy as np
import pytest

from kvstrata.connectors.sglang.devicepages import DevicePages
from kvstrata.connectors.sglang.hostpages import HostPages, PoolGeometry
from kvstrata.connectors.sglang.kept import KeptPages
from kvstrata.connectors.sglang.layerwise import LayerLoads, NodeSave, NodeSaves
from kvstrata.connectors.sglang.leases import Leases
from kvstrata.core.errors import DaemonError, LayoutError
from kvstrata.layout import Shard
from kvstrata.runtime.admin import AdminClient
from kvstrata.runtime.session import Session, SessionLimits
from kvstrata.tokens import Namespace

LAYERS, PAGES, PAGE_TOKENS, PART_BYTES = 3, 40, 16, 2048
GEOMETRY = PoolGeometry("layer_first", LAYERS, PAGES, PAGE_TOKENS, 2, 64, "uint8")
LAYOUT = GEOMETRY.block_layout(Shard(0, 1, 0, 1))
NAMESPACE = Namespace("m", "w", "", "uint8", LAYOUT.geometry, PAGE_TOKENS)


def chain(seed, count):
    digests = [hashlib.sha256(f"{seed}".encode()).digest()]
    while len(digests) < count:
        digests.append(hashlib.sha256(digests[-1]).digest())
    return digests


def block(digest):
    """Return the bytes of a page, which its digest decides."""
    return np.resize(np.frombuffer(digest, np.uint8), LAYOUT.block_bytes)


def device():
    parts = [np.zeros((PAGES, PART_BYTES), np.uint8) for _ in range(2 * LAYERS)]
    return DevicePages(parts[:LAYERS], parts[LAYERS:])


def page_of(pages, number):
    found = np.empty(LAYOUT.block_bytes, np.uint8)
    pages.read(number, found)
    return found


class Counter:
    """What a forward pass would have seen: which layers came, in order, and how it ended."""

    def __init__(self):
        self.layers, self.error, self.ended = [], None, threading.Event()

    def complete(self, index, layer):
        self.layers.append((index, layer))
        if layer == LAYERS - 1:
            self.ended.set()

    def fail(self, index, error):
        self.error = (index, error)
        self.ended.set()


class Side:
    """One engine's side of the linker."""

    def __init__(self, address, **limits):
        limits = {"call_timeout_s": 1.0, "retry_interval_s": 0.02} | limits
        session = Session(address, LAYOUT, NAMESPACE, SessionLimits(**limits), bridges=True)
        self.kept = KeptPages(session, batch_timeout_s=5.0)
        self.kept.open()
        self.leases = Leases(self.kept.turns, wait_s=1.0)
        self.pages, self.counter = device(), Counter()
        self.loads = LayerLoads(self.leases, self.pages, self.counter)

    def save(self, digests):
        pages = device()
        for number, digest in enumerate(digests):
            pages.write(number, block(digest))
        kept = self.kept.save(digests, None, pages, range(len(digests)))
        with AdminClient(self.kept.daemon_address) as admin:
            admin.wait_idle(10)  # a page is ready once the daemon has sealed it
        return kept

    def load(self, lease, index=0):
        self.loads.begin(index, [lease])
        self.loads.settle()

    def right(self, digests, numbers):
        places = zip(digests, numbers, strict=True)
        return all((page_of(self.pages, number) == block(each)).all() for each, number in places)

    def close(self):
        self.loads.close()
        self.kept.close()


@pytest.fixture
def side(run_directory):
    """Make sides; all are closed with the test."""
    assert run_directory.is_dir()
    made = []

    def make(address, **limits):
        made.append(Side(address, **limits))
        return made[-1]

    yield make
    for each in made:
        each.close()


def host(daemon):
    with AdminClient(daemon.address) as admin:
        return admin.stats()["node"]["tiers"]["host"]


def test_a_page_of_the_device_is_the_block_of_the_host_pool():
    pages = device()
    pages.write(7, block(b"0123456789"))
    flat = np.zeros(PAGES * LAYOUT.block_bytes, np.uint8)
    HostPages(GEOMETRY, flat, 1).write(7, block(b"0123456789"))
    # [kv, layer, page, bytes], as SGLang's host pool has it.
    assert (flat.reshape(2, LAYERS, PAGES, -1)[:, :, 7].ravel() == page_of(pages, 7)).all()
    assert not page_of(pages, 6).any()
    with pytest.raises(LayoutError, match="2 shapes"):
        DevicePages([np.zeros((4, 8), np.uint8)], [np.zeros((4, 9), np.uint8)])


def test_leased_pages_come_layer_by_layer_and_bit_for_bit(serve, side, eventually):
    daemon = serve("host:1MiB")
    mine = side(daemon.address)
    digests = chain(1, 6)
    assert all(mine.save(digests))
    assert mine.leases.ready("r", digests) == 6
    lease = mine.leases.take("r", digests, range(10, 16))
    assert host(daemon)["in_use"] == 6
    mine.load(lease, 5)
    assert mine.counter.layers == [(5, layer) for layer in range(LAYERS)]
    assert mine.right(digests, range(10, 16))
    assert not page_of(mine.pages, 9).any()
    eventually(lambda: host(daemon)["in_use"] == 0)


def test_a_leased_slot_is_given_to_nobody_else(serve, side):
    daemon = serve("host:256KiB")  # twenty pages
    mine, other = side(daemon.address), side(daemon.address)
    digests = chain(1, 6)
    assert all(mine.save(digests))
    lease = mine.leases.take("r", digests, range(6))
    for seed in range(2, 9):
        other.save(chain(seed, 8))
    mine.load(lease)
    assert mine.counter.error is None
    assert mine.right(digests, range(6))


def test_a_load_is_refused_whole_if_one_page_is_not_there(serve, side, eventually):
    daemon = serve("host:1MiB")
    mine = side(daemon.address)
    digests = chain(1, 6)
    mine.save(digests[:4])
    assert mine.leases.ready("r", digests) == 4
    assert mine.leases.take("r", digests, range(6)) is None
    assert mine.leases.statistics()["refused"] == 6
    eventually(lambda: host(daemon)["in_use"] == 0)
    assert mine.leases.take("r", digests[:4], range(3)) is None, "a page without a place"


def test_what_lies_below_the_host_is_a_miss_now_and_ready_later(serve, side, eventually, tmp_path):
    daemon = serve(f"host:256KiB,disk:{tmp_path / 'kv'}:4MiB")
    mine = side(daemon.address)
    digests = chain(1, 6)
    mine.save(digests)
    for seed in range(2, 9):
        mine.save(chain(seed, 8))
    asked = time.monotonic()
    assert mine.leases.ready("r", digests) == 0
    assert time.monotonic() - asked < 1
    assert mine.leases.statistics()["left_below"] == 1
    eventually(lambda: mine.leases.ready("s", digests) == 6)
    mine.load(mine.leases.take("s", digests, range(6)))
    assert mine.right(digests, range(6))


def test_a_slot_that_changes_under_the_copy_fails_the_batch(serve, side):
    mine = side(serve("host:1MiB").address)
    digests = chain(1, 3)
    mine.save(digests)
    lease = mine.leases.take("r", digests, range(3))
    changed = dataclasses.replace(lease, generations=lease.generations + np.uint64(1))
    mine.load(changed, 4)
    index, error = mine.counter.error
    assert index == 4
    assert isinstance(error, DaemonError)
    assert mine.counter.layers == []
    assert (mine.loads.torn, mine.loads.loaded) == (1, 0)
    mine.save(chain(2, 3))
    mine.load(mine.leases.take("s", chain(2, 3), range(3)))
    assert mine.right(chain(2, 3), range(3)), "the thread goes on"


def test_a_load_ends_well_though_its_daemon_was_killed(serve, side):
    daemon = serve("host:1MiB")
    mine = side(daemon.address)
    digests = chain(1, 6)
    mine.save(digests)
    lease = mine.leases.take("r", digests, range(6))
    os.kill(mine.kept.daemon_pid, signal.SIGKILL)
    time.sleep(0.1)
    assert mine.leases.ready("s", digests) == 0
    mine.load(lease)
    assert mine.counter.error is None
    assert mine.right(digests, range(6))


def test_questions_of_requests_that_are_gone_make_room(serve, side):
    daemon = serve("host:2MiB")
    mine = side(daemon.address)
    for number in range(70):
        digests = chain(number, 1)
        mine.save(digests)
        mine.leases.ready(f"r{number}", digests)
    assert host(daemon)["in_use"] == 64
    mine.leases.ready("r69", chain(1, 1))  # asks for something else
    assert host(daemon)["in_use"] == 64
    mine.leases.drop_all()
    assert host(daemon)["in_use"] == 0


def test_saves_end_in_order_and_those_that_wait_are_dropped_at_a_reset(serve, side):
    mine = side(serve("host:1MiB").address)
    good = [True]
    saves = NodeSaves(mine.kept, device(), lambda: good[0])
    try:
        assert saves.begin(NodeSave(chain(1, 2), [0, 1], []))
        deadline = time.monotonic() + 10
        while not saves.results and time.monotonic() < deadline:
            time.sleep(0.01)
        assert list(saves.results) == [True]
        good[0] = False  # the weights were updated
        saves.begin(NodeSave(chain(2, 2), [2, 3], []))
        while len(saves.results) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert list(saves.results) == [True, False]
        saves.settle()
        assert not saves.results
        assert mine.leases.ready("r", chain(2, 2)) == 0
    finally:
        saves.close()
