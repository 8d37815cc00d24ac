"""The cost model at work in the manager: what is loaded, what is left, and what is said of it."""

from __future__ import annotations

import pytest

from kvstrata.core.config import Limits
from kvstrata.core.ids import Holder, SequenceHash, SessionId
from kvstrata.core.tier import DISK, HOST
from kvstrata.manager import Costs, EngineSpeed, LowerTier, Manager
from kvstrata.policy import LruPolicy
from kvstrata.pool import Pool
from kvstrata.transfer.base import EraseJob, Job, JobDone, ReadJob

BLOCK_TOKENS = 64
SLOW_READ_S = 1.0
FAST_ENGINE = EngineSpeed(10_000.0, 0.0)  # a block in 6 ms
SLOW_ENGINE = EngineSpeed(10.0, 0.0)  # a block in 6 s


def keys(*numbers: int) -> list[SequenceHash]:
    return [SequenceHash(number.to_bytes(16, "big")) for number in numbers]


class Node:
    """A manager over a disk that takes `read_s` for each read."""

    def __init__(self, *, weigh: bool = True, read_s: float = SLOW_READ_S) -> None:
        self.host, self.disk = Pool(64, LruPolicy()), Pool(64, LruPolicy())
        self.costs = Costs(BLOCK_TOKENS, 1 << 20, probe_interval_s=10.0) if weigh else None
        limits = Limits(staging_timeout_s=20.0, job_blocks_max=4)
        lower = [LowerTier(DISK, self.disk)]
        self.manager = Manager(self.host, lower, limits, costs=self.costs)
        self.counters = self.manager.counters
        self.read_s, self.now, self.turn = read_s, 0.0, 0
        self.reads = 0

    def holder(self, session: int = 1) -> Holder:
        self.turn += 1
        return Holder(SessionId(session), str(self.turn))

    def end(self, job: Job) -> None:
        if isinstance(job, ReadJob):
            self.reads += len(job.slots)
            self.now += self.read_s
        count = len(job.targets if isinstance(job, EraseJob) else job.slots)
        self.manager.late(self.now)
        self.manager.complete(JobDone(job.transfer, (True,) * count, (b"",) * count))

    def work(self) -> None:
        while jobs := self.manager.step(self.now):
            for job in jobs:
                self.end(job)

    def store(self, *numbers: int) -> None:
        holder = self.holder()
        answer = self.manager.reserve(holder, None, keys(*numbers), (), self.now)
        self.manager.seal(holder, answer.slots)
        self.work()

    def ask(self, *numbers: int, engine: EngineSpeed = FAST_ENGINE, session: int = 1):
        """Look until there is an answer, then let go."""
        holder = self.holder(session)
        while True:
            answer = self.manager.lookup(holder, keys(*numbers), self.now, engine=engine)
            if not answer.pending:
                self.manager.release(holder)
                return answer
            self.work()

    def learn(self) -> None:
        """Read four times, so that the disk is known."""
        for number in range(100, 104):
            self.store(number)
            self.manager.clear([HOST])
            assert self.ask(number, engine=EngineSpeed(0.0, 0.0)).ready == 1
            self.manager.clear([HOST, DISK])
            self.work()
        self.reads = 0


def test_what_is_computed_faster_is_left_where_it_is_and_the_reason_has_the_numbers() -> None:
    node = Node()
    node.learn()
    node.store(1, 2, 3)
    node.manager.clear([HOST])
    answer = node.ask(1, 2, 3)
    assert (answer.ready, node.reads) == (0, 0)
    assert answer.why.startswith("too slow to be worth it: 3 blocks of disk not loaded")
    assert "prefill 10,000 tokens/s" in answer.why
    assert node.counters.not_worth_loading_blocks == 3


def test_what_is_computed_slower_is_loaded() -> None:
    node = Node()
    node.learn()
    node.store(1, 2, 3)
    node.manager.clear([HOST])
    answer = node.ask(1, 2, 3, engine=SLOW_ENGINE)
    assert (answer.ready, answer.why) == (3, "")
    assert node.counters.not_worth_loading_blocks == 0


