"""What the linker promises, against a real daemon: leased pages, layer by layer, or a clear no."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvstrata.connectors.sglang import layerwise
from kvstrata.connectors.sglang.devicepages import DevicePages
from kvstrata.connectors.sglang.hostpages import HostPages, PoolGeometry
from kvstrata.connectors.sglang.kept import KeptPages
from kvstrata.connectors.sglang.layerwise import LayerLoads, NodeSave, NodeSaves
from kvstrata.connectors.sglang.leases import Leases
from kvstrata.connectors.sglang.queued import QueuedLoads
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
    mine.leases.end_all()
    assert host(daemon)["in_use"] == 0


def test_a_request_that_asks_the_same_again_at_once_costs_no_call(
    serve, side, eventually, monkeypatch
):
    daemon = serve("host:1MiB")
    mine, calls = side(daemon.address), []
    digests = chain(1, 6)
    mine.save(digests[:4])
    real = Session.call
    monkeypatch.setattr(Session, "call", lambda *given: calls.append(given[1]) or real(*given))
    assert [mine.leases.ready("r", digests) for _ in range(50)] == [4] * 50
    assert [mine.leases.ready("s", chain(2, 3)) for _ in range(50)] == [0] * 50
    assert len(calls) < 10, "a lookup, and a lookup with a release; a slow machine asks anew"
    assert mine.leases.ready("r", digests[1:]) == 3, "another question"
    mine.save(digests[4:])
    eventually(lambda: mine.leases.ready("r", digests[1:]) == 5)
    mine.leases.end_all()
    assert host(daemon)["in_use"] == 0


def test_whatever_is_leased_or_found_is_given_back_at_the_end_in_one_call(serve, side, monkeypatch):
    daemon = serve("host:1MiB")
    mine, calls = side(daemon.address), []
    for seed in range(1, 4):
        mine.save(chain(seed, 3))
    mine.leases.ready("found", chain(1, 3))
    leases = [mine.leases.take(f"r{seed}", chain(seed, 3), range(3)) for seed in (2, 3)]
    assert host(daemon)["in_use"] == 9
    real = Session.call
    monkeypatch.setattr(Session, "call", lambda *given: calls.append(given[1]) or real(*given))
    mine.leases.end_all()
    assert host(daemon)["in_use"] == 0
    mine.leases.end(leases)
    assert len(calls) == 1, "twice is harmless"


class TestWhateverHappensInAThreadItGoesOn:
    """A forward pass waits for a batch, and SGLang's tree for a node: each must hear of its end."""

    @pytest.mark.parametrize("error", [RuntimeError("odd"), SystemExit(1)])
    def test_a_copy_that_fails_is_told_and_the_next_batch_loads(
        self, serve, side, monkeypatch, eventually, error
    ):
        daemon = serve("host:1MiB")
        mine = side(daemon.address)
        digests = chain(1, 3)
        mine.save(digests)

        def fail(*_):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(mine.pages, "write_layer", fail)
            mine.load(mine.leases.take("r", digests, range(3)), 7)
        assert mine.counter.error == (7, error)
        eventually(lambda: host(daemon)["in_use"] == 0)
        mine.load(mine.leases.take("s", digests, range(3)), 8)
        assert mine.right(digests, range(3))

    def test_a_counter_that_takes_no_word_does_not_end_the_thread(self, serve, side, monkeypatch):
        mine = side(serve("host:1MiB").address)
        digests = chain(1, 3)
        mine.save(digests)

        def fail(*_):
            raise SystemExit(1)

        with monkeypatch.context() as patch:
            patch.setattr(mine.counter, "complete", fail)
            patch.setattr(mine.counter, "fail", fail)
            mine.load(mine.leases.take("r", digests, range(3)))
        mine.load(mine.leases.take("s", digests, range(10, 13)))
        assert mine.right(digests, range(10, 13))

    @pytest.mark.parametrize("error", [RuntimeError("odd"), SystemExit(1)])
    def test_a_save_that_fails_has_a_result(self, serve, side, monkeypatch, eventually, error):
        daemon = serve("host:1MiB")
        mine = side(daemon.address)
        pages = device()
        saves = NodeSaves(mine.kept, pages, lambda: True)

        def fail(*_):
            raise error

        try:
            with monkeypatch.context() as patch:
                patch.setattr(pages, "read", fail)
                saves.begin(NodeSave(chain(1, 2), [0, 1], []))
                eventually(lambda: saves.ended() == 1)
            saves.begin(NodeSave(chain(2, 2), [2, 3], []))
            eventually(lambda: saves.ended() == 2)
            assert [saves.pop(), saves.pop()] == [False, True]
        finally:
            saves.close()
        eventually(lambda: host(daemon)["filling"] + host(daemon)["in_use"] == 0)


