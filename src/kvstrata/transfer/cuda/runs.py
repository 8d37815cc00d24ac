"""Contiguous runs between device and host memory: merged, split and refused. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Run", "merge_runs", "split_runs"]


@dataclass(frozen=True, slots=True)
class Run:
    """One contiguous move."""

    source: int
    """Address of the first byte to read."""
    target: int
    """Address of the first byte to write."""
    length_bytes: int
    """How many bytes; at least one."""


def merge_runs(runs: Iterable[Run]) -> list[Run]:
    """Return runs that move the same bytes, neighbours on *both* sides joined.

    In the order of their targets. Raises ValueError for an empty run and where two runs write the
    same byte: the result would depend on which the device does last.
    """
    merged: list[Run] = []
    for run in sorted(runs, key=lambda one: one.target):
        if run.length_bytes < 1 or run.source < 0 or run.target < 0:
            raise ValueError(f"{run} moves nothing")
        if merged:
            last = merged[-1]
            end = last.target + last.length_bytes
            if run.target < end:
                raise ValueError(f"{last} and {run} write the same bytes")
            if run.target == end and run.source == last.source + last.length_bytes:
                merged[-1] = Run(last.source, last.target, last.length_bytes + run.length_bytes)
                continue
        merged.append(run)
    return merged


def split_runs(runs: Iterable[Run], run_bytes_max: int) -> list[Run]:
    """Return runs of at most `run_bytes_max` bytes that move the same; ValueError below one."""
    if run_bytes_max < 1:
        raise ValueError(f"runs of at most {run_bytes_max} bytes move nothing")
    return [
        Run(run.source + at, run.target + at, min(run_bytes_max, run.length_bytes - at))
        for run in runs
        for at in range(0, run.length_bytes, run_bytes_max)
    ]
