"""How fast a tier gives its blocks, learnt from the jobs that ended. Pure: O(1) a job.

A job that is submitted behind a queue waits for it, so what a job's time depends on is the number
of blocks ahead of its end: those queued when it was submitted and its own, together `x`. The model
is the line

    seconds(x) = latency_s + block_s * x

fitted by weighted least squares to the jobs that ended, recent ones counting more. Errors count
in proportion to the time: with y = seconds / x and u = 1 / x the line is

    y = block_s + latency_s * u

and what is kept are means, variance and covariance of u and y. docs/adr/0006-cost-model.md has the
other ways that were tried, and their errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["JOBS_TRUSTED", "ReadSpeed", "TierSeed"]

JOBS_TRUSTED: Final = 4
"""Jobs that must have ended before what they say is believed."""
_WEIGHT_MIN: Final = 0.06
"""What the newest job counts in the long run: as much as if the last 16 or so counted alone."""
_ODD_FACTOR: Final = 4.0
"""A job is odd that took so many times more or less than foretold; it counts as if just so many."""
_ODD_MAX: Final = 8
"""After so many odd jobs in a row, all to the same side, the past is forgotten."""
_SECONDS_MAX: Final = 1e6
"""A job that took longer, some weeks, is a clock that jumped."""
_SEED_BLOCKS: Final = 64
_RIDGE: Final = 0.02
"""How strongly the share of latency stays as it is, in squares of the mean of `u`."""


@dataclass(frozen=True, slots=True)
class TierSeed:
    """What a tier is said to be capable of before anything was measured."""

    block_s: float
    """Seconds for one block in a long run of them."""
    latency_s: float = 0.0
    """Seconds before the first one."""


class ReadSpeed:
    """The line of one tier."""

    def __init__(self, seed: TierSeed | None = None) -> None:
        """Know nothing, or what `seed` says."""
        self._jobs = 0
        self._u = self._y = self._variance = self._covariance = 0.0
        self._odd = 0  # odd jobs in a row: above 0 too slow, below 0 too fast
        self.latency_s = self.block_s = 0.0
        self._share = 0.0  # of the time at the mean of `u`, what is latency
        if seed is not None:
            self._plant(seed)

    @property
    def known(self) -> bool:
        """Whether there is enough to go by."""
        return self._jobs >= JOBS_TRUSTED

    @property
    def jobs(self) -> int:
        """Jobs learnt from, a seed counted as a few."""
        return self._jobs

    def seconds(self, blocks_ahead: int) -> float:
        """Return the time until the last of so many blocks, queued ones included, is there."""
        return self.latency_s + self.block_s * blocks_ahead if blocks_ahead > 0 else 0.0

    def learn(self, blocks_ahead: int, seconds: float) -> None:
        """Take a job that ended `seconds` after it was submitted; nonsense is left out."""
        if blocks_ahead < 1 or not 0.0 <= seconds < _SECONDS_MAX:
            return
        u = 1.0 / blocks_ahead
        self._add(u, self._moderate(seconds * u, self.block_s + self.latency_s * u))
        self._fit()

    # -- private -------------------------------------------------------------------------------

    def _plant(self, seed: TierSeed) -> None:
        """Take two jobs that obey the seed exactly, a short one and a long one, twice."""
        for u in (1.0, 1.0 / _SEED_BLOCKS) * (JOBS_TRUSTED // 2):
            self._add(u, seed.block_s + seed.latency_s * u)
        self.latency_s, self.block_s = seed.latency_s, seed.block_s
        at_mean = seed.latency_s * self._u
        self._share = at_mean / self._y if self._y else 0.0

    def _moderate(self, y: float, foretold: float) -> float:
        """Return `y`, or what it is allowed to count as if it is odd."""
        low, high = foretold / _ODD_FACTOR, foretold * _ODD_FACTOR
        if not self.known or low <= y <= high:
            self._odd = 0
            return y
        side = 1 if y > high else -1
        self._odd = self._odd + side if self._odd * side > 0 else side
        if abs(self._odd) >= _ODD_MAX:
            self._odd, self._jobs = 0, 1  # the past is worth one job now, and soon nothing
            return y
        return high if side > 0 else low

    def _add(self, u: float, y: float) -> None:
        self._jobs += 1
        weight = max(_WEIGHT_MIN, 1.0 / self._jobs)
        from_u, from_y = u - self._u, y - self._y
        self._u += weight * from_u
        self._y += weight * from_y
        self._variance = (1.0 - weight) * (self._variance + weight * from_u * from_u)
        self._covariance = (1.0 - weight) * (self._covariance + weight * from_u * from_y)

    def _fit(self) -> None:
        """Draw the line anew; where all jobs have one size, latency keeps its share."""
        if not self._y > 0.0:
            self.latency_s = self.block_s = self._share = 0.0
            return
        ridge = _RIDGE * self._u * self._u
        kept = self._share * self._y / self._u
        latency_s = (self._covariance + ridge * kept) / (self._variance + ridge)
        self._share = min(max(latency_s * self._u / self._y, 0.0), 1.0)
        self.latency_s = self._share * self._y / self._u
        self.block_s = (1.0 - self._share) * self._y
