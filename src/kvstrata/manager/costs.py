"""The cost model: how much of a hit is faster to load than to compute. Sans-I/O, O(1) a job.

    time to first token = staging + copy to the engine + computing the rest
    staging             = the slowest of the tiers below the host, which work side by side;
                          each: overdue + latency + block_s * (blocks queued there + blocks to read)

What a tier can do is learnt from the jobs that end there (manager/speed.py), what the engine can do
is what its client says. What is not known costs nothing: a hit is then loaded, and the deadline of
staging guards the request. A tier that is too slow is not read any more and would never be measured
again, so after some silence a few blocks are read for nobody, the *probe*.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any, Final

from kvstrata.core.ids import SessionId, TransferId
from kvstrata.manager.decision import Decision, Limit, Run, TierRate
from kvstrata.manager.speed import ReadSpeed, TierSeed

__all__ = ["Costs"]

PROBE_BLOCKS_MAX: Final = 16
"""Most blocks that are read only to learn how fast a tier is now."""
_SMOOTHING: Final = 0.3
"""What the newest word of a client counts."""
_LATE_FACTOR: Final = 2.0
"""A job is late once it took so many times longer than foretold."""


@dataclass(slots=True)
class _Flight:
    blocks: int
    ahead: int  # blocks that must move until its end, its own included
    began: float
    teaches: bool  # whether its end says how fast reads are


@dataclass(slots=True)
class _Tier:
    speed: ReadSpeed
    queue: int = 0
    flights: dict[TransferId, _Flight] = field(default_factory=dict)  # oldest first
    ended: float = -math.inf  # when a job ended last
    asked: float = -math.inf  # when a read was submitted last


@dataclass(slots=True)
class _Engine:
    prefill_tokens_per_s: float = 0.0
    copy_bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Point:
    """One way to split the hit."""

    load: int
    stage_s: float


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the question says besides the hit."""

    prompt_tokens: int
    prefill: float  # tokens per second, 0 if not known
    wait_s: float
    now: float


@dataclass(frozen=True, slots=True)
class _Line:
    """When the blocks of a run would be in the host."""

    start_s: float
    block_s: float

    def seconds(self, blocks: int) -> float:
        return self.start_s + self.block_s * blocks

    def reach(self, seconds: float, blocks: int) -> int:
        """Return how many of `blocks` are there after so long."""
        if self.seconds(blocks) <= seconds:
            return blocks
        if self.start_s > seconds:
            return 0
        reached = min(int((seconds - self.start_s) / self.block_s), blocks - 1)
        while reached and self.seconds(reached) > seconds:
            reached -= 1  # rounding, so once or twice
        return reached


