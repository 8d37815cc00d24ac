"""Exact behaviour of the manager, one small story at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvstrata.core.config import Limits
from kvstrata.core.ids import Holder, SequenceHash, SessionId, SlotId
from kvstrata.core.tier import DISK, HOST
from kvstrata.manager import LowerTier, Manager
from kvstrata.policy import LruPolicy
from kvstrata.pool import Pool
from kvstrata.storage.base import StoredBlock
from kvstrata.transfer.base import EraseJob, Job, JobDone, ReadJob, SealJob, WriteJob

LIMITS = Limits(
    staging_timeout_s=5.0,
    hold_timeout_s=30.0,
    job_blocks_max=4,
    offload_blocks_in_flight_max=4,
    offload_backlog_blocks_max=2,
)
READER, WRITER = Holder(SessionId(1), "reader"), Holder(SessionId(2), "writer")


def key(number: int) -> SequenceHash:
    return SequenceHash(number.to_bytes(16, "big"))


def keys(*numbers: int) -> list[SequenceHash]:
    return [key(number) for number in numbers]


class Node:
    """A manager, its pools, and jobs that end when the test says so."""

    def __init__(self, host: int = 8, disk: int = 8, limits: Limits = LIMITS) -> None:
        self.host, self.disk = Pool(host, LruPolicy()), Pool(disk, LruPolicy())
        self.manager = Manager(self.host, [LowerTier(DISK, self.disk)], limits)
        self.counters = self.manager.counters
        self.now = 0.0

    def end(self, job: Job, *, ok: bool = True, intact: bool = True) -> None:
        if isinstance(job, EraseJob):
            self.manager.complete(JobDone(job.transfer, (ok,) * len(job.targets)))
            return
        seals = tuple((b"seal" if intact else b"evil") + name for name in job.keys)
        self.manager.complete(JobDone(job.transfer, (ok,) * len(job.slots), seals))

    def jobs(self) -> list[Job]:
        return self.manager.step(self.now)

    def drain(self) -> list[Job]:
        """Let everything end well; return the jobs that there were."""
        seen: list[Job] = []
        while jobs := self.jobs():
            for job in jobs:
                self.end(job)
            seen += jobs
        return seen

    def fill(self, *numbers: int, parent: int | None = None) -> None:
        """Store a chain and seal it; its writes to disk have not begun."""
        before = None if parent is None else key(parent)
        answer = self.manager.reserve(WRITER, before, keys(*numbers))
        self.manager.seal(WRITER, answer.slots)
        for job in self.jobs():
            self.end(job)

    def put_on_disk(self, *numbers: int) -> None:
        self.fill(*numbers)
        self.drain()
        self.manager.clear([HOST])


def stored(slot: int, number: int, parent: int | None, written: int) -> StoredBlock:
    before = None if parent is None else key(parent)
    return StoredBlock(SlotId(slot), key(number), before, b"seal" + key(number), written)


# -- restart -----------------------------------------------------------------------------------


def test_recovered_blocks_leave_oldest_first() -> None:
    node = Node(disk=4)
    node.manager.recover([stored(slot, slot + 1, None, 10 + slot) for slot in range(4)])
    assert node.counters.recovered_blocks == 4
    for expected in (1, 2, 3, 4):
        reservation = node.disk.reserve(1)
        assert reservation is not None
        assert reservation.evicted == [key(expected)]


def test_recovered_chains_leave_from_their_ends() -> None:
    node = Node(disk=4)
    blocks = [
        stored(0, 1, None, 5), stored(1, 2, 1, 6), stored(2, 3, 2, 7), stored(3, 9, None, 8),
    ]  # fmt: skip
    node.manager.recover(blocks)
    evicted = []
    for _ in range(4):
        reservation = node.disk.reserve(1)
        assert reservation is not None
        evicted += reservation.evicted
        node.disk.check()
    assert [evicted.index(key(number)) for number in (3, 2, 1)] == sorted(
        evicted.index(key(number)) for number in (1, 2, 3)
    )


def test_writes_after_a_restart_are_numbered_above_everything_before() -> None:
    node = Node()
    node.manager.recover([stored(3, 1, None, 41)], 77)
    node.fill(5, 6)
    (write,) = [job for job in node.jobs() if isinstance(job, WriteJob)]
    assert write.written == 78
    assert node.manager.written(DISK) == 79


def test_a_recovered_block_is_served_only_if_its_bytes_are_its_own() -> None:
    node = Node()
    node.manager.recover([stored(0, 1, None, 1), stored(1, 2, 1, 2)])
    assert node.manager.lookup(READER, keys(1, 2), 0.0).pending == 2
    (read,) = node.jobs()
    assert isinstance(read, ReadJob)
    good, bad = (b"seal" + key(1), b"evil" + key(2))
    node.manager.complete(JobDone(read.transfer, (True, True), (good, bad)))
    answer = node.manager.lookup(READER, keys(1, 2), 1.0)
    assert (answer.ready, answer.pending) == (1, 0)
    assert answer.why == "corrupt in disk, 1.0 s ago"
    assert node.counters.corrupt_blocks == 1
    (erase,) = node.jobs()
    assert erase == EraseJob(erase.transfer, DISK, (SlotId(1),))


# -- staging -----------------------------------------------------------------------------------


def test_a_late_read_is_given_up_and_its_slots_wait_for_its_end() -> None:
    node = Node(host=2)
    node.put_on_disk(1, 2)
    answer = node.manager.lookup(READER, keys(1, 2), 100.0)
    assert (answer.ready, answer.pending, answer.until) == (0, 2, 105.0)
    (read,) = node.jobs()
    assert node.manager.late(104.9) == []
    assert node.manager.late(105.0) == [read.transfer]
    assert node.manager.late(105.0) == [], "given up twice"
    assert node.counters.staging_timeout_blocks == 2
    late = node.manager.lookup(READER, keys(1, 2), 105.0)
    assert (late.ready, late.pending, late.why) == (0, 0, "too slow")
    assert node.host.statistics().quarantined == 2
    assert node.manager.reserve(WRITER, None, keys(7)).throttled == 1
    node.end(read)
    assert node.host.statistics().free == 2
    assert node.host.resident() == []
    assert node.manager.pending == 0


def test_one_read_serves_everyone_who_waits() -> None:
    node = Node()
    node.put_on_disk(1)
    other = Holder(SessionId(1), "other")
    for holder in (READER, other):
        assert node.manager.lookup(holder, keys(1), 0.0).pending == 1
    (read,) = node.jobs()
    node.end(read)
    for holder in (READER, other):
        assert node.manager.acquire(holder, keys(1), 1.0).staged == {DISK: 1}
    assert node.counters.hit_blocks_staged == 2


def test_acquiring_twice_counts_once() -> None:
    node = Node()
    node.fill(1, 2)
    for _ in range(2):
        assert len(node.manager.acquire(READER, keys(1, 2), 0.0).slots) == 2
    assert node.counters.hit_blocks_host == 2


def test_blocks_of_a_request_that_never_comes_back_are_let_go() -> None:
    node = Node()
    node.fill(1)
    node.manager.lookup(READER, keys(1), 0.0)
    node.now = 29.9
    node.drain()
    assert (node.manager.holds, node.counters.expired_holds) == (1, 0)
    node.now = 30.0
    node.drain()
    assert (node.manager.holds, node.counters.expired_holds) == (0, 1)
    assert node.host.statistics().in_use == 0


def test_a_key_stored_again_after_a_clear_is_held_in_its_new_slot() -> None:
    """A hold that remembered keys would take the new copy for the one it holds already."""
    node = Node(host=2)
    node.fill(1)
    old = node.manager.acquire(READER, keys(1), 0.0).slots
    node.manager.clear([HOST])
    node.fill(1)
    new = node.manager.acquire(READER, keys(1), 0.0).slots
    assert new != old
    node.drain()
    assert node.manager.reserve(WRITER, None, keys(8)).slots == [], "a slot that is being read"
    node.manager.release(READER)
    assert len(node.manager.reserve(WRITER, None, keys(8, 9)).slots) == 2


# -- storing -----------------------------------------------------------------------------------


def test_a_throttled_reserve_keeps_the_leading_part() -> None:
    node = Node(host=4)
    node.fill(1, 2)
    node.manager.acquire(READER, keys(1, 2), 0.0)
    answer = node.manager.reserve(WRITER, key(2), keys(3, 4, 5))
    assert answer.indices == [0, 1]
    assert (len(answer.slots), answer.throttled) == (2, 1)
    assert node.counters.throttled_reserve_blocks == 1


def test_what_is_kept_or_coming_is_not_given_out_again() -> None:
    node = Node()
    node.fill(1)
    assert node.manager.reserve(WRITER, None, keys(1, 2)).indices == [1]
    again = node.manager.reserve(READER, None, keys(1, 2, 3))
    assert (again.indices, again.throttled) == ([2], 0)


def test_a_block_that_arrives_from_disk_while_it_is_stored_is_a_duplicate() -> None:
    node = Node()
    node.put_on_disk(1)
    node.manager.lookup(READER, keys(1), 0.0)
    (read,) = node.jobs()
    answer = node.manager.reserve(WRITER, None, keys(1))
    node.end(read)
    node.manager.seal(WRITER, answer.slots)
    node.drain()
    assert node.counters.duplicate_blocks == 1
    assert node.host.statistics().free == 7


def test_sealing_what_was_cleared_meanwhile_frees_it() -> None:
    node = Node()
    answer = node.manager.reserve(WRITER, None, keys(1))
    node.manager.clear([HOST, DISK])
    node.manager.seal(WRITER, answer.slots)
    assert node.drain() == []
    assert node.host.statistics().free == 8


def test_a_refused_seal_changes_nothing() -> None:
    node = Node()
    answer = node.manager.reserve(WRITER, None, keys(1, 2))
    before = node.host.statistics(), replace(node.counters)
    for slots in ([*answer.slots, SlotId(7)], [answer.slots[0]] * 2):
        with pytest.raises(ValueError, match="slots"):
            node.manager.seal(WRITER, slots)
    with pytest.raises(ValueError, match="slots"):
        node.manager.abort(READER, answer.slots)
    assert (node.host.statistics(), replace(node.counters)) == before
    node.manager.seal(WRITER, answer.slots)
    assert [type(job) for job in node.jobs()] == [SealJob]


def test_slots_of_a_closed_session_wait_for_its_process_to_end() -> None:
    node = Node(host=2)
    node.manager.reserve(WRITER, None, keys(1, 2))
    assert node.manager.session_closed(WRITER.session)
    assert node.manager.reserve(READER, None, keys(3)).throttled == 1
    node.manager.session_dead(WRITER.session)
    assert len(node.manager.reserve(READER, None, keys(3, 4)).slots) == 2


def test_a_session_that_fills_nothing_leaves_nothing_to_wait_for() -> None:
    assert not Node().manager.session_closed(WRITER.session)


# -- writing to disk ---------------------------------------------------------------------------


def test_what_does_not_fit_the_backlog_is_counted() -> None:
    node = Node()
    node.fill(1, 2, 3, 4)
    assert node.manager.pending == 2
    assert node.counters.throttled_write_blocks == 2
    node.drain()
    assert node.disk.resident() == keys(1, 2)


def test_a_block_that_left_the_host_before_its_turn_is_not_written() -> None:
    node = Node()
    node.fill(1)
    node.manager.clear([HOST])
    assert node.drain() == []
    assert node.disk.resident() == []


def test_a_failed_write_is_counted_and_the_block_stays_in_the_host() -> None:
    node = Node()
    node.fill(1)
    (write,) = node.jobs()
    node.end(write, ok=False)
    assert node.counters.write_failed_blocks == 1
    assert node.host.resident() == keys(1)
    assert node.disk.statistics().free == 8


def test_a_write_from_before_a_clear_is_erased_and_a_new_one_is_made() -> None:
    node = Node()
    node.fill(1)
    (old,) = node.jobs()
    node.manager.clear([HOST, DISK])
    node.fill(1)
    node.end(old)
    kinds = [type(job) for job in node.drain()]
    assert sorted(kind.__name__ for kind in kinds) == ["EraseJob", "WriteJob"]
    assert node.disk.resident() == keys(1)
    assert node.manager.pending == 0
