"""Sides of a measurement in turns, so that noise of the machine falls on all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["Absent", "PathRow", "path_of", "take_turns", "timed"]

Side = Callable[[], float]


@dataclass(frozen=True, slots=True)
class PathRow:
    """One way of bytes, ours beside its limit, measured in the same run."""

    name: str
    """What moves where."""
    block_bytes: int
    """Length of a block."""
    ours: float
    """GB/s of our path, the median round."""
    limit: float
    """GB/s of the limit, the median round."""
    ratio: float
    """Ours over the limit."""
    limit_tool: str
    """What the limit was measured with."""
    spread: float
    """Fastest round over slowest, of the side that scattered most."""


@dataclass(frozen=True, slots=True)
class Absent:
    """A path that was not measured."""

    name: str
    """Which one."""
    reason: str
    """Why, and what to do."""


def take_turns(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Return the figures of each side, one a round; the order turns by one place each round.

    Round 0 warms up and does not count.
    """
    samples: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds + 1):
        for name in names:
            gc.collect()
            figure = sides[name]()
            if turn:
                samples[name].append(figure)
        names.append(names.pop(0))
    return samples


def timed(size_bytes: int, call: Callable[[], object]) -> float:
    """Return bytes per second of one call that moves `size_bytes`."""
    began = time.perf_counter()
    call()
    return size_bytes / (time.perf_counter() - began)


def path_of(
    name: str, block_bytes: int, ours: Sequence[float], limit: Sequence[float], limit_tool: str
) -> PathRow:
    """Return the line of two sides' bytes per second."""
    here, there = median(ours), median(limit)
    spread = max(max(each) / min(each) for each in (ours, limit))
    return PathRow(
        name,
        block_bytes,
        round(here / 1e9, 3),
        round(there / 1e9, 3),
        round(here / there, 3),
        limit_tool,
        round(spread, 2),
    )
