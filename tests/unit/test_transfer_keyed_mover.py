"""A manager over a keyed tier whose store fails, forgets and spoils on order: no wrong block."""

from __future__ import annotations

import random
import threading
import time

import pytest

from kvstrata.core.config import Limits
from kvstrata.core.errors import TransferError
from kvstrata.core.ids import Holder, SequenceHash, SessionId, SlotId, TransferId
from kvstrata.core.tier import HOST, TierName
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.manager import LowerTier, Manager
from kvstrata.manager.lineage import Found
from kvstrata.policy import LruPolicy
from kvstrata.pool import Pool
from kvstrata.storage.arena import Arena
from kvstrata.storage.codecs import CodecSettings, make_chain
from kvstrata.storage.keyed import PutAnswer
from kvstrata.storage.seal import seal
from kvstrata.testing.keyed import FaultyKeyedStore, KeyedFaults, MemoryKeyedStore
from kvstrata.transfer.backends.keyed import KeyedEnd
from kvstrata.transfer.base import EraseJob, JobDone, Lineage, ReadJob, WriteJob
from kvstrata.transfer.executor import Executor
from kvstrata.transfer.keyed import KeyedMover

STORE = TierName("object")
LAYOUT = BlockLayout((Dimension("channel", 64),), "float32", 8, "test")
LENGTH = LAYOUT.block_bytes
SLOTS = 16


def key(number: int) -> SequenceHash:
    return SequenceHash(number.to_bytes(16, "big"))


def keys(*numbers: int) -> list[SequenceHash]:
    return [key(number) for number in numbers]


def bytes_of(number: int) -> bytes:
    return random.Random(number).randbytes(LENGTH)