class Costs:
    """Estimates and decisions of one node. Times are on the clock of `now`."""

    def __init__(
        self,
        block_tokens: int,
        block_bytes: int,
        *,
        margin: float = 0.1,
        probe_interval_s: float = 10.0,
        seeds: Mapping[str, TierSeed] | None = None,
        host: str = "host",
        learns: bool = True,
    ) -> None:
        """Know what `seeds` say of the tiers, by name; `host` names the nearest one.

        Loading must beat computing by `margin`, a share of its own time. With `learns` false the
        seeds are all that is ever known, for a world where jobs take no time. ValueError for a size
        below 1, or a margin or interval that is negative or no number.
        """
        if block_tokens < 1 or block_bytes < 1:
            raise ValueError(f"{block_tokens=} and {block_bytes=} must be at least 1")
        if not (0.0 <= margin < math.inf and probe_interval_s >= 0.0):
            raise ValueError(f"{margin=} and {probe_interval_s=} must not be negative")
        self._block_tokens, self._block_bytes = block_tokens, block_bytes
        self._margin, self._probe_interval_s, self._host = margin, probe_interval_s, host
        self._seeds, self._learns = dict(seeds or {}), learns
        self._tiers: dict[str, _Tier] = {}
        self._flights: dict[TransferId, _Tier] = {}
        self._engines: dict[SessionId, _Engine] = {}

    @property
    def block_tokens(self) -> int:
        """Tokens of one block."""
        return self._block_tokens

    # -- learning ------------------------------------------------------------------------------

    def note_read(self, transfer: TransferId, tier: str, blocks: int, now: float) -> None:
        """A read of `blocks` from `tier` was queued; its end must be noted."""
        self._submit(transfer, tier, blocks, now, teaches=True)
        self._tiers[tier].asked = now

    def note_write(self, transfer: TransferId, tier: str, blocks: int, now: float) -> None:
        """A write of `blocks` to `tier` was queued: reads wait behind it, nothing is learnt."""
        self._submit(transfer, tier, blocks, now, teaches=False)

    def note_done(self, transfer: TransferId, now: float) -> None:
        """A job moved its blocks; harmless for one that was not noted."""
        self._end(transfer, now, learn=True)

    def note_failed(self, transfer: TransferId, now: float) -> None:
        """A job ended without its blocks. Failing fast is not being fast: nothing is learnt."""
        self._end(transfer, now, learn=False)

    def note_given_up(self, transfer: TransferId, now: float) -> None:
        """A read is waited for no more; it still is in the queue, and took at least so long."""
        place = self._flights.get(transfer)
        if place is None:
            return
        flight = place.flights[transfer]
        lasted = now - flight.began
        if not place.speed.known or lasted > place.speed.seconds(flight.ahead):
            place.speed.learn(flight.ahead, lasted)
        flight.teaches = False

    def note_engine(
        self, session: SessionId, prefill_tokens_per_s: float, copy_bytes_per_s: float = 0.0
    ) -> None:
        """A client says what its engine can do; 0 or nonsense says nothing."""
        if not (prefill_tokens_per_s > 0.0 or copy_bytes_per_s > 0.0):
            return
        engine = self._engines.setdefault(session, _Engine())
        engine.prefill_tokens_per_s = _smooth(engine.prefill_tokens_per_s, prefill_tokens_per_s)
        engine.copy_bytes_per_s = _smooth(engine.copy_bytes_per_s, copy_bytes_per_s)

    def session_ended(self, session: SessionId) -> None:
        """Forget what a client said."""
        self._engines.pop(session, None)

    # -- deciding ------------------------------------------------------------------------------

    def choose(
        self,
        session: SessionId,
        runs: Sequence[Run],
        prompt_tokens: int,
        now: float,
        deadline: float = math.inf,
    ) -> Decision:
        """Return how many leading blocks of `runs` to load. Changes nothing; O(runs).

        What is loaded from below the host is estimated to be there by `deadline`. Of splits that
        take equally long the one that loads most is chosen. As queues move the answer may change:
        ask once for a request, and keep the answer. `prompt_tokens` may be 0 if not known.
        """
        hit = sum(run.blocks for run in runs)
        rates = {run.tier: self.rate(run.tier, now, session) for run in runs}
        rates.setdefault(self._host, self.rate(self._host, now, session))
        engine = self._engines.get(session)
        asked = _Asked(
            prompt_tokens=max(prompt_tokens, hit * self._block_tokens),
            prefill=engine.prefill_tokens_per_s if engine else 0.0,
            wait_s=max(deadline - now, 0.0),
            now=now,
        )
        best = last = _Point(0, 0.0)
        least = self._compute_s(best, asked)
        for last in self._points(runs, rates, asked.wait_s):
            load_s = self._load_s(last, rates[self._host])
            total = (1.0 + self._margin) * load_s + self._compute_s(last, asked)
            if total <= least or not asked.prefill:
                best, least = last, total
        limit = Limit.NONE if best.load == hit else Limit.SLOWER
        if best.load == last.load < hit:
            limit = Limit.DEADLINE
        return self._decision(best, limit, runs, rates, asked)

    def rate(self, tier: str, now: float, session: SessionId | None = None) -> TierRate:
        """Return what is believed of `tier`, as the engine of `session` sees it."""
        place = self._tier(tier)
        speed, known = place.speed, place.speed.known
        latency_s, block_s = (speed.latency_s, speed.block_s) if known else (0.0, 0.0)
        engine = self._engines.get(session) if session is not None else None
        if tier == self._host and engine and engine.copy_bytes_per_s:
            block_s, known = self._block_bytes / engine.copy_bytes_per_s, True
        overdue = 0.0
        if place.flights:
            oldest = next(iter(place.flights.values()))
            # Of a tier not measured all that is known is how long it has kept us waiting. While
            # other jobs end, one that hangs says nothing about the next.
            due = _LATE_FACTOR * speed.seconds(oldest.ahead) if known else 0.0
            overdue = max(min(now - oldest.began - due, now - place.ended), 0.0)
        return TierRate(tier, known, latency_s, block_s, place.queue, overdue, self._block_bytes)

    def statistics(self, now: float) -> dict[str, Any]:
        """Return what is believed now, as plain names and numbers."""
        tiers = {}
        for name, place in self._tiers.items():
            rate = self.rate(name, now)
            tiers[name] = {
                "known": rate.known,
                "latency_s": rate.latency_s,
                "bytes_per_s": self._block_bytes / rate.block_s if rate.block_s > 0.0 else 0.0,
                "queue_blocks": rate.queue_blocks,
                "overdue_s": rate.overdue_s,
                "jobs": place.speed.jobs,
            }
        engines = [
            {"session": int(session)}
            | {"prefill_tokens_per_s": engine.prefill_tokens_per_s}
            | {"copy_bytes_per_s": engine.copy_bytes_per_s}
            for session, engine in self._engines.items()
        ]
        return {"margin": self._margin, "tiers": tiers, "engines": engines}

    # -- private -------------------------------------------------------------------------------

    def _tier(self, name: str) -> _Tier:
        place = self._tiers.get(name)
        if place is None:
            seed = self._seeds.get(name)
            place = self._tiers[name] = _Tier(ReadSpeed(seed))
        return place

    def _submit(
        self, transfer: TransferId, tier: str, blocks: int, now: float, *, teaches: bool
    ) -> None:
        assert transfer not in self._flights, f"{transfer=} is in flight already"
        place = self._tier(tier)
        place.queue += blocks
        place.flights[transfer] = _Flight(blocks, place.queue, now, teaches)
        self._flights[transfer] = place

    def _end(self, transfer: TransferId, now: float, *, learn: bool) -> None:
        place = self._flights.pop(transfer, None)
        if place is None:
            return
        flight = place.flights.pop(transfer)
        place.queue -= flight.blocks
        place.ended = now
        if flight.teaches and learn and self._learns:
            place.speed.learn(flight.ahead, max(now - flight.began, 0.0))

    def _points(
        self, runs: Sequence[Run], rates: Mapping[str, TierRate], wait_s: float
    ) -> Iterator[_Point]:
        """Yield the splits among which the best one is, fewest blocks first.

        Behind the first block of a run, which may cost its tier's latency, the time to first token
        is convex in the blocks of the run: copying and computing are linear (up to the prompt's
        last token, which is always computed), staging is the larger of a constant, the tiers before
        it, and a rising line, this one. So the least lies at its first block, where the two meet,
        at one of its last two, or where the deadline cuts it.
        """
        before, stage_s = 0, 0.0  # blocks before the run, and when they are in the host
        for run, line in self._lines(runs, rates):
            most = line.reach(wait_s, run.blocks)
            meet = line.reach(stage_s, run.blocks)
            for blocks in sorted({1, meet, meet + 1, run.blocks - 1, run.blocks, most}):
                if 1 <= blocks <= most:
                    yield _Point(before + blocks, max(stage_s, line.seconds(blocks)))
            if most < run.blocks:
                return
            before += run.blocks
            stage_s = max(stage_s, line.seconds(run.blocks))

    def _lines(
        self, runs: Sequence[Run], rates: Mapping[str, TierRate]
    ) -> Iterator[tuple[Run, _Line]]:
        """Yield with each run when its blocks would be in the host, if all before it are read."""
        ahead = {name: rate.queue_blocks for name, rate in rates.items()}
        for run in runs:
            if run.tier == self._host:
                yield run, _Line(0.0, 0.0)
                continue
            rate = rates[run.tier]
            start_s = rate.overdue_s + rate.latency_s + rate.block_s * ahead[run.tier]
            if run.staging:
                yield run, _Line(start_s, 0.0)
                continue
            yield run, _Line(start_s, rate.block_s)
            ahead[run.tier] += run.blocks

    def _load_s(self, point: _Point, host: TierRate) -> float:
        copy_s = host.latency_s + host.block_s * point.load if point.load else 0.0
        return point.stage_s + copy_s

    def _compute_s(self, point: _Point, asked: _Asked) -> float:
        missing = max(asked.prompt_tokens - point.load * self._block_tokens, 1)
        return missing / asked.prefill if asked.prefill else 0.0

    def _decision(
        self,
        best: _Point,
        limit: Limit,
        runs: Sequence[Run],
        rates: Mapping[str, TierRate],
        asked: _Asked,
    ) -> Decision:
        host = rates[self._host]
        stages = [line.seconds(run.blocks) for run, line in self._lines(runs, rates)]
        whole = _Point(sum(run.blocks for run in runs), max(stages, default=0.0))
        load_s, compute_s = self._load_s(best, host), self._compute_s(best, asked)
        used = {run.tier for run in runs} | ({self._host} if runs else set())
        chosen, left = _split(runs, best.load)
        return Decision(
            load=best.load,
            hit=whole.load,
            limit=limit,
            load_by_tier=_by_tier(chosen),
            left_by_tier=_by_tier(left),
            stage_s=best.stage_s,
            copy_s=load_s - best.stage_s,
            compute_s=compute_s,
            left_load_s=max(self._load_s(whole, host) - load_s, 0.0),
            left_compute_s=compute_s - self._compute_s(whole, asked),
            prefill_tokens_per_s=asked.prefill,
            wait_s=asked.wait_s,
            margin=self._margin,
            probe=self._probe(left, {run.tier for run in chosen}, asked.now),
            rates=tuple(rate for name, rate in rates.items() if name in used),
        )

    def _probe(self, left: Sequence[Run], used: AbstractSet[str], now: float) -> int:
        """Return how many of the blocks left to read so that their tier is not judged for ever."""
        if not left or left[0].staging or left[0].tier in used or left[0].tier == self._host:
            return 0
        silent = now - self._tier(left[0].tier).asked >= self._probe_interval_s
        return min(left[0].blocks, PROBE_BLOCKS_MAX) if silent else 0


def _split(runs: Sequence[Run], load: int) -> tuple[list[Run], list[Run]]:
    """Cut `runs` behind so many blocks."""
    chosen: list[Run] = []
    left: list[Run] = []
    for run in runs:
        here = min(run.blocks, load)
        load -= here
        if here:
            chosen.append(replace(run, blocks=here))
        if run.blocks > here:
            left.append(replace(run, blocks=run.blocks - here))
    return chosen, left


def _by_tier(runs: Sequence[Run]) -> tuple[tuple[str, int], ...]:
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.tier] = counts.get(run.tier, 0) + run.blocks
    return tuple(counts.items())


def _smooth(old: float, new: float) -> float:
    """Return the smoothed value; what is no speed changes nothing."""
    if not 0.0 < new < math.inf:
        return old
    return old + _SMOOTHING * (new - old) if old else new
