"""A trace through the real manager in virtual time: what would have been hit, moved and evicted.

The manager, pools and policies are the ones that serve; only the bytes are missing. Requests live
one after the other: each is looked up, held, its missing blocks stored, and released before the
next one comes, so that hit rates do not depend on the assumed hardware. Time is laid over it: a
request waits for its blocks to be staged, then for the engine, then for its own prefill.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvstrata.core.config import Limits
from kvstrata.core.ids import Holder, SequenceHash, SessionId
from kvstrata.core.tier import HOST, Admission, TierName
from kvstrata.manager import Costs, EngineSpeed, LowerTier, Manager, TierSeed
from kvstrata.policy import EvictionPolicy, make_policy
from kvstrata.pool import Pool
from kvstrata.sim.belady import NEVER, BeladyPolicy
from kvstrata.sim.hardware import Hardware
from kvstrata.sim.traces.model import TraceRequest
from kvstrata.transfer.base import EraseJob, Job, JobDone, ProbeJob, ReadJob, WriteJob

__all__ = ["BELADY", "LowerSlots", "Replay", "ReplayReport", "next_uses"]

BELADY = "belady"
"""The policy that only a replay can have: it knows the future."""
_SESSION = SessionId(1)
_LIMITS = Limits(
    job_blocks_max=1 << 12,
    offload_blocks_in_flight_max=1 << 20,
    offload_backlog_blocks_max=1 << 20,
)


@dataclass(frozen=True, slots=True)
class LowerSlots:
    """A tier below the host, as a replay needs it."""

    name: TierName
    """What it is called."""
    slots: int
    """Blocks that it holds."""
    admission: Admission = Admission.WRITE_THROUGH
    """Which blocks of the tier above enter it."""


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What one policy did with one size of the tiers."""

    policy: str
    """Its name."""
    slots: Mapping[str, int]
    """Blocks that each tier can hold."""
    requests: int
    """Requests replayed."""
    blocks: int
    """Blocks of all their prompts."""
    hit_blocks: Mapping[str, int]
    """Leading blocks found, by the tier that they came from."""
    evictions: Mapping[str, int]
    """Blocks evicted from each tier."""
    moved_bytes: Mapping[str, int]
    """Bytes by the way that they went, such as `disk to host`."""
    dropped_blocks: int
    """Blocks that were not stored or not written because every slot was held."""
    ttft_s: Mapping[str, float]
    """Time to first token under the stated hardware: mean, p50, p90, p99."""

    @property
    def hit(self) -> float:
        """Leading resident blocks over all blocks."""
        return sum(self.hit_blocks.values()) / self.blocks if self.blocks else 0.0


@dataclass(slots=True)
class _Clock:
    """When answers come, for engines that each compute one prompt after the other."""

    hardware: Hardware
    block_bytes: int
    free_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free_s = [0.0] * self.hardware.engines  # a heap: the engine that is free first

    def serve(
        self, request: TraceRequest, hit: int, staged: Mapping[TierName, int], block_tokens: int
    ) -> None:
        hardware = self.hardware
        ready = request.arrival_s
        for tier, blocks in staged.items():
            speed = hardware.speed(tier)
            ready += speed.latency_s + blocks * self.block_bytes / speed.read_bytes_per_s
        busy = 0.0
        if hit:
            size = hit * self.block_bytes
            busy += hardware.host.latency_s + size / hardware.host.read_bytes_per_s
        missing = max(request.prompt_tokens - hit * block_tokens, 1)  # the last one is computed
        busy += missing / hardware.prefill_tokens_per_s
        done = max(ready, self.free_s[0]) + busy
        heapq.heapreplace(self.free_s, done)
        self.ttft_s.append(done - request.arrival_s)

    def summary(self) -> dict[str, float]:
        if not self.ttft_s:
            return {}
        times = np.asarray(self.ttft_s)
        found = {f"p{rank}": float(np.percentile(times, rank)) for rank in (50, 90, 99)}
        return {"mean": float(times.mean())} | found