def test_of_a_hit_the_part_in_the_host_is_taken() -> None:
    node = Node()
    node.learn()
    node.store(1, 2, 3, 4)
    node.host.withdraw(keys(3, 4))
    answer = node.ask(1, 2, 3, 4)
    assert (answer.ready, node.reads) == (2, 0)
    assert "2 blocks of disk not loaded" in answer.why


@pytest.mark.parametrize("engine", [EngineSpeed(0.0, 0.0), EngineSpeed(0.0, 1e9)])
def test_for_an_engine_of_unknown_speed_all_is_loaded(engine) -> None:
    node = Node()
    node.learn()
    node.store(1, 2)
    node.manager.clear([HOST])
    assert node.ask(1, 2, engine=engine).ready == 2


def test_a_tier_of_unknown_speed_is_read() -> None:
    node = Node()
    node.store(1, 2)
    node.manager.clear([HOST])
    assert node.ask(1, 2).ready == 2


def test_without_a_cost_model_all_is_loaded() -> None:
    node = Node(weigh=False)
    node.learn()
    node.store(1, 2)
    node.manager.clear([HOST])
    assert node.ask(1, 2).ready == 2
    assert node.manager.costs() == {}


def test_a_request_is_decided_once() -> None:
    node = Node()
    node.learn()
    node.store(1, 2)
    node.manager.clear([HOST])
    holder = node.holder()
    first = node.manager.lookup(holder, keys(1, 2), node.now, engine=FAST_ENGINE)
    again = node.manager.lookup(holder, keys(1, 2), node.now + 1.0, engine=SLOW_ENGINE)
    assert first.why == again.why
    assert (again.ready, again.pending) == (0, 0)
    assert node.counters.not_worth_loading_blocks == 2, "counted once"
    assert node.manager.acquire(holder, keys(1, 2)[: again.ready], node.now).slots == []


def test_after_a_pause_a_few_blocks_are_read_for_nobody_and_a_faster_tier_is_found() -> None:
    node = Node()
    node.learn()
    numbers = range(1, 41)
    node.store(*numbers)
    node.manager.clear([HOST])
    assert node.ask(*numbers).ready == 0
    node.read_s = 0.001
    for _ in range(8):
        node.now += 11.0
        before = node.reads
        answer = node.ask(*numbers)
        if answer.ready > 16:
            break
        node.work()
        assert 0 < node.reads - before <= 16, "a probe, and nobody waited"
        node.manager.clear([HOST])
    assert answer.ready == 40


def test_nobody_holds_what_a_probe_brings() -> None:
    node = Node()
    node.learn()
    node.store(1, 2)
    node.manager.clear([HOST])
    node.now += 11.0
    holder = node.holder()
    assert node.manager.lookup(holder, keys(1, 2), node.now, engine=FAST_ENGINE).ready == 0
    node.work()
    assert node.reads == 2
    assert node.host.statistics().in_use == 0


def test_what_a_client_said_ends_with_its_session() -> None:
    node = Node()
    node.ask(1, session=7)
    assert [each["session"] for each in node.manager.costs()["engines"]] == [7]
    node.manager.session_dead(SessionId(7))
    assert node.manager.costs()["engines"] == []


def test_reads_and_writes_that_wait_are_a_queue() -> None:
    node = Node()
    holder = node.holder()
    answer = node.manager.reserve(holder, None, keys(1, 2, 3))
    node.manager.seal(holder, answer.slots)
    (seal,) = node.manager.step(0.0)
    node.end(seal)
    (write,) = node.manager.step(0.0)
    assert node.manager.costs()["tiers"]["disk"]["queue_blocks"] == 3
    node.end(write)
    assert node.manager.costs()["tiers"]["disk"]["queue_blocks"] == 0
