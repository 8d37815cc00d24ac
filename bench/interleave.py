"""Timing of rival implementations in turn, so that noise of the machine falls on all of them.

One round times every side once, and the order of the sides turns by one place each round. A side
prepares outside the clock and hands over a call; what the call returns is checked, so that nobody
is fast by not doing the work. The garbage collector runs before each timed call, not during it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter_ns
from typing import NamedTuple

__all__ = ["Cost", "Prepare", "interleave"]

Prepare = Callable[[int], Callable[[], int]]
"""Round number -> the call to time; that call returns how many blocks it handled."""


class Cost(NamedTuple):
    """Microseconds per block over the rounds of one side."""

    median: float
    """The middle round."""
    low: float
    """The fastest round."""
    high: float
    """The slowest round."""


def interleave(
    sides: Mapping[str, Prepare], *, blocks: int, handled: int, rounds: int
) -> dict[str, Cost]:
    """Return the cost of each side per block, of which one timed call is given `blocks`.

    Every call must return `handled`. Round 0 warms up and does not count.
    """
    samples: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    gc.collect()
    gc.freeze()  # what exists already need not be walked before every call
    for turn in range(rounds + 1):
        for name in names:
            elapsed_us = _time(sides[name](turn), name, handled) / 1000
            if turn:
                samples[name].append(elapsed_us / blocks)
        names.append(names.pop(0))
    gc.unfreeze()
    return {name: Cost(median(each), min(each), max(each)) for name, each in samples.items()}


def _time(call: Callable[[], int], name: str, expected: int) -> int:
    gc.collect()
    gc.disable()
    try:
        start = perf_counter_ns()
        handled = call()
        elapsed = perf_counter_ns() - start
    finally:
        gc.enable()
    assert handled == expected, f"{name} handled {handled} blocks, not {expected}"
    return elapsed
