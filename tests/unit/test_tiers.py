"""Tiers below the host, one small story at a time: what enters them, and by which way."""

from __future__ import annotations

import pytest

from kvstrata.core.config import Limits
from kvstrata.core.ids import Holder, SequenceHash, SessionId
from kvstrata.core.retention import BlockHint
from kvstrata.core.tier import DISK, HOST, Admission, TierName
from kvstrata.manager import LowerTier, Manager
from kvstrata.policy import LruPolicy, UseCounts
from kvstrata.pool import Pool
from kvstrata.transfer.base import EraseJob, Job, JobDone, ReadJob, SealJob, WriteJob

DISK2 = TierName("disk2")
THROUGH, ON_EVICT, FREQUENCY = Admission


def key(number: int) -> SequenceHash:
    return SequenceHash(number.to_bytes(16, "big"))


def keys(*numbers: int) -> list[SequenceHash]:
    return [key(number) for number in numbers]


class Node:
    """A manager whose jobs end at once unless a test takes them."""

    def __init__(
        self, host: int = 8, *lower: tuple[int, Admission], bypass=False, **limits
    ) -> None:
        self.host = Pool(host, LruPolicy())
        self.lower = [
            LowerTier(name, Pool(slots, LruPolicy()), admission)
            for name, (slots, admission) in zip((DISK, DISK2), lower, strict=False)
        ]
        settings = {"job_blocks_max": 4, "demote_share": 0.5, "relay_blocks_max": 4} | limits
        self.manager = Manager(self.host, self.lower, Limits(**settings), bypass=bypass)
        self.counters = self.manager.counters
        self.now, self.turn = 0.0, 0
        self.seen: list[Job] = []

    def end(self, job: Job, *, ok: bool = True) -> None:
        count = len(job.targets if isinstance(job, EraseJob) else job.slots)
        self.manager.complete(JobDone(job.transfer, (ok,) * count, (b"",) * count))

    def work(self) -> None:
        while jobs := self.manager.step(self.now):
            for job in jobs:
                self.end(job)
            self.seen += jobs
        for pool in (self.host, *(tier.pool for tier in self.lower)):
            pool.check()

    def holder(self) -> Holder:
        self.turn += 1
        return Holder(SessionId(1), str(self.turn))

    def fill(self, *numbers: int, hints=()):
        """Store a chain up to its seals; return the answer."""
        holder = self.holder()
        answer = self.manager.reserve(holder, None, keys(*numbers), hints, self.now)
        self.manager.seal(holder, answer.slots)
        return answer

    def store(self, *numbers: int, hints=()) -> None:
        self.fill(*numbers, hints=hints)
        self.work()

    def use(self, *numbers: int) -> dict[TierName, int]:
        """Load a chain as an engine does; return what was staged, by tier."""
        holder = self.holder()
        while self.manager.lookup(holder, keys(*numbers), self.now).pending:
            self.work()
        staged = self.manager.acquire(holder, keys(*numbers), self.now).staged
        self.manager.release(holder)
        self.work()
        return staged

    def on(self, tier: TierName) -> set[int]:
        (pool,) = [each.pool for each in self.lower if each.name == tier]
        return {int.from_bytes(each, "big") for each in pool.resident()}

    @property
    def in_host(self) -> set[int]:
        return {int.from_bytes(each, "big") for each in self.host.resident()}


# -- write-through ---------------------------------------------------------------------------------


def test_every_block_goes_through_all_tiers() -> None:
    node = Node(8, (8, THROUGH), (8, THROUGH))
    node.store(1, 2, 3)
    assert node.on(DISK) == node.on(DISK2) == {1, 2, 3}
    assert node.counters.written_blocks == 6
    assert node.counters.relayed_blocks == 0, "the host had them"


def test_a_hit_comes_from_the_nearest_tier_and_enters_those_above_it() -> None:
    node = Node(8, (8, THROUGH), (8, THROUGH))
    node.store(1, 2)
    node.manager.clear([HOST])
    assert node.use(1, 2) == {DISK: 2}
    node.manager.clear([HOST, DISK])
    node.work()
    assert node.use(1, 2) == {DISK2: 2}
    assert node.in_host == node.on(DISK) == {1, 2}
    assert (node.lower[0].hit_blocks, node.lower[1].hit_blocks) == (2, 2)
    assert node.counters.hit_blocks_staged == 4


