"""Priorities, durations, lives and the floor for the disk, one small story at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvstrata import Client, Retention
from kvstrata.core.config import Limits
from kvstrata.core.errors import CallRefusedError, ConfigError
from kvstrata.core.ids import Holder, SequenceHash, SessionId
from kvstrata.core.retention import BlockHint
from kvstrata.core.tier import DISK
from kvstrata.manager import LowerTier, Manager
from kvstrata.policy import make_policy, policy_names
from kvstrata.pool import Pool
from kvstrata.runtime import messages as wire
from kvstrata.transfer.base import EraseJob, JobDone, WriteJob


def key(number: int) -> SequenceHash:
    return SequenceHash(number.to_bytes(16, "big"))


def keys(*numbers: int) -> list[SequenceHash]:
    return [key(number) for number in numbers]


class Node:
    """A manager that does at once what it decides, unless a test wants the jobs."""

    def __init__(
        self, host: int = 4, disk: int = 0, policy: str = "lru", limits: Limits | None = None
    ) -> None:
        self.host = Pool(host, make_policy(policy))
        self.disk = Pool(disk, make_policy(policy)) if disk else None
        self.manager = Manager(
            self.host, [LowerTier(DISK, self.disk)] if self.disk else [], limits or Limits()
        )
        self.counters = self.manager.counters
        self.now, self.turn = 0.0, 0

    def complete(self, jobs) -> None:
        for job in jobs:
            count = len(job.targets if isinstance(job, EraseJob) else job.slots)
            self.manager.complete(JobDone(job.transfer, (True,) * count, (b"",) * count))

    def work(self) -> None:
        while jobs := self.manager.step(self.now):
            self.complete(jobs)
        self.host.check()
        if self.disk:
            self.disk.check()

    def holder(self) -> Holder:
        self.turn += 1
        return Holder(SessionId(1), str(self.turn))

    def reserve(self, *numbers: int, parent: int | None = None, hints=()) -> Holder:
        holder = self.holder()
        above = None if parent is None else key(parent)
        room = self.manager.reserve(holder, above, keys(*numbers), hints, self.now)
        self.manager.seal(holder, room.slots)
        return holder

    def store(self, *numbers: int, parent: int | None = None, hints=()) -> None:
        self.reserve(*numbers, parent=parent, hints=hints)
        self.work()

    def ready(self, *numbers: int) -> int:
        holder = self.holder()
        for _ in range(20):
            answer = self.manager.lookup(holder, keys(*numbers), self.now)
            if not answer.pending:
                self.manager.release(holder)
                return answer.ready
            self.work()
        raise AssertionError("pending for ever")

    def why(self, number: int) -> str:
        holder = self.holder()
        answer = self.manager.lookup(holder, keys(number), self.now)
        self.manager.release(holder)
        return answer.why


def low(priority: int = 0, **more) -> list[BlockHint]:
    return [BlockHint(0, 1, priority, **more)]


@pytest.mark.parametrize("policy", policy_names())
def test_lower_priorities_leave_first_whatever_the_policy(policy) -> None:
    node = Node(host=5, policy=policy)
    for number, priority in enumerate((60, 35, 80, 0, 36), start=1):
        node.store(number, hints=low(priority))
    gone = []
    for number in range(11, 16):
        before = set(node.host.resident())
        node.store(number, hints=low(100))
        gone += list(before - set(node.host.resident()))
    assert gone == keys(4, 2, 5, 1, 3)


def test_of_one_priority_the_least_recently_used_leaves_first() -> None:
    node = Node(host=3)
    for number in (1, 2, 3):
        node.store(number, hints=low(70))
    assert node.ready(1) == 1
    node.store(4, hints=low(70))
    assert [node.ready(number) for number in (1, 2, 3, 4)] == [1, 0, 1, 1]


def test_a_priority_ends_after_its_duration() -> None:
    node = Node(host=2)
    node.store(1, hints=low(90, duration_s=10.0))
    node.store(2)
    node.now = 9.0
    node.store(3)
    assert (node.ready(1), node.ready(2)) == (1, 0)
    node.now = 10.0
    node.work()
    node.store(4, hints=low(36))
    node.store(5, hints=low(36))
    assert node.ready(1) == 0


def test_asking_again_renews_and_may_lower() -> None:
    node = Node(host=2)
    node.store(1, hints=low(90, duration_s=10.0))
    node.now = 8.0
    node.store(1, hints=low(90, duration_s=10.0))  # it is there: only its terms change
    node.now = 15.0
    node.store(2)
    node.store(3)
    assert (node.ready(1), node.ready(2)) == (1, 0)
    node.store(1, hints=low(0))
    node.store(4)
    assert node.ready(1) == 0


def test_an_ancestor_is_kept_as_long_as_what_hangs_on_it() -> None:
    node = Node(host=4)
    node.store(1, 2, hints=low(0))
    node.store(3, parent=2, hints=low(80))
    slots = node.host.match(keys(1, 2, 3))
    assert [node.host.priority_of(slot) for slot in slots] == [80, 80, 80]
    node.store(4)
    node.store(5)
    assert (node.ready(1, 2, 3), node.ready(4)) == (3, 0)


def test_an_ancestor_falls_when_what_hangs_on_it_does() -> None:
    node = Node(host=4)
    node.store(1, 2, hints=[BlockHint(1, 1, 90, duration_s=10.0)])
    node.now = 10.0
    node.work()
    assert [node.host.priority_of(slot) for slot in node.host.match(keys(1, 2))] == [35, 35]
    node.store(1, 2, hints=[BlockHint(1, 1, 90, duration_s=10.0)])  # the terms are there already
    node.now = 20.0
    node.work()
    assert [node.host.priority_of(slot) for slot in node.host.match(keys(1, 2))] == [35, 35]


def test_a_new_block_does_not_inherit_from_the_one_before_in_its_slot() -> None:
    node = Node(host=1)
    node.store(1, hints=low(100))
    node.store(2)
    assert node.host.priority_of(node.host.match(keys(2))[0]) == 35
    node.store(1)  # nor from its own earlier copy
    assert node.host.priority_of(node.host.match(keys(1))[0]) == 35


def test_a_life_ends_to_the_moment() -> None:
    node = Node()
    node.store(1, 2, hints=[BlockHint(1, 1, ttl_s=5.0)])
    node.now = math.nextafter(5.0, 0.0)
    assert node.ready(1, 2) == 2
    node.now = 5.0
    assert node.ready(1, 2) == 1
    assert node.why(2) == "time to live ended in host, 0.0 s ago"
    assert node.counters.expired_blocks == 1
    node.now = 6.0
    node.store(2, parent=1)
    node.now = 100.0
    assert node.ready(1, 2) == 2


def test_a_life_that_ends_while_the_block_is_stored_or_read() -> None:
    node = Node()
    holder = node.reserve(1, hints=low(ttl_s=5.0))
    node.now = 6.0
    node.work()
    assert node.ready(1) == 0
    node.manager.release(holder)
    node.store(2, hints=low(ttl_s=5.0))
    reader = node.holder()
    held = node.manager.acquire(reader, keys(2), node.now)
    node.now = 20.0
    node.work()
    assert node.ready(2) == 0
    found = node.host.statistics()
    assert found.quarantined == len(held.slots) == 1  # its reader still reads
    node.manager.release(reader)
    assert node.host.statistics().free == 4


def test_a_block_with_a_life_never_stays_on_disk() -> None:
    node = Node(disk=4)
    node.store(1, 2, hints=low(ttl_s=5.0))
    assert node.disk is not None
    assert node.disk.resident() == []  # what hangs on it is of no use there either
    assert node.counters.kept_in_host_blocks == 2
    node.store(7)
    assert node.disk.resident() == keys(7)
    node.store(7, hints=low(ttl_s=5.0))
    assert node.disk.resident() == []
    assert node.ready(7) == 1
    assert node.counters.expired_blocks == 0


def test_a_life_given_during_the_write_to_disk() -> None:
    node = Node(disk=4)
    node.reserve(1)
    node.complete(node.manager.step(0.0))
    (write,) = node.manager.step(0.0)
    assert isinstance(write, WriteJob)
    node.store(1, hints=low(ttl_s=5.0))
    node.complete([write])
    node.work()
    assert node.disk is not None
    assert node.disk.resident() == []


def test_the_floor_for_the_disk_is_contiguous() -> None:
    node = Node(host=8, disk=8, limits=Limits(offload_priority_min=30))
    node.store(1, 2, 3, 4, hints=[BlockHint(1, 1, 10)])
    node.store(5, parent=4, hints=low(90))
    assert node.disk is not None
    assert node.disk.resident() == keys(1)
    assert node.counters.kept_in_host_blocks == 4


def test_a_floor_above_the_default_wants_to_be_asked() -> None:
    node = Node(host=8, disk=8, limits=Limits(offload_priority_min=50))
    node.store(1, 2)
    node.store(3, 4, hints=[BlockHint(0, 2, 50)])
    node.store(5, parent=1, hints=low(90))
    assert node.disk is not None
    assert node.disk.resident() == keys(3, 4)


def test_priorities_hold_on_disk_too() -> None:
    node = Node(host=8, disk=2)
    node.store(1, hints=low(80))
    node.store(2)
    node.store(3)
    assert node.disk is not None
    assert set(node.disk.resident()) == set(keys(1, 3))


def test_terms_of_what_is_gone_are_forgotten() -> None:
    node = Node(host=4)
    for number in range(1, 5000):
        node.store(number, hints=low(50, duration_s=1000.0))
    retaining = node.manager._retaining
    assert len(retaining) <= 2 * 4 + 1025
    assert len(retaining._dates) <= 3 * (2 * 4 + 1025)


def test_a_hint_beyond_the_chain_changes_nothing() -> None:
    node = Node()
    with pytest.raises(ValueError, match="reaches beyond the 2 blocks"):
        node.manager.reserve(node.holder(), None, keys(1, 2), [BlockHint(1, 2)], 0.0)
    assert node.host.statistics().free == 4


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"start": -1}, "start"),
        ({"start": 5, "end": 5}, "end"),
        ({"priority": 101}, "priority"),
        ({"priority": -1}, "priority"),
        ({"duration_s": 0.0}, "duration_s"),
        ({"duration_s": math.nan}, "duration_s"),
        ({"ttl_s": math.inf}, "ttl_s"),
    ],
)
def test_a_retention_out_of_range_says_which_field(values, field) -> None:
    with pytest.raises(ConfigError, match=f"retention.{field}: .* is out of range"):
        Retention(**values)


@pytest.mark.parametrize(
    ("start", "end", "first", "count"),
    [(0, None, 0, 5), (1, None, 1, 4), (64, 128, 1, 1), (64, 129, 1, 2), (0, 1, 0, 1),
     (0, 10_000, 0, 5), (1, 64, None, 0), (320, None, None, 0)],
)  # fmt: skip
def test_a_range_means_the_blocks_that_begin_in_it(start, end, first, count) -> None:
    hint = Retention(start, end, 80).hint(64, 5)
    assert (hint and (hint.first, hint.count)) == (None if first is None else (first, count))


def test_a_client_asks_and_the_daemon_keeps_to_it() -> None:
    arrays = np.arange(12, dtype="float32").reshape(3, 4)
    with Client(block_shape=(4,), dtype="float32", block_tokens=4, tiers="host:1MiB") as client:
        tokens = list(range(12))
        client.put(tokens, arrays, retention=[Retention(start=8, ttl_s=0.2)])
        assert client.lookup(tokens) == 12
        client.put(tokens, arrays, retention=[Retention(start=4, priority=90, duration_s=5.0)])
        assert client.lookup(tokens) == 12
        client.put(tokens, arrays, retention=[Retention(start=8, ttl_s=1e-6)])
        with pytest.raises(ValueError, match="1025 ranges, at most 1024"):
            client.put(tokens, arrays, retention=[Retention(priority=1)] * 1025)
        assert client.lookup(tokens) == 8
        assert client.why(tokens).startswith("time to live ended in host")
        assert client.stats()["node"]["counters"]["expired_blocks"] == 1
        message = wire.Reserve("r", b"", key(1), [BlockHint(0, 2)])
        with pytest.raises(CallRefusedError, match="reaches beyond the 1 blocks"):
            client._session.call(message, wire.Reserved)
        assert client.lookup(tokens) == 8


def test_a_parent_that_comes_back_is_kept_like_the_orphan_behind_it() -> None:
    node = Node()
    node.store(1, 2, hints=[BlockHint(0, 1, ttl_s=3.0), BlockHint(1, 1, 90)])
    node.now += 4.0
    node.work()
    assert node.host.resident() == keys(2)
    node.store(1, 2)
    (slot,) = node.host.match(keys(1))
    assert node.host.priority_of(slot) == 90
