"""Why a block missed, and what another policy or size would have hit."""

from __future__ import annotations

import numpy as np
import pytest

from kvstrata.core.config import Limits
from kvstrata.core.ids import Holder, SequenceHash, SessionId
from kvstrata.core.tier import DISK, HOST
from kvstrata.manager import LowerTier, Manager, explain
from kvstrata.manager.explain import Departure, Departures, Gauges
from kvstrata.policy import make_policy, policy_names
from kvstrata.pool import Pool
from kvstrata.transfer.base import EraseJob, JobDone, ReadJob, SealJob, WriteJob


def key(number: int) -> SequenceHash:
    return SequenceHash(number.to_bytes(16, "big"))


class Node:
    """A manager that does at once what it decides; `bad` kinds of jobs fail."""

    def __init__(self, host: int = 4, disk: int = 0, policy: str = "lru") -> None:
        self.host = Pool(host, make_policy(policy))
        self.disk = Pool(disk, make_policy(policy)) if disk else None
        self.manager = Manager(
            self.host, [LowerTier(DISK, self.disk)] if self.disk else [], Limits(), policy
        )
        self.bad: set[type] = set()
        self.now, self.turn = 0.0, 0

    def work(self) -> None:
        while jobs := self.manager.step(self.now):
            for job in jobs:
                count = len(job.targets if isinstance(job, EraseJob) else job.slots)
                ok = type(job) not in self.bad
                self.manager.complete(JobDone(job.transfer, (ok,) * count, (b"",) * count))

    def holder(self) -> Holder:
        self.turn += 1
        return Holder(SessionId(1), str(self.turn))

    def store(self, *numbers: int) -> None:
        holder = self.holder()
        room = self.manager.reserve(holder, None, [key(number) for number in numbers])
        self.manager.seal(holder, room.slots)
        self.work()

    def why(self, *numbers: int) -> str:
        holder, chain = self.holder(), [key(number) for number in numbers]
        while (answer := self.manager.lookup(holder, chain, self.now)).pending:
            self.work()
        self.manager.release(holder)
        return answer.why


@pytest.mark.parametrize("policy", policy_names())
def test_an_eviction_is_told_with_its_time_and_policy(policy) -> None:
    node = Node(host=2, policy=policy)
    assert node.why(1) == "never stored"
    node.store(1)
    assert node.why(1) == ""
    node.now = 10.0
    node.manager.step(node.now)
    node.store(2, 3)
    node.now = 12.5
    assert node.why(1) == f"evicted in host by {policy}, 2.5 s ago"
    node.store(1)
    assert node.why(1) == "", "it is back, whatever happened before"


def test_each_other_reason_is_told() -> None:
    node = Node(host=2, disk=8)
    node.store(1)
    node.manager.clear([HOST, DISK])
    node.work()
    assert node.why(1).startswith("cleared in disk")
    node.store(2)
    node.store(3, 4)  # 2 is on disk only
    node.bad = {ReadJob}
    assert node.why(2).startswith("read failed in disk")
    node.bad = {SealJob}
    node.store(5)
    assert node.why(5).startswith("seal failed in host")
    node.bad = {WriteJob}
    node.store(6)
    node.store(7, 8)
    assert node.why(6).startswith("evicted in host"), "its write failed before"


def test_a_block_without_a_slot_is_told() -> None:
    node = Node(host=2)
    reader = node.holder()
    node.store(1, 2)
    node.manager.lookup(reader, [key(1), key(2)], 0.0)
    node.manager.acquire(reader, [key(1), key(2)], 0.0)
    node.store(3)
    assert node.why(3).startswith("not stored, no slot free in host")
    writer = node.holder()
    node.manager.release(reader)
    node.manager.reserve(writer, None, [key(4)])
    assert node.why(4) == "being stored"


def test_the_memory_is_bounded_and_says_so() -> None:
    departures = Departures(100)
    assert departures.why(key(0), 0.0) == "never stored"
    for number in range(1000):
        departures.note([key(number)], Departure("evicted", HOST, 0.0, "lru"))
        assert len(departures) <= 202
    assert departures.why(key(0), 0.0) == "never stored, or left too long ago to tell"
    assert departures.why(key(999), 3.0) == "evicted in host by lru, 3.0 s ago"
    for number in range(900, 1000):
        assert departures.why(key(number), 0.0).startswith("evicted"), "the last ones are certain"


def test_gauges_are_what_pools_of_those_sizes_hit() -> None:
    gauges, rng = Gauges(64, "arc"), np.random.default_rng(1)
    chains = [[key(100 * chain + place) for place in range(4)] for chain in range(60)]
    uses, hits = 0, dict.fromkeys([("lru", 64), ("arc", 64), ("arc", 32), ("arc", 128)], 0)
    pools = {each: explain.Shadow(make_policy(each[0]), each[1]) for each in hits}
    for choice in rng.zipf(1.3, 3000) % 60:
        gauges.use(chains[choice])
        uses += 4
        for each, pool in pools.items():
            hits[each] += pool.use(reversed(chains[choice]))
    rates = gauges.rates()
    assert rates["lru x1"] == hits["lru", 64] / uses
    assert rates["arc x1"] == hits["arc", 64] / uses
    assert rates["arc x0.5"] == hits["arc", 32] / uses < rates["arc x1"] < rates["arc x2"]
    assert {name.split()[0] for name in rates} == set(policy_names()) - {"auto"}


def test_gauges_of_a_large_tier_sample() -> None:
    gauges = Gauges(100_000, "auto")
    rng = np.random.default_rng(2)
    for _ in range(300):
        start = int(rng.integers(0, 50)) * 1000
        gauges.use([SequenceHash(rng.bytes(16)) for _ in range(3)])
        gauges.use([key(start + place) for place in range(200)])
    rates = gauges.rates()
    assert rates["auto x1"] > 0.7, "everything fits after its first use"
    assert Gauges(10, "lru").rates() == {}


def test_a_client_can_ask_why(connect, make_blocks) -> None:
    client = connect(tiers="host:128KiB")
    tokens, blocks = make_blocks(1, 3)
    assert client.why(tokens) == "never stored"
    client.put(tokens, blocks)
    assert client.why(tokens) == ""
    assert client.stats()["node"]["would_have_hit"]["lru x1"] >= 0
    client.clear()
    assert client.why(tokens).startswith("cleared in host")