def test_one_lookup_stages_from_several_tiers() -> None:
    node = Node(8, (8, THROUGH), (8, THROUGH))
    node.store(1, 2, 3, 4)
    node.manager.clear([HOST])
    node.manager.forget(key(3))
    node.work()
    node.store(1, 2, 3, 4)
    node.lower[0].pool.withdraw(keys(3, 4))
    node.host.withdraw(keys(2, 3, 4))
    assert node.use(1, 2, 3, 4) == {DISK: 1, DISK2: 2}


def test_a_copy_that_is_damaged_is_withdrawn_and_the_next_tier_asked() -> None:
    node = Node(8, (8, THROUGH), (8, THROUGH))
    node.store(1)
    node.manager.clear([HOST])
    node.lower[0].seals = [b"another seal"] * 8
    assert node.use(1) == {DISK2: 1}
    assert node.counters.corrupt_blocks == 1


def test_what_the_host_lost_is_relayed_from_the_tier_above() -> None:
    node = Node(8, (8, THROUGH), (8, THROUGH))
    node.fill(1, 2)
    for job in node.manager.step(0.0):
        node.end(job)
    (write,) = node.manager.step(0.0)
    assert isinstance(write, WriteJob)
    node.manager.clear([HOST])
    node.end(write)
    (read,) = node.manager.step(0.0)
    assert isinstance(read, ReadJob)
    assert read.tier == DISK
    node.end(read)
    assert node.in_host == set(), "nobody asked for them there"
    node.work()
    assert node.on(DISK2) == {1, 2}
    assert node.counters.relayed_blocks == 2
    assert node.host.statistics().free == 8


def test_a_relay_that_finds_no_host_slot_is_counted() -> None:
    node = Node(2, (8, THROUGH), (8, THROUGH))
    node.fill(1, 2)
    for job in node.manager.step(0.0):
        node.end(job)
    (write,) = node.manager.step(0.0)
    node.manager.clear([HOST])
    node.end(write)
    node.fill(7, 8)  # and is not sealed yet: every host slot is held
    assert [type(job) for job in node.manager.step(0.0)] == [SealJob]
    assert node.counters.throttled_relay_blocks == 2
    assert node.on(DISK2) == set()


@pytest.mark.parametrize("cleared", [[DISK], [DISK2], [HOST, DISK, DISK2]])
def test_what_is_relayed_does_not_cross_a_clear(cleared) -> None:
    node = Node(8, (8, THROUGH), (8, THROUGH))
    node.fill(1, 2)
    for job in node.manager.step(0.0):
        node.end(job)
    (write,) = node.manager.step(0.0)
    node.manager.clear([HOST])
    node.end(write)
    (read,) = node.manager.step(0.0)
    node.manager.clear(cleared)
    node.end(read)
    node.work()
    assert node.on(DISK2) == set()
    assert node.host.statistics().free == 8
    assert node.manager.pending == 0


# -- on evict --------------------------------------------------------------------------------------


def test_blocks_are_written_when_they_are_about_to_leave_and_stay_findable() -> None:
    node = Node(8, (8, ON_EVICT))
    node.store(1, 2, 3, 4)
    assert node.on(DISK) == set(), "half of the host is free"
    node.store(11, 12)
    assert node.on(DISK) == {3, 4}, "the ends of the coldest chain"
    assert node.in_host == {1, 2, 3, 4, 11, 12}
    node.store(21, 22, 23, 24)
    assert node.in_host == {1, 2, 11, 12, 21, 22, 23, 24}
    assert node.on(DISK) == {1, 2, 3, 4, 11, 12}, "half of the host is ready to go"
    assert node.counters.evicted_unwritten_blocks == 0


def test_a_block_given_up_ahead_that_is_used_stays() -> None:
    node = Node(8, (8, ON_EVICT))
    node.store(1, 2, 3, 4)
    node.store(11, 12)
    assert node.use(1, 2, 3, 4) == {}, "all from the host"
    node.store(21, 22)
    assert {1, 2, 3, 4} <= node.in_host
    node.store(31, 32)
    assert {1, 2, 3, 4} <= node.in_host, "the others were colder"


def test_a_block_that_is_below_already_is_not_written_again() -> None:
    node = Node(4, (8, ON_EVICT))
    node.store(1, 2)
    node.store(3, 4)
    node.store(5, 6)
    assert node.use(1, 2) == {DISK: 2}
    written = node.counters.written_blocks
    node.store(7, 8)
    node.store(9, 10)
    again = [job for job in node.seen if isinstance(job, WriteJob)]
    assert sum(key(1) in job.keys for job in again) == 1
    assert node.counters.written_blocks > written


