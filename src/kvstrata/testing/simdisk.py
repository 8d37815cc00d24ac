"""A disk in virtual time: jobs queue, threads serve them, luck makes some of them slow."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["DiskSpeed", "SimDisk"]


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """What a simulated disk can do."""

    block_s: float
    """Seconds for which one thread is busy with one block, on average."""
    latency_s: float = 0.0
    """Seconds that each job takes besides."""
    threads: int = 1
    """Jobs served at once; the next ones wait, first come, first served."""
    noise: float = 0.0
    """Spread of a job's time: sigma of a lognormal factor of mean 1."""
    stall_chance: float = 0.0
    """How probable it is that a job stalls."""
    stall_s: float = 0.0
    """Seconds that a stall adds."""


class SimDisk:
    """Tells when jobs end; the caller lets time pass by `run_until`."""

    def __init__(self, speed: DiskSpeed, luck: random.Random) -> None:
        """Begin idle, at time 0."""
        self.speed = speed
        self._luck = luck
        self._free = [0.0] * speed.threads
        self._ending: list[tuple[float, int]] = []

    def submit(self, job: int, blocks: int, now: float) -> float:
        """Queue a job of so many blocks; return when it will end."""
        speed, luck = self.speed, self._luck
        factor = luck.lognormvariate(-(speed.noise**2) / 2, speed.noise) if speed.noise else 1.0
        busy = (speed.latency_s + blocks * speed.block_s) * factor
        if luck.random() < speed.stall_chance:
            busy += speed.stall_s
        end = max(now, self._free[0]) + busy
        heapq.heapreplace(self._free, end)
        heapq.heappush(self._ending, (end, job))
        return end

    def run_until(self, now: float, ended: Callable[[int, float], None]) -> None:
        """Report the jobs that end up to `now`, in order."""
        while self._ending and self._ending[0][0] <= now:
            end, job = heapq.heappop(self._ending)
            ended(job, end)
