"""What is decided about one hit, with every number that decided it, and in words. Pure values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["Decision", "Limit", "Run", "TierRate"]


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring blocks of a hit that lie in one tier."""

    tier: str
    """Name of the tier."""
    blocks: int
    """How many, at least 1."""
    staging: bool = False
    """Whether they are being read already, so that loading them adds nothing to the queue."""


class Limit(Enum):
    """Why no more of a hit is loaded."""

    NONE = "none"
    """All of it is."""
    SLOWER = "slower"
    """Loading the rest is estimated slower than computing it."""
    DEADLINE = "deadline"
    """The next block is estimated to arrive after the request stops waiting."""


@dataclass(frozen=True, slots=True)
class TierRate:
    """What was believed of one tier when the decision was made."""

    tier: str
    """Name of the tier."""
    known: bool
    """Whether enough was measured or said; if not, its blocks count as free."""
    latency_s: float
    """Seconds before the first block."""
    block_s: float
    """Seconds for one block more."""
    queue_blocks: int
    """Blocks submitted before and not ended."""
    overdue_s: float
    """By how much its oldest job is later than it should be; added to the latency."""
    block_bytes: int
    """Bytes of one block, to speak of bytes per second."""

    def describe(self) -> str:
        """Return it in words."""
        queue = f" behind {_blocks(self.queue_blocks)}" if self.queue_blocks else ""
        late = f", its oldest job {_time(self.overdue_s)} late" if self.overdue_s > 0.0 else ""
        if not self.known:
            return f"{self.tier} not measured yet{queue}{late}"
        after = f" after {_time(self.latency_s)}" if self.latency_s >= _WORTH_A_WORD_S else ""
        if self.block_s <= 0.0:
            return f"{self.tier} at no measurable cost{after}{queue}{late}"
        return f"{self.tier} {self.block_bytes / self.block_s / 1e9:.2g} GB/s{after}{queue}{late}"


@dataclass(frozen=True, slots=True)
class Decision:
    """How much of a hit to load. Times are estimates, in seconds."""

    load: int
    """Leading blocks of the hit to load, those of the host included."""
    hit: int
    """Blocks of the hit."""
    limit: Limit
    """Why not more."""
    load_by_tier: tuple[tuple[str, int], ...]
    """How many of `load` come from each tier, in the order in which the hit meets them."""
    left_by_tier: tuple[tuple[str, int], ...]
    """The blocks behind `load`, likewise."""
    stage_s: float
    """Until the last block to load is in the host."""
    copy_s: float
    """Copying them to the engine."""
    compute_s: float
    """Computing the rest of the prompt; 0 if the engine's speed is not known."""
    left_load_s: float
    """How much longer loading would take with the blocks that are left."""
    left_compute_s: float
    """What computing those blocks takes; 0 if the engine's speed is not known."""
    prefill_tokens_per_s: float
    """The engine's speed, 0 if not known."""
    wait_s: float
    """How long the request waits at most; infinite for no bound."""
    margin: float
    """By which share loading had to be faster."""
    probe: int
    """Leading ones of the blocks left to read with nobody waiting: the tier may have changed."""
    rates: tuple[TierRate, ...]
    """What was believed of each tier of the hit."""

    @property
    def ttft_s(self) -> float:
        """Estimated time to the first token, the engine's own queue left aside."""
        return self.stage_s + self.copy_s + self.compute_s

    @property
    def known(self) -> bool:
        """Whether the engine's speed and that of each tier were known."""
        return self.prefill_tokens_per_s > 0.0 and all(rate.known for rate in self.rates)

    def sentence(self) -> str:
        """Return what was decided and why, for people."""
        ground = f"({'; '.join(self._grounds())})"
        if not self.hit:
            return "nothing is kept"
        if self.limit is Limit.NONE:
            took = _time(self.stage_s + self.copy_s)
            if not self.known:
                return f"{_names(self.load_by_tier)} loaded: not all speeds are known {ground}"
            return f"{_names(self.load_by_tier)} loaded: loading takes {took} {ground}"
        names = f"{_names(self.left_by_tier)} not loaded"
        reading = f"reading them takes {_time(self.left_load_s)}"
        if self.limit is Limit.DEADLINE:
            most = f"the request waits {_time(self.wait_s)} at most"
            return f"{names}: {reading}, {most} {ground}"
        computing = f"computing them {_time(self.left_compute_s)}"
        close = self.left_load_s <= self.left_compute_s
        gain = f", and {self.margin:.0%} must be gained" if close else ""
        return f"{names}: {reading}, {computing}{gain} {ground}"

    def _grounds(self) -> list[str]:
        speed = f"prefill {self.prefill_tokens_per_s:,.0f} tokens/s"
        if not self.prefill_tokens_per_s:
            speed = "prefill not measured yet"
        return [*(rate.describe() for rate in self.rates), speed]


_WORTH_A_WORD_S = 0.0005


def _names(by_tier: tuple[tuple[str, int], ...]) -> str:
    return " and ".join(f"{_blocks(count)} of {tier}" for tier, count in by_tier) or "0 blocks"


def _blocks(count: int) -> str:
    return f"{count:,} block{'s' if count != 1 else ''}"


def _time(seconds: float) -> str:
    if seconds >= 10.0:  # noqa: PLR2004
        return f"{seconds:,.0f} s"
    return f"{seconds:.1f} s" if seconds >= 1.0 else f"{seconds * 1e3:.3g} ms"