def test_more_than_was_given_up_ahead_is_evicted_unwritten_and_counted() -> None:
    node = Node(4, (8, ON_EVICT))
    node.store(1, 2, 3, 4)
    node.store(5, 6, 7, 8)
    assert node.on(DISK) == {3, 4} | {7, 8}
    assert node.counters.evicted_unwritten_blocks == 2


def test_a_failed_write_lets_its_block_go() -> None:
    node = Node(4, (8, ON_EVICT))
    node.fill(1, 2, 3, 4)
    (seal,) = node.manager.step(0.0)
    node.end(seal)
    (write,) = node.manager.step(0.0)
    node.end(write, ok=False)
    node.work()
    assert node.counters.write_failed_blocks == 2
    assert node.host.statistics().in_use == 0
    node.store(5, 6, 7, 8)
    assert node.in_host == {5, 6, 7, 8}


def test_what_leaves_the_first_disk_is_relayed_to_the_second() -> None:
    node = Node(4, (4, THROUGH), (16, ON_EVICT))
    for first in range(0, 40, 2):
        node.store(first + 1, first + 2)
    assert node.counters.relayed_blocks > 0
    assert len(node.on(DISK2)) >= 12
    assert node.use(31, 32) == {DISK2: 2}


def test_blocks_that_may_not_go_below_are_given_up_without_a_write() -> None:
    node = Node(4, (8, ON_EVICT), offload_priority_min=20)
    node.store(1, 2, hints=[BlockHint(0, 2, 10)])
    node.store(3, 4)
    node.store(5, 6)
    assert 1 not in node.on(DISK)
    assert node.counters.kept_in_host_blocks >= 2


# -- by frequency ----------------------------------------------------------------------------------


def test_a_block_enters_at_its_second_use() -> None:
    node = Node(8, (8, FREQUENCY))
    node.store(1, 2, 3)
    assert node.on(DISK) == set()
    node.use(1, 2)
    assert node.on(DISK) == {1, 2}


def test_a_block_that_is_computed_twice_was_used_twice() -> None:
    node = Node(4, (8, FREQUENCY))
    node.store(1, 2)
    node.manager.clear([HOST])
    node.store(1, 2)
    assert node.on(DISK) == {1, 2}


def test_the_number_of_uses_is_set() -> None:
    node = Node(8, (8, FREQUENCY), admission_uses_min=3)
    node.store(1)
    node.use(1)
    assert node.on(DISK) == set()
    node.use(1)
    assert node.on(DISK) == {1}


def test_uses_are_counted_up_to_a_bound_and_tell_at_each_doubling() -> None:
    uses = UseCounts(2)
    told = [bool(uses.note(keys(1), 2)) for _ in range(16)]
    assert [number + 1 for number, each in enumerate(told) if each] == [2, 4, 8, 16]
    for number in range(100):
        uses.note(keys(number), 2)
    assert len(uses) <= 5
    assert uses.note(keys(1), 1) == keys(1), "long forgotten, and new"


# -- host bypass -----------------------------------------------------------------------------------


def test_a_bypassed_host_keeps_blocks_until_they_are_written() -> None:
    one_by_one = {"job_blocks_max": 1, "offload_blocks_in_flight_max": 1}
    node = Node(4, (8, THROUGH), bypass=True, **one_by_one)
    node.fill(1, 2, 3, 4)
    for job in node.manager.step(0.0):
        node.end(job)
    (write,) = node.manager.step(0.0)
    refused = node.fill(5, 6)
    assert (refused.slots, refused.throttled) == ([], 2), "back-pressure, and nothing lost"
    node.end(write)
    node.work()
    node.store(5, 6)
    assert node.on(DISK) == {1, 2, 3, 4, 5, 6}
    assert node.counters.evicted_unwritten_blocks == 0
    assert node.use(1, 2, 3, 4) != {}


def test_a_bypassed_host_lets_go_what_cannot_be_written() -> None:
    node = Node(4, (8, THROUGH), bypass=True)
    node.fill(1, 2, 3, 4)
    for job in node.manager.step(0.0):
        node.end(job)
    (write,) = node.manager.step(0.0)
    node.end(write, ok=False)
    assert node.host.statistics().in_use == 0


@pytest.mark.parametrize("tiers", [[HOST], [DISK], [HOST, DISK]])
def test_a_clear_ends_what_a_bypassed_host_keeps(tiers) -> None:
    node = Node(4, (8, THROUGH), bypass=True, offload_blocks_in_flight_max=1)
    node.fill(1, 2, 3, 4)
    for job in node.manager.step(0.0):
        node.end(job)
    node.manager.clear(tiers)
    node.work()
    statistics = node.host.statistics()
    assert (statistics.in_use, statistics.quarantined) == (0, 0)