def test_saves_end_in_order_and_those_that_wait_are_dropped_at_a_reset(serve, side, eventually):
    mine = side(serve("host:1MiB").address)
    good = [True]
    saves = NodeSaves(mine.kept, device(), lambda: good[0])
    try:
        saves.begin(NodeSave(chain(1, 2), [0, 1], []))
        eventually(lambda: saves.ended() == 1)
        good[0] = False  # the weights were updated
        saves.begin(NodeSave(chain(2, 2), [2, 3], []))
        eventually(lambda: saves.ended() == 2)
        assert [saves.pop(), saves.pop()] == [True, False]
        saves.begin(NodeSave(chain(3, 2), [2, 3], []))
        saves.settle()
        assert saves.ended() == 0
        assert mine.leases.ready("r", chain(2, 2)) == 0
    finally:
        saves.close()


def test_a_save_that_cannot_begin_fails_in_its_turn(serve, side, eventually, monkeypatch):
    """Another rank may have had room for it: SGLang pairs the results by their order."""
    monkeypatch.setattr(layerwise, "_NODES_MAX", 1)
    mine, pages = side(serve("host:1MiB").address), device()
    reading, go_on = threading.Event(), threading.Event()
    real = pages.read

    def read(page, into):
        reading.set()
        assert go_on.wait(10)
        real(page, into)

    monkeypatch.setattr(pages, "read", read)
    saves = NodeSaves(mine.kept, pages, lambda: True)
    try:
        saves.begin(NodeSave(chain(1, 2), [0, 1], []))
        assert reading.wait(10)
        for seed in (2, 3):  # one waits, and one finds no place
            saves.begin(NodeSave(chain(seed, 2), [2, 3], []))
        saves.begin(None)
        assert (saves.ended(), saves.dropped) == (0, 2)
        go_on.set()
        eventually(lambda: saves.ended() == 4)
        assert [saves.pop() for _ in range(4)] == [True, True, False, False]
    finally:
        go_on.set()
        saves.close()


class Vote:
    """The vote of two ranks as SGLang's group takes it: each waits for the other's word."""

    def __init__(self):
        self._words, self._barrier = [False, False], threading.Barrier(2)

    def of(self, rank):
        def vote(word):
            self._words[rank] = word
            self._barrier.wait(10)
            everywhere = all(self._words)
            self._barrier.wait(10)
            return everywhere

        return vote


class TestRanksLoadTogetherOrNotAtAll:
    """A rank that loads what another one computes would be a wrong answer, or a hung engine."""

    @pytest.fixture
    def sides(self, serve, side):
        """Two ranks with a daemon each."""
        made = [side(serve("host:1MiB", f"{rank}.sock").address) for rank in range(2)]
        vote = Vote()
        for rank, each in enumerate(made):
            each.queue = QueuedLoads(each.leases, vote.of(rank))
        return made

    @staticmethod
    def add(sides, request, named):
        """Queue a load on both ranks at once; return what each has answered."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda each, its: each.queue.add(request, its), sides, named))

    @staticmethod
    def in_use(each):
        with AdminClient(each.kept.daemon_address) as admin:
            return admin.stats()["node"]["tiers"]["host"]["in_use"]

    def test_whatever_each_rank_has(self, sides, eventually):
        fates = ("kept", "one page less", "gone since the question", "odd pages")
        for seed, pair in enumerate(itertools.product(fates, repeat=2)):
            digests, pages = chain(seed, 4), list(range(10, 14))
            named = []
            for each, fate in zip(sides, pair, strict=True):
                assert all(each.save(digests[: 3 if fate == "one page less" else 4]))
                each.leases.ready("r", digests)
                if fate == "gone since the question":
                    each.kept.forget(digests[2])
                named.append(None if fate == "odd pages" else (digests, pages))
            together = set(pair) == {"kept"}
            assert self.add(sides, "r", named) == [together, together], pair
            for each in sides:
                batch = each.queue.take()
                assert len(batch) == together
                for lease in batch:
                    each.load(lease)
                    assert each.right(digests, pages)
                eventually(lambda each=each: self.in_use(each) == 0)
        assert [each.leases.statistics()["given_up"] for each in sides] == [12, 12]

    def test_a_daemon_that_ends_between_the_question_and_the_load(self, sides, eventually):
        digests = chain(1, 6)
        for each in sides:
            assert all(each.save(digests))
            assert each.leases.ready("r", digests) == 6
        os.kill(sides[1].kept.daemon_pid, signal.SIGKILL)
        named = [(digests, range(6)), (digests, range(6))]
        assert self.add(sides, "r", named) == [False, False]
        assert [each.queue.take() for each in sides] == [[], []]
        eventually(lambda: self.in_use(sides[0]) == 0)

    def test_a_request_that_is_queued_twice_or_cancelled(self, sides, eventually):
        digests, other = chain(1, 3), chain(2, 3)
        for each in sides:
            each.save(digests)
            each.save(other)
        assert self.add(sides, "r", [(digests, range(3))] * 2) == [True, True]
        assert self.add(sides, "r", [(other, range(3, 6))] * 2) == [False, False]
        assert [each.queue.cancel("r") for each in sides] == [True, True]
        assert [each.queue.cancel("r") for each in sides] == [False, False]
        assert [each.queue.take() for each in sides] == [[], []]
        for each in sides:
            eventually(lambda each=each: self.in_use(each) == 0)