class Replay:
    """One policy and one size of the tiers; `play` the requests in order, then `report`."""

    def __init__(
        self,
        policy: str,
        host_slots: int,
        lower: Sequence[LowerSlots],
        hardware: Hardware,
        block_tokens: int,
        *,
        weigh_costs: bool = False,
    ) -> None:
        """Make empty tiers, `lower` nearest first. Raises ConfigError for an unknown policy.

        With `weigh_costs` a hit is loaded only as far as `hardware` loads it faster than it would
        compute it.
        """
        self._policy = policy
        self._next_use: dict[SequenceHash | None, int] = {}
        self._block_tokens = block_tokens
        self._host = Pool(host_slots, self._make_policy())
        self._lower = [
            LowerTier(tier.name, Pool(tier.slots, self._make_policy()), tier.admission)
            for tier in lower
        ]
        costs = _costs(hardware, self._lower, block_tokens) if weigh_costs else None
        self._engine = EngineSpeed(hardware.prefill_tokens_per_s, hardware.host.read_bytes_per_s)
        self._manager = Manager(self._host, self._lower, _LIMITS, costs=costs)
        self._clock = _Clock(hardware, hardware.block_bytes(block_tokens))
        self._requests = self._blocks = 0
        self._moved: Counter[str] = Counter()

    def play(self, requests: Iterable[TraceRequest], future: Sequence[list[int]] = ()) -> None:
        """Replay `requests`; Belady's bound needs `future`, one list of next uses each."""
        for request in requests:
            self._play(request, future[self._requests] if self._policy == BELADY else None)

    def report(self) -> ReplayReport:
        """Return what happened so far."""
        counters = self._manager.counters
        pools = {HOST: self._host} | {tier.name: tier.pool for tier in self._lower}
        size = self._clock.block_bytes
        hits = {HOST: counters.hit_blocks_host} | {t.name: t.hit_blocks for t in self._lower}
        return ReplayReport(
            policy=self._policy,
            slots={str(name): pool.slots_total for name, pool in pools.items()},
            requests=self._requests,
            blocks=self._blocks,
            hit_blocks={str(name): hits[name] for name in pools},
            evictions={str(name): pool.statistics().evictions for name, pool in pools.items()},
            moved_bytes={way: blocks * size for way, blocks in sorted(self._moved.items())},
            dropped_blocks=counters.throttled_reserve_blocks
            + counters.throttled_stage_blocks
            + counters.throttled_write_blocks
            + counters.throttled_relay_blocks
            + counters.evicted_unwritten_blocks,
            ttft_s=self._clock.summary(),
        )

    def _make_policy(self) -> EvictionPolicy:
        return BeladyPolicy(self._next_use) if self._policy == BELADY else make_policy(self._policy)

    def _play(self, request: TraceRequest, future: list[int] | None) -> None:
        manager, blocks, now = self._manager, request.blocks, request.arrival_s
        holder = Holder(_SESSION, str(self._requests))
        worth = len(blocks)
        if future is not None:  # what never comes again is not worth a place
            self._next_use.update(zip(blocks, future, strict=True))
            worth = next((place for place, use in enumerate(future) if use == NEVER), worth)
        found = manager.lookup(holder, blocks, now, engine=self._engine)
        while found.pending:
            self._carry_out(now)
            found = manager.lookup(holder, blocks, now, engine=self._engine)
        held = manager.acquire(holder, blocks[: found.ready], now)
        hit = len(held.slots)
        room = manager.reserve(holder, blocks[hit - 1] if hit else None, blocks[hit:worth])
        manager.seal(holder, room.slots)
        self._carry_out(now)
        manager.release(holder)
        self._moved["host to engine"] += hit
        self._moved["engine to host"] += len(room.slots)
        self._clock.serve(request, hit, held.staged, self._block_tokens)
        self._requests += 1
        self._blocks += len(blocks)

    def _carry_out(self, now: float) -> None:
        """Do at once what the manager asks for, until it asks for nothing more."""
        while jobs := self._manager.step(now):
            for job in jobs:
                self._manager.complete(self._done(job))

    def _done(self, job: Job) -> JobDone:
        if isinstance(job, EraseJob):
            return JobDone(job.transfer, (True,) * len(job.targets))
        assert not isinstance(job, ProbeJob), "only keyed tiers are probed"
        count = len(job.slots)
        if isinstance(job, ReadJob):
            self._moved[f"{job.tier} to host"] += count
        elif isinstance(job, WriteJob):
            self._moved[f"host to {job.tier}"] += count
        return JobDone(job.transfer, (True,) * count, (b"",) * count)


def _costs(hardware: Hardware, lower: Sequence[LowerTier], block_tokens: int) -> Costs:
    """Return a cost model that knows `hardware`; replayed jobs take no time to learn from."""
    block_bytes = hardware.block_bytes(block_tokens)
    speeds = {HOST: hardware.host} | {tier.name: hardware.speed(tier.name) for tier in lower}
    seeds = {
        str(name): TierSeed(block_bytes / speed.read_bytes_per_s, speed.latency_s)
        for name, speed in speeds.items()
    }
    return Costs(block_tokens, block_bytes, seeds=seeds, learns=False)


def next_uses(requests: Sequence[TraceRequest]) -> list[list[int]]:
    """Return for each block of each request the number of the next request that has it."""
    ahead: dict[SequenceHash, int] = {}
    found: list[list[int]] = []
    for number in range(len(requests) - 1, -1, -1):
        blocks = requests[number].blocks
        found.append([ahead.get(key, NEVER) for key in blocks])
        ahead.update(dict.fromkeys(blocks, number))
    found.reverse()
    return found