class StuckStore(MemoryKeyedStore):
    """Does nothing until `go` is set; counts who waits."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.waiting = threading.Semaphore(0)

    def wait(self) -> None:
        self.waiting.release()
        assert self.go.wait(20)

    def get(self, *arguments):
        self.wait()
        return super().get(*arguments)

    def put(self, *arguments):
        self.wait()
        return super().put(*arguments)

    def delete(self, keys):
        self.wait()
        super().delete(keys)


class World:
    """A manager, an executor and a keyed tier over a given store, driven by hand."""

    def __init__(self, store, slots: int = 8, backlog: int = 1000, **more) -> None:
        self.arena = Arena.create(SLOTS * 4096 + 4096, LAYOUT)
        end = KeyedEnd(store, make_chain("none", CodecSettings("float32")), LAYOUT.fingerprint)
        self.mover = KeyedMover(end, self.arena, threads=4, **more)
        self.limits = Limits(
            staging_timeout_s=1.0,
            rest_s=2.0,
            delete_retry_s=2.0,
            offload_backlog_blocks_max=backlog,
        )
        self.executor = Executor(
            self.arena, {}, LAYOUT.fingerprint, self.limits, keyed={STORE: self.mover}
        )
        self.host = Pool(self.arena.grid.slots, LruPolicy(), self.arena.generations)
        self.tier = LowerTier(STORE, Pool(slots, LruPolicy()), keyed=True)
        self.manager = Manager(self.host, [self.tier], self.limits)
        self.counters = self.manager.counters
        self.now = 0.0
        self.turn = 0

    def close(self) -> None:
        self.executor.close()
        self.arena.close()

    def pump(self) -> None:
        for transfer in self.manager.late(self.now):
            self.executor.cancel(transfer)
        for done in self.executor.poll():
            self.manager.complete(done)
        for job in self.manager.step(self.now):
            assert self.executor.try_submit(job)
        self.host.check()
        self.tier.pool.check()

    def settle(self) -> None:
        deadline = time.monotonic() + 20
        self.pump()
        while self.manager.pending or self.executor.running:
            assert time.monotonic() < deadline, "jobs do not end"
            self.pump()
            time.sleep(0.001)

    def holder(self) -> Holder:
        self.turn += 1
        return Holder(SessionId(1), str(self.turn))

    def store(self, *numbers: int, owner: int = 0) -> None:
        holder = self.holder()
        answer = self.manager.reserve(holder, None, keys(*numbers), now=self.now, owner=owner)
        for index, slot in zip(answer.indices, answer.slots, strict=True):
            at = self.arena.grid.offset(slot)
            self.arena.region.view[at : at + LENGTH] = bytes_of(numbers[index])
        self.manager.seal(holder, answer.slots)

    def load(self, *numbers: int) -> int:
        """Return how many blocks came, each looked at byte by byte."""
        holder = self.holder()
        while self.manager.lookup(holder, keys(*numbers), self.now).pending:
            self.settle()
        got = self.manager.acquire(holder, keys(*numbers), self.now)
        for number, slot in zip(numbers, got.slots, strict=False):
            at = self.arena.grid.offset(slot)
            assert self.arena.region.view[at : at + LENGTH] == bytes_of(number), "a wrong block"
        self.manager.release(holder)
        self.settle()
        return got.blocks

    @property
    def there(self) -> set[int]:
        return {int.from_bytes(each, "big") for each in self.tier.pool.resident()}


@pytest.fixture
def world():
    made: list[World] = []

    def make(store, **more) -> World:
        made.append(World(store, **more))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_blocks_go_out_come_back_and_are_deleted(world) -> None:
    store = MemoryKeyedStore()
    node = world(store)
    node.store(1, 2, 3)
    node.settle()
    assert store.blocks.keys() == set(keys(1, 2, 3))
    node.manager.clear([HOST])
    assert node.load(1, 2, 3) == 3
    assert node.manager.forget(key(2)) == 4
    node.settle()
    assert store.blocks.keys() == set(keys(1))
    assert node.manager.clear([STORE]) == 1
    node.settle()
    assert not store.blocks


def test_what_is_evicted_is_deleted_and_nothing_else(world) -> None:
    store = MemoryKeyedStore()
    node = world(store, slots=4)
    for number in range(1, 10):
        node.store(number)
        node.settle()
    assert store.blocks.keys() == set(keys(6, 7, 8, 9))
    assert node.there == {6, 7, 8, 9}
    assert node.counters.deleted_blocks == 5


def test_what_could_not_be_deleted_is_tried_again(world) -> None:
    inner = MemoryKeyedStore()
    store = FaultyKeyedStore(inner, KeyedFaults(), random.Random(1))
    node = world(store)
    node.store(1, 2)
    node.settle()
    store.faults = KeyedFaults(fail=1.0)
    node.manager.clear([STORE])
    node.settle()
    assert len(inner.blocks) == 2
    assert not node.there
    store.faults = KeyedFaults()
    node.now += 3.0
    node.settle()
    assert not inner.blocks


def test_what_waits_to_be_deleted_is_bounded_and_what_is_not_is_counted(world) -> None:
    class Undeletable(MemoryKeyedStore):
        def delete(self, doomed):
            raise TransferError(f"{len(doomed)} not now", retryable=True)

    store = Undeletable()
    node = world(store, slots=2, backlog=1)
    for number in range(1, 11):
        node.store(number)
        node.settle()
    assert len(store.blocks) == 10
    assert len(node.tier.doomed) == 3
    assert node.counters.undeleted_blocks == 5


def test_a_failed_read_keeps_the_block_and_lets_the_tier_rest(world) -> None:
    store = FaultyKeyedStore(MemoryKeyedStore(), KeyedFaults(), random.Random(1))
    node = world(store)
    node.store(1, 2)
    node.settle()
    node.manager.clear([HOST])
    store.faults = KeyedFaults(fail=1.0)
    assert node.load(1, 2) == 0
    assert node.there == {1, 2}
    store.faults = KeyedFaults()
    asked = store.statistics().hits
    assert node.load(1, 2) == 0, "it rests"
    assert store.statistics().hits == asked
    node.now += 3.0
    assert node.load(1, 2) == 2


def test_a_block_that_is_gone_is_forgotten_and_not_deleted(world) -> None:
    store = MemoryKeyedStore()
    node = world(store)
    node.store(1, 2)
    node.settle()
    node.manager.clear([HOST])
    del store.blocks[key(2)]
    assert node.load(1, 2) == 1
    assert node.there == {1}
    assert node.counters.read_failed_blocks == 1
    assert store.statistics().deleted == 0


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_spoilt_no_wrong_block_is_served(world, seed) -> None:
    luck = random.Random(seed)
    faults = KeyedFaults(flip=0.3, cut=0.1, vanish=0.1, fail=0.05, lose=0.1)
    node = world(FaultyKeyedStore(MemoryKeyedStore(), faults, luck))
    for _ in range(40):
        numbers = range(1, luck.randint(2, 8))
        node.store(*numbers)
        node.settle()
        node.manager.clear([HOST])
        node.load(*numbers)  # compares every byte
        node.now += 3.0
    assert node.counters.corrupt_blocks
    assert node.counters.hit_blocks_staged


def test_what_was_there_before_is_adopted_with_what_its_header_says(world) -> None:
    store = MemoryKeyedStore()
    first = world(store)
    tag = b"namespac" + b"tenant-a"
    first.store(1, 2, 3, owner=first.manager.tenants.recall(tag))
    first.settle()
    node = world(store)
    lineage = [Lineage(None, tag), Lineage(key(1), tag), Lineage(key(2), tag)]
    node.manager.adopt(STORE, [Found(key(n), said) for n, said in enumerate(lineage, 1)])
    assert node.there == {1, 2, 3}
    owner = node.manager.tenants.recall(tag)
    assert node.tier.pool.owned() == {owner: 3}
    assert node.manager.forget(key(2)) == 2
    assert node.load(1) == 1


def test_a_header_that_was_not_read_is_learnt_from_the_first_read(world) -> None:
    store = MemoryKeyedStore()
    first = world(store)
    tag = b"namespac" + b"tenant-a"
    first.store(1, 2, 3, owner=first.manager.tenants.recall(tag))
    first.settle()
    node = world(store)
    node.manager.adopt(STORE, [Found(each) for each in keys(3, 2, 1)])
    assert node.load(1, 2, 3) == 3
    parents = node.tier.pool.parents()
    assert parents == {key(1): None, key(2): key(1), key(3): key(2)}
    assert node.host.parents() == parents
    assert node.tier.pool.owned() == {node.manager.tenants.recall(tag): 3}


def test_more_than_there_is_room_for_is_left_where_it_is(world) -> None:
    node = world(MemoryKeyedStore(), slots=4)
    node.store(1, 2)
    node.settle()
    node.manager.adopt(STORE, [Found(each) for each in keys(1, 10, 11, 12)])
    assert node.there == {1, 2, 10, 11}
    assert (node.counters.adopted_blocks, node.counters.unadopted_blocks) == (2, 1)
    node.settle()
    assert node.counters.deleted_blocks == 0


def test_what_a_cleared_tier_still_lists_is_deleted(world) -> None:
    store = MemoryKeyedStore()
    first = world(store)
    first.store(1, 2, 3)
    first.settle()
    node = world(store)
    node.store(3)
    node.settle()
    node.manager.adopt(STORE, [Found(each) for each in keys(1, 2, 3)], cleared=True)
    node.settle()
    assert store.blocks.keys() == {key(3)}, "stored since the clear"


# -- what other daemons wrote ----------------------------------------------------------------------


def test_a_lookup_that_would_miss_finds_what_another_daemon_wrote(world) -> None:
    store = MemoryKeyedStore()
    other = world(store)
    other.store(1, 2, 3)
    other.settle()
    node = world(store)
    assert node.load(1, 2, 3, 4) == 3
    assert (node.counters.probed_blocks, node.counters.found_blocks) == (4, 3)
    assert node.tier.pool.parents() == {key(1): None, key(2): key(1), key(3): key(2)}
    assert node.load(1, 2, 3, 4) == 3
    assert node.counters.probed_blocks == 4, "that the fourth is not there is remembered"
    node.now += 11.0
    other.store(1, 2, 3, 4)
    other.settle()
    assert node.load(1, 2, 3, 4) == 4


def test_what_was_found_makes_room_by_eviction(world) -> None:
    store = MemoryKeyedStore()
    other = world(store)
    other.store(1, 2, 3)
    other.settle()
    node = world(store, slots=4)
    node.store(10, 11, 12, 13)
    node.settle()
    assert node.load(1, 2, 3) == 3
    assert node.there == {1, 2, 3, 10}
    assert store.blocks.keys() == set(keys(1, 2, 3, 10))


def test_an_answer_that_does_not_come_is_a_miss_in_time(world) -> None:
    store = StuckStore()
    store.exists = lambda asked: store.wait() or [False] * len(asked)
    node = world(store, close_timeout_s=0.1)
    holder = node.holder()
    answer = node.manager.lookup(holder, keys(1, 2), node.now)
    assert answer.pending
    node.pump()
    store.waiting.acquire()
    node.now += 0.6
    node.pump()
    answer = node.manager.lookup(holder, keys(1, 2), node.now)
    assert (answer.ready, answer.pending) == (0, 0)
    assert not node.manager.lookup(node.holder(), keys(5, 6), node.now).pending, "it rests"
    store.go.set()
    node.settle()


def test_a_failed_answer_is_no_answer(world) -> None:
    inner = MemoryKeyedStore()
    store = FaultyKeyedStore(inner, KeyedFaults(), random.Random(1))
    other = world(inner)
    other.store(1, 2)
    other.settle()
    node = world(store)
    store.faults = KeyedFaults(fail=1.0)
    assert node.load(1, 2) == 0
    store.faults = KeyedFaults()
    node.now += 3.0
    assert node.load(1, 2) == 2, "it was not taken for absent"


class LateView(MemoryKeyedStore):
    """One machine's view of a store that several share, as NFS has it.

    Puts are decided where the store is; what others have put or deleted shows only after `look`.
    """

    def __init__(self, shared: MemoryKeyedStore) -> None:
        super().__init__()
        self.shared = shared
        self.look()

    def look(self) -> None:
        self.blocks = dict(self.shared.blocks)

    def put(self, key, header, payload):
        answer = self.shared.put(key, header, payload)
        if answer is PutAnswer.CREATED:
            self.blocks[key] = self.shared.blocks[key]
        return answer

    def delete(self, keys):
        self.shared.delete(keys)
        super().delete(keys)


@pytest.mark.parametrize("seed", range(6))
def test_what_others_do_shows_late_and_no_wrong_block_is_served(world, seed) -> None:
    luck = random.Random(seed)
    shared = MemoryKeyedStore()
    views = [LateView(shared), LateView(shared)]
    nodes = [world(view, slots=6) for view in views]
    loaded = 0
    for _ in range(60):
        node = luck.choice(nodes)
        first = luck.choice([1, 101, 201])
        chain = range(first, first + luck.randint(1, 4))
        match luck.choice([*["store", "load", "load", "look"] * 3, "clear", "wait"]):
            case "store":
                node.store(*chain)
                node.settle()
            case "load":
                node.manager.clear([HOST])
                loaded += node.load(*chain)  # compares every byte
                node.now += 3.0  # what missed what it had lets the tier rest
            case "look":
                luck.choice(views).look()
            case "clear":
                assert node.manager.clear([STORE]) >= 0
                node.settle()
            case "wait":
                node.now += 11.0
    assert loaded, "nothing was ever found"
    for node in nodes:
        node.settle()
        assert not node.tier.doomed
    node = world(LateView(shared))
    for first in (1, 101, 201):
        chain = range(first, first + 4)
        there = [key(number) in shared.blocks for number in chain]
        assert node.load(*chain) == (there.index(False) if False in there else 4)
        node.now += 3.0


# -- the mover by itself ---------------------------------------------------------------------------


def write(transfer: int, *numbers: int) -> WriteJob:
    return WriteJob(
        TransferId(transfer),
        STORE,
        slots=tuple(SlotId(place) for place in range(len(numbers))),
        targets=tuple(SlotId(number) for number in numbers),
        keys=tuple(keys(*numbers)),
        parents=(None,) * len(numbers),
        checksums=tuple(
            seal(key(number) + LAYOUT.fingerprint, bytes_of(number)) for number in numbers
        ),
        written=1,
    )


def fill(node: World, *numbers: int) -> None:
    for slot, number in enumerate(numbers):
        at = node.arena.grid.offset(SlotId(slot))
        node.arena.region.view[at : at + LENGTH] = bytes_of(number)


def drain(node: World, count: int) -> dict[int, JobDone]:
    found: dict[int, JobDone] = {}
    deadline = time.monotonic() + 20
    while len(found) < count:
        assert time.monotonic() < deadline, f"only {list(found)} ended"
        for done in node.executor.poll():
            assert done.transfer not in found, "a job ended twice"
            found[done.transfer] = done
        time.sleep(0.001)
    return found


def test_a_host_block_that_changed_is_never_written(world) -> None:
    store = MemoryKeyedStore()
    node = world(store)
    fill(node, 1, 2)
    at = node.arena.grid.offset(SlotId(1))
    node.arena.region.view[at] ^= 1
    node.mover.submit(write(1, 1, 2))
    assert drain(node, 1)[1].ok == (True, False)
    assert store.blocks.keys() == {key(1)}


def test_a_write_waits_for_the_delete_of_its_key(world) -> None:
    store = StuckStore()
    node = world(store)
    fill(node, 1)
    node.mover.submit(EraseJob(TransferId(1), STORE, (), (key(1),)))
    node.mover.submit(write(2, 1))
    store.waiting.acquire()
    time.sleep(0.02)
    assert not store.waiting.acquire(blocking=False), "the put did not begin"
    store.go.set()
    assert all(all(done.ok) for done in drain(node, 2).values())
    assert store.blocks.keys() == {key(1)}


def test_behind_a_store_that_hangs_what_is_cancelled_ends(world) -> None:
    store = StuckStore()
    node = world(store, close_timeout_s=0.1)
    for transfer in range(1, 9):
        slots = (SlotId(transfer),)
        node.mover.submit(ReadJob(TransferId(transfer), STORE, (SlotId(0),), slots, (key(1),)))
    for _ in range(4):
        store.waiting.acquire()
    for transfer in range(1, 9):
        node.executor.cancel(TransferId(transfer))
    ended = drain(node, 4)
    assert set(ended) == {5, 6, 7, 8}
    assert all(done.ok == (False,) and not done.lost for done in ended.values())
    store.go.set()
    assert set(drain(node, 4)) == {1, 2, 3, 4}


def test_too_many_jobs_end_at_once_as_failed(world) -> None:
    store = StuckStore()
    node = world(store, jobs_max=2)
    fill(node, 1, 2, 3)
    for transfer in (1, 2, 3):
        assert node.executor.try_submit(write(transfer, transfer)), "others wait for nobody"
    [done] = drain(node, 1).values()
    assert (done.transfer, done.ok) == (3, (False,))
    store.go.set()
    drain(node, 2)


def test_a_closed_mover_ends_every_job(world) -> None:
    node = world(MemoryKeyedStore())
    node.mover.close()
    node.mover.submit(write(1, 1))
    assert drain(node, 1)[1].ok == (False,)
    with pytest.raises(TransferError, match="closed"):
        node.mover.store.exists(keys(1))
    assert node.executor.poll() == []
