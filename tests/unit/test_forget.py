"""Forgetting a prefix: the block, all behind it, and nothing else, wherever they are or go."""

from __future__ import annotations

import numpy as np
import pytest

from kvstrata import Client
from kvstrata.core.config import Limits
from kvstrata.core.ids import Holder, SequenceHash, SessionId
from kvstrata.core.tier import DISK, HOST
from kvstrata.manager import LowerTier, Manager
from kvstrata.policy import LruPolicy
from kvstrata.pool import Pool
from kvstrata.transfer.base import EraseJob, JobDone, ReadJob, SealJob, WriteJob


def key(number: int) -> SequenceHash:
    return SequenceHash(number.to_bytes(16, "big"))


def keys(*numbers: int) -> list[SequenceHash]:
    return [key(number) for number in numbers]


class Node:
    def __init__(self) -> None:
        self.host, self.disk = Pool(16, LruPolicy()), Pool(16, LruPolicy())
        self.manager = Manager(self.host, [LowerTier(DISK, self.disk)], Limits(job_blocks_max=4))
        self.turn = 0

    def holder(self) -> Holder:
        self.turn += 1
        return Holder(SessionId(1), str(self.turn))

    def complete(self, jobs) -> None:
        for job in jobs:
            count = len(job.targets if isinstance(job, EraseJob) else job.slots)
            self.manager.complete(JobDone(job.transfer, (True,) * count, (b"",) * count))

    def work(self, until: type | None = None):
        """Carry out jobs; with `until` stop before the first batch that has one of that kind."""
        while jobs := self.manager.step(0.0):
            if until and any(isinstance(job, until) for job in jobs):
                return jobs
            self.complete(jobs)
        self.host.check()
        self.disk.check()
        return []

    def store(self, *numbers: int, parent: int | None = None) -> None:
        holder = self.holder()
        above = None if parent is None else key(parent)
        room = self.manager.reserve(holder, above, keys(*numbers))
        self.manager.seal(holder, room.slots)

    def kept(self) -> tuple[set[int], set[int]]:
        return tuple(
            {int.from_bytes(each, "big") for each in pool.resident()}
            for pool in (self.host, self.disk)
        )  # type: ignore[return-value]


def test_a_block_and_all_behind_it_and_nothing_else() -> None:
    node = Node()
    node.store(1, 2, 3)
    node.work()
    node.store(4, 5, parent=2)
    node.store(9)
    node.work()
    assert node.manager.forget(key(3)) == 2
    assert node.manager.forget(key(2)) == 6
    assert node.kept() == ({1, 9}, {1, 9})
    node.work()
    assert node.manager.forget(key(2)) == 0
    assert node.host.statistics().free == node.disk.statistics().free == 14
    found = node.manager.lookup(node.holder(), keys(1, 2), 0.0)
    assert (found.ready, found.why) == (1, "cleared in disk, 0.0 s ago")


def test_behind_a_block_that_is_gone_itself() -> None:
    node = Node()
    node.store(1, 2, 3)
    node.work()
    node.host.withdraw(keys(1))
    node.disk.withdraw(keys(1))
    assert node.manager.forget(key(1)) == 4
    assert node.kept() == (set(), set())


@pytest.mark.parametrize("kind", [SealJob, WriteJob])
def test_what_is_on_its_way_does_not_arrive(kind) -> None:
    node = Node()
    node.store(1, 2)
    jobs = node.work(until=kind)
    node.manager.forget(key(1))
    node.complete(jobs)
    node.work()
    assert node.kept() == (set(), set())
    node.store(1, 2)  # and can be stored again
    node.work()
    assert node.kept() == ({1, 2}, {1, 2})


def test_what_is_being_written_and_has_left_the_host() -> None:
    node = Node()
    node.store(1, 2)
    jobs = node.work(until=WriteJob)
    node.manager.clear([HOST])
    node.manager.forget(key(1))
    node.complete(jobs)
    node.work()
    assert node.kept() == (set(), set())


def test_what_is_being_filled_does_not_arrive() -> None:
    node = Node()
    holder = node.holder()
    room = node.manager.reserve(holder, None, keys(1, 2))
    node.manager.forget(key(1))
    node.store(1)
    node.manager.seal(holder, room.slots)
    node.work()
    assert node.kept() == ({1}, {1})
    assert node.host.statistics().free == 15


def test_what_is_being_read_does_not_arrive() -> None:
    node = Node()
    node.store(1, 2)
    node.work()
    node.host.withdraw(keys(1, 2))
    reader = node.holder()
    node.manager.lookup(reader, keys(1, 2), 0.0)
    jobs = node.work(until=ReadJob)
    assert node.manager.forget(key(2)) == 1
    node.complete(jobs)
    node.work()
    assert node.kept()[0] <= {1}
    assert node.kept()[1] == {1}


def test_a_client_forgets_its_own() -> None:
    arrays = np.ones((3, 4), "float32")
    with Client(block_shape=(4,), dtype="float32", block_tokens=4, tiers="host:1MiB") as client:
        tokens = list(range(12))
        client.put(tokens, arrays)
        settings = {"block_shape": (4,), "dtype": "float32", "block_tokens": 4}
        with Client(**settings, address=client.address, salt="other") as other:
            other.put(tokens, arrays)
            assert client.forget(tokens[:8]) == 2
            assert (client.lookup(tokens), other.lookup(tokens)) == (4, 12)
            assert client.forget([1, 2]) == 0


def test_a_block_whose_parent_is_gone_goes_too() -> None:
    """It may have hung on the forgotten one, and would be found once its parent is back."""
    node = Node()
    node.store(1, 2, 3)
    node.work()
    node.host.withdraw(keys(2))
    node.disk.withdraw(keys(2))
    assert node.manager.forget(key(1)) == 4
    assert node.kept() == (set(), set())
