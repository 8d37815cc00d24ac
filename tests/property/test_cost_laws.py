"""Laws of the cost model: the least by brute force, monotone, sane on odd input, quick to learn."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.core.ids import SessionId, TransferId
from kvstrata.manager.costs import Costs
from kvstrata.manager.decision import Decision, Limit, Run
from kvstrata.manager.speed import ReadSpeed, TierSeed
from kvstrata.testing.simdisk import DiskSpeed, SimDisk

ENGINE = SessionId(1)
TOKENS = 64
TIERS = ("disk", "object")
SECONDS = st.sampled_from([0.0, 1e-9, 1e-4, 1e-3, 3e-3, 8e-3, 0.05, 1.0, 1e5])
SEEDS = st.builds(TierSeed, block_s=SECONDS, latency_s=SECONDS)
RUNS = st.lists(
    st.builds(
        Run,
        tier=st.sampled_from(["host", *TIERS]),
        blocks=st.integers(1, 30),
        staging=st.sampled_from([False, False, True]),
    ),
    max_size=6,
)
PREFILL = st.sampled_from([0.0, 1e-3, 500.0, 8e3, 9e3, 2e4, 1e6, 1e12])
DEADLINES = st.sampled_from([-1.0, 0.0, 0.01, 0.1, 0.5, math.inf])
QUEUES = st.tuples(st.integers(0, 50), st.integers(0, 50))


def node(seeds: dict[str, TierSeed], prefill: float, queues=(0, 0), margin: float = 0.0) -> Costs:
    costs = Costs(TOKENS, 1 << 20, margin=margin, seeds=seeds)
    costs.note_engine(ENGINE, prefill)
    for number, (tier, queue) in enumerate(zip(TIERS, queues, strict=True)):
        if queue:
            costs.note_read(TransferId(number), tier, queue, 0.0)
    return costs


def stage_s(runs: list[Run], load: int, seeds: dict[str, TierSeed], queues) -> float:
    """When the first `load` blocks are in the host, block by block, as a child would reckon."""
    ahead = dict(zip(TIERS, queues, strict=True))
    latest = 0.0
    blocks = [run for run in runs for _ in range(run.blocks)]
    for run in blocks[:load]:
        if run.tier == "host":
            continue
        ahead[run.tier] += not run.staging
        seed = seeds[run.tier]
        latest = max(latest, seed.latency_s + seed.block_s * ahead[run.tier])
    return latest


def total(runs, load, seeds, prefill, queues, prompt, margin=0.0) -> float:
    host = seeds["host"]
    copy_s = host.latency_s + host.block_s * load if load else 0.0
    load_s = (1 + margin) * (stage_s(runs, load, seeds, queues) + copy_s)
    return load_s + max(prompt - load * TOKENS, 1) / prefill


MARGINS = st.sampled_from([0.0, 0.1, 1.0])
ALL_SEEDS = st.fixed_dictionaries(dict.fromkeys(["host", *TIERS], SEEDS))


@given(RUNS, ALL_SEEDS, PREFILL, QUEUES, DEADLINES, MARGINS, st.integers(0, 5000))
def test_no_other_split_is_faster(runs, seeds, prefill, queues, deadline, margin, more):
    hit = sum(run.blocks for run in runs)
    prompt = hit * TOKENS + more
    costs = node(seeds, prefill, queues, margin)
    decision = costs.choose(ENGINE, runs, prompt, 0.0, deadline)
    slack = 1e-9 * max(deadline, 1.0) if deadline < math.inf else 0.0
    stages = [stage_s(runs, load, seeds, queues) for load in range(hit + 1)]
    assert not decision.load or stages[decision.load] <= max(deadline, 0.0) + slack
    in_time = [load for load in range(hit + 1) if stages[load] <= max(deadline, 0.0) - slack]
    if not prefill:
        assert decision.load >= max(in_time, default=0), "what is not known is loaded"
        return
    values = [total(runs, load, seeds, prefill, queues, prompt, margin) for load in range(hit + 1)]
    least = min((values[load] for load in in_time), default=values[0])
    assert values[decision.load] <= least * (1 + 1e-9) + 1e-12
    chosen = total(runs, decision.load, seeds, prefill, queues, prompt)
    nothing = total(runs, 0, seeds, prefill, queues, prompt)
    assert chosen <= nothing * (1 + 1e-9), "never slower than computing everything"
    if hit in in_time and not margin:
        everything = total(runs, hit, seeds, prefill, queues, prompt)
        assert chosen <= everything * (1 + 1e-9) + 1e-12, "nor than loading everything"
    assert decision.ttft_s == pytest.approx(chosen, rel=1e-9, abs=1e-9)


@given(RUNS, ALL_SEEDS, PREFILL, QUEUES, DEADLINES, MARGINS)
def test_the_numbers_of_a_decision_agree(runs, seeds, prefill, queues, deadline, margin):
    decision = node(seeds, prefill, queues, margin).choose(ENGINE, runs, 0, 0.0, deadline)
    loaded = sum(count for _, count in decision.load_by_tier)
    left = sum(count for _, count in decision.left_by_tier)
    assert (loaded, loaded + left) == (decision.load, sum(run.blocks for run in runs))
    assert (decision.limit is Limit.NONE) == (not left)
    assert decision.probe <= left
    assert_finite(decision)


def assert_finite(decision: Decision) -> None:
    numbers = [decision.stage_s, decision.copy_s, decision.compute_s, decision.left_load_s]
    numbers += [decision.left_compute_s, decision.ttft_s]
    for rate in decision.rates:
        numbers += [rate.latency_s, rate.block_s, rate.overdue_s, rate.queue_blocks]
    assert all(0.0 <= number < math.inf for number in numbers), decision
    sentence = decision.sentence()
    assert sentence
    assert not {"nan", "inf"} & set(sentence.replace("(", " ").split())


ONE_TIER = st.lists(
    st.builds(Run, tier=st.sampled_from(["host", "disk"]), blocks=st.integers(1, 30)), max_size=6
)


@given(ONE_TIER, ALL_SEEDS, SEEDS, st.tuples(PREFILL, PREFILL), QUEUES, DEADLINES, MARGINS)
def test_a_faster_tier_or_a_slower_engine_never_loads_less(
    runs, seeds, other, prefills, queues, deadline, margin
):
    # With two tiers below the host side by side the first half is not so, and need not be: a faster
    # disk may make it worth while no more to wait for the object store as well.
    slow = seeds["disk"]
    fast = TierSeed(min(slow.block_s, other.block_s), min(slow.latency_s, other.latency_s))
    known = [each for each in prefills if each]
    quick, lame = max(known, default=0.0), min(known, default=0.0)
    before = node(seeds, quick, queues, margin).choose(ENGINE, runs, 0, 0.0, deadline)
    disk = node(seeds | {"disk": fast}, quick, queues, margin)
    engine = node(seeds, lame, queues, margin)
    for costs in (disk, engine):
        after = costs.choose(ENGINE, runs, 0, 0.0, deadline)
        assert after.load >= before.load


@given(RUNS, ALL_SEEDS, SEEDS, st.sampled_from(TIERS), PREFILL.filter(bool), QUEUES)
def test_a_faster_tier_is_never_a_slower_answer(runs, seeds, other, tier, prefill, queues):
    slow = seeds[tier]
    fast = TierSeed(min(slow.block_s, other.block_s), min(slow.latency_s, other.latency_s))
    before = node(seeds, prefill, queues).choose(ENGINE, runs, 0, 0.0)
    after = node(seeds | {tier: fast}, prefill, queues).choose(ENGINE, runs, 0, 0.0)
    assert after.ttft_s <= before.ttft_s * (1 + 1e-9) + 1e-12


TIMES = st.sampled_from([0.0, 0.0, 1e-9, 1e-3, 1.0, -5.0, 3e5, 1e9, 1e300, math.inf, math.nan])
STEPS = st.tuples(
    st.sampled_from(["read", "write", "done", "fail", "give up", "engine", "choose"]),
    st.integers(0, 5),
    st.integers(1, 1 << 18),
    TIMES,
)


@given(st.lists(STEPS, min_size=1, max_size=60), RUNS)
def test_no_odd_clock_or_number_makes_nonsense(steps, runs):
    costs = Costs(TOKENS, 1 << 20)
    now, flying = 0.0, set()
    for what, number, blocks, passed in steps:
        moved = now + passed
        now = moved if math.isfinite(moved) else now  # the clock may stand, jump, even go back
        transfer = TransferId(number)
        tier = TIERS[number % 2]
        match what:
            case "read" if number not in flying:
                costs.note_read(transfer, tier, blocks, now)
                flying.add(number)
            case "write" if number not in flying:
                costs.note_write(transfer, tier, blocks, now)
                flying.add(number)
            case "done":
                costs.note_done(transfer, now)
                flying.discard(number)
            case "fail":
                costs.note_failed(transfer, now)
                flying.discard(number)
            case "give up":
                costs.note_given_up(transfer, now)
            case "engine":
                costs.note_engine(ENGINE, passed, passed)
        assert_finite(costs.choose(ENGINE, runs, 0, now, now + 5.0))
    for number in flying:
        costs.note_done(TransferId(number), now)
    assert all(tier["queue_blocks"] == 0 for tier in costs.statistics(now)["tiers"].values())


# -- learning ----------------------------------------------------------------------------------


class Load:
    """Requests of 1 to 300 blocks for a simulated disk, in jobs of 16, and what was foretold."""

    def __init__(self, speed: DiskSpeed, seed: int) -> None:
        self.disk = SimDisk(speed, random.Random(seed))
        self.costs = Costs(TOKENS, 1 << 20)
        self.jobs = self.done = 0
        self.now = 0.0
        self._luck = random.Random(seed)

    def play(self, requests: int, idle: float) -> list[float]:
        """Return the relative error of foresight for each request; `idle` is time per work."""
        errors = []
        for _ in range(requests):
            speed = self.disk.speed
            work = 52 * (speed.block_s + speed.latency_s / 16) / speed.threads
            self.now += self._luck.expovariate(1 / (work * idle))
            self.disk.run_until(self.now, self._ended)
            blocks = round(300 ** self._luck.random())
            rate = self.costs.rate("disk", self.now)
            foretold = rate.latency_s + rate.block_s * (rate.queue_blocks + blocks)
            last = self.now
            while blocks:
                part = min(blocks, 16)
                blocks -= part
                self.jobs += 1
                self.costs.note_read(TransferId(self.jobs), "disk", part, self.now)
                last = max(last, self.disk.submit(self.jobs, part, self.now))
            errors.append(abs(foretold / (last - self.now) - 1))
        return errors

    def _ended(self, job: int, at: float) -> None:
        self.done += 1
        self.costs.note_done(TransferId(job), at)


EXACT = DiskSpeed(block_s=1e-3, latency_s=2e-3)
NOISY = DiskSpeed(block_s=0.8e-3, latency_s=0.3e-3, threads=2, noise=0.3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("speed", "idle", "within"), [(EXACT, 20.0, 0.12), (NOISY, 5.0, 0.3), (NOISY, 1.05, 0.15)]
)
def test_estimates_converge(speed, idle, within, seed):
    errors = Load(speed, seed).play(400, idle)
    assert statistics.median(errors[20:]) < within


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("factor", "jobs_max"), [(3.0, 60), (10.0, 60), (100.0, 60), (1 / 3, 60), (0.1, 60)]
)
def test_estimates_follow_a_change(factor, jobs_max, seed):
    load = Load(NOISY, seed)
    load.play(200, 5.0)
    load.disk.speed = replace(NOISY, block_s=NOISY.block_s * factor)
    load.now += 100.0
    load.disk.run_until(load.now, load._ended)
    before = load.done
    while load.done - before < jobs_max:
        load.play(1, 5.0)
    assert statistics.median(load.play(30, 5.0)) < 0.35


SHORT = SECONDS.filter(lambda seconds: seconds < 1e4)


@given(st.integers(1, 64), st.integers(1, 64), SHORT.filter(bool), SHORT)
def test_jobs_of_one_size_are_foretold_exactly_and_of_two_nearly(small, large, block_s, latency_s):
    speed = ReadSpeed()
    for number in range(200):
        blocks = small if number % 2 else large
        speed.learn(blocks, latency_s + block_s * blocks)
    for blocks in (small, large):
        true = latency_s + block_s * blocks
        assert speed.seconds(blocks) == pytest.approx(true, rel=1e-6 if small == large else 0.05)
    assert speed.block_s >= 0.0
    assert speed.latency_s >= 0.0


def test_a_seed_is_believed_and_then_forgotten():
    speed = ReadSpeed(TierSeed(block_s=1e-3, latency_s=5e-3))
    assert speed.known
    assert speed.seconds(100) == pytest.approx(0.105)
    for number in range(200):
        blocks = 1 + number % 40
        speed.learn(blocks, 0.5e-3 * blocks)
    assert speed.seconds(40) == pytest.approx(0.02, rel=0.05)


@given(st.lists(st.tuples(st.integers(1, 300), st.floats(0.0, 1e5)), min_size=1, max_size=60))
def test_no_speed_is_ever_negative(jobs):
    speed = ReadSpeed()
    for blocks, seconds in jobs:
        speed.learn(blocks, seconds)
        assert 0.0 <= speed.block_s < math.inf
        assert 0.0 <= speed.latency_s < math.inf
