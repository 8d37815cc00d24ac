"""Leases: kept until they end, renewed, bounded, ended by a clear."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvstrata import Client
from kvstrata.core.config import Limits
from kvstrata.core.errors import CallRefusedError
from kvstrata.core.ids import Holder, SequenceHash, SessionId
from kvstrata.core.tier import HOST
from kvstrata.manager import Manager
from kvstrata.policy import LruPolicy
from kvstrata.pool import Pool
from kvstrata.transfer.base import JobDone

LESSEE, OTHER = Holder(SessionId(1), "lease"), Holder(SessionId(2), "lease")


def keys(*numbers: int) -> list[SequenceHash]:
    return [SequenceHash(number.to_bytes(16, "big")) for number in numbers]


class Node:
    def __init__(self, host: int = 8) -> None:
        self.host = Pool(host, LruPolicy())
        self.manager = Manager(self.host, [], Limits())
        self.turn = 0

    def store(self, *numbers: int, now: float = 0.0) -> int:
        self.turn += 1
        holder = Holder(SessionId(3), str(self.turn))
        room = self.manager.reserve(holder, None, keys(*numbers), (), now)
        self.manager.seal(holder, room.slots)
        for job in self.manager.step(now):
            count = len(job.slots)
            self.manager.complete(JobDone(job.transfer, (True,) * count, (b"",) * count))
        self.host.check()
        return len(room.slots)

    def kept(self, *numbers: int) -> int:
        return len(self.host.match(keys(*numbers)))


def test_a_leased_block_stays_until_its_lease_ends() -> None:
    node = Node()
    node.store(1, 2)
    assert node.manager.lease(LESSEE, keys(1, 2, 3), 10.0, 0.0) == 2
    for number in range(100, 130):
        node.store(number, now=math.nextafter(10.0, 0.0))
    assert node.kept(1, 2) == 2
    assert (node.manager.leases, node.manager.leased) == (1, 2)
    node.manager.step(10.0)
    assert (node.manager.leases, node.manager.leased) == (0, 0)
    for number in range(130, 140):
        node.store(number, now=10.0)
    assert node.kept(1, 2) == 0


def test_the_same_holder_renews_and_ends_its_lease() -> None:
    node = Node()
    node.store(1)
    node.manager.lease(LESSEE, keys(1), 10.0, 0.0)
    assert node.manager.lease(LESSEE, keys(1), 10.0, 9.0) == 1
    node.manager.step(18.0)
    assert node.manager.leases == 1
    assert node.manager.lease(LESSEE, keys(1), 0.0, 18.0) == 0
    assert node.manager.leases == node.manager.leased == 0
    assert node.host.statistics().in_use == 0


def test_two_leases_on_a_block_end_one_by_one() -> None:
    node = Node()
    node.store(1)
    node.manager.lease(LESSEE, keys(1), 20.0, 0.0)
    node.manager.lease(OTHER, keys(1), 10.0, 0.0)
    node.manager.step(15.0)
    assert (node.manager.leases, node.manager.leased) == (1, 1)
    node.manager.step(20.0)
    assert node.manager.leased == 0


def test_leases_never_fill_the_tier() -> None:
    node = Node()
    node.store(*range(1, 9))
    assert node.manager.lease(LESSEE, keys(*range(1, 9)), 60.0, 0.0) == 4
    assert node.manager.counters.throttled_lease_blocks == 4
    assert node.manager.lease(OTHER, keys(*range(1, 9)), 60.0, 0.0) == 4  # the same four
    assert node.manager.leased == 4
    assert node.store(*range(11, 19)) == 4


@pytest.mark.parametrize("seconds", [-1.0, 3600.1, math.inf, math.nan])
def test_a_time_out_of_range_changes_nothing(seconds) -> None:
    node = Node()
    node.store(1)
    node.manager.lease(LESSEE, keys(1), 10.0, 0.0)
    with pytest.raises(ValueError, match=r"seconds: .* is outside 0 to 3600"):
        node.manager.lease(LESSEE, keys(1), seconds, 0.0)
    assert node.manager.leased == 1


def test_a_lease_outlives_its_session_and_not_a_clear() -> None:
    node = Node()
    node.store(1)
    node.manager.lease(LESSEE, keys(1), 10.0, 0.0)
    node.manager.session_dead(LESSEE.session)
    assert node.manager.leases == 1
    node.manager.clear([HOST])
    assert node.manager.leases == 0
    assert node.host.statistics().free == 8


def test_a_client_leases() -> None:
    arrays = np.arange(8, dtype="float32").reshape(2, 4)
    with Client(block_shape=(4,), dtype="float32", block_tokens=4, tiers="host:1MiB") as client:
        tokens = list(range(8))
        assert client.lease(tokens, 5.0) == 0
        client.put(tokens, arrays)
        assert client.lease(tokens, 0.2) == 8
        assert client.lease(tokens, 5.0) == 8
        assert client.stats()["node"]["leased_blocks"] == 2
        for seconds in (4000.0, -1.0, math.nan):
            with pytest.raises(CallRefusedError, match="is outside 0 to 3600"):
                client.lease(tokens, seconds)
        assert client.stats()["node"]["leased_blocks"] == 2
        assert client.stats()["node"]["holds"] == 0
        assert client.lease(tokens, 0.0) == 0
        assert client.stats()["node"]["leased_blocks"] == 0
        assert client.lease([1, 2], 5.0) == 0
