"""Ways to learn how fast a disk is, each against the same simulated disks: errors of foresight.

    python bench/estimators.py [--requests 400] [--seeds 5]   # seconds

A request asks for a run of blocks, split into jobs of 16 that queue behind what is there. Each way
foretells when its last block arrives; the error is |foretold - true| / true. Printed: median and
90th percentile over the requests, the first 20 of each run left out. For `x3 slower`, `x10 faster`
and the like: only the requests after the change; `after` is how many jobs ended after the change
until the median error of the next 10 requests was below 25 % for the first time.

The second table is what deciding by it is worth: mean and 90th percentile of the time to first
token over requests whose whole prompt, 1 to 300 blocks, is on disk, if all of it is always loaded,
if nothing ever is, and if `Costs.choose` decides. An engine computes a block in 8 ms, one prompt
beside the other; a request waits at most 5 s for the disk and then computes everything.
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import dataclass, replace
from typing import Protocol

from kvstrata.core.ids import SessionId, TransferId
from kvstrata.manager.costs import Costs
from kvstrata.manager.decision import Run
from kvstrata.manager.speed import ReadSpeed
from kvstrata.testing.simdisk import DiskSpeed, SimDisk

JOB_BLOCKS = 16
WARM_REQUESTS = 20
GOOD = 0.25


class Way(Protocol):
    """Learns from jobs, foretells requests."""

    def ended(self, ahead: int, blocks: int, began: float, now: float) -> None:
        """Take the end of a job of `blocks`, submitted at `began` with `ahead` blocks up to it."""

    def seconds(self, ahead: int) -> float:
        """Foretell the time until the last of so many blocks is there."""


class LastJob:
    """Blocks over duration of each job, smoothed: what most code does. The queue is not seen."""

    def __init__(self) -> None:
        self.block_s = 0.0

    def ended(self, ahead: int, blocks: int, began: float, now: float) -> None:
        """See `Way`."""
        del ahead
        found = (now - began) / blocks
        self.block_s = found if not self.block_s else self.block_s + 0.06 * (found - self.block_s)

    def seconds(self, ahead: int) -> float:
        """See `Way`."""
        return self.block_s * ahead


class BusyRate:
    """Blocks over busy seconds; latency from the rest of jobs that met an empty queue."""

    def __init__(self) -> None:
        self.last_end = self.busy_s = self.blocks = self.latency_s = 0.0

    def ended(self, ahead: int, blocks: int, began: float, now: float) -> None:
        """See `Way`."""
        self.busy_s = 0.94 * self.busy_s + max(0.0, now - max(self.last_end, began))
        self.blocks = 0.94 * self.blocks + blocks
        self.last_end = now
        if ahead == blocks:
            rest = max(0.0, now - began - blocks * self.busy_s / self.blocks)
            self.latency_s += 0.06 * (rest - self.latency_s)

    def seconds(self, ahead: int) -> float:
        """See `Way`."""
        return self.latency_s + (ahead * self.busy_s / self.blocks if self.blocks else 0.0)


class AbsoluteLine:
    """Least squares of duration on blocks ahead, errors in seconds."""

    def __init__(self) -> None:
        self.jobs = 0
        self.x = self.d = self.var = self.cov = 0.0

    def ended(self, ahead: int, blocks: int, began: float, now: float) -> None:
        """See `Way`."""
        del blocks
        self.jobs += 1
        weight = max(0.06, 1 / self.jobs)
        dx, dd = ahead - self.x, now - began - self.d
        self.x += weight * dx
        self.d += weight * dd
        self.var = (1 - weight) * (self.var + weight * dx * dx)
        self.cov = (1 - weight) * (self.cov + weight * dx * dd)

    def seconds(self, ahead: int) -> float:
        """See `Way`."""
        slope = max(0.0, self.cov / self.var) if self.var > 1e-9 else self.d / max(self.x, 1)
        return max(0.0, self.d + slope * (ahead - self.x))


class Shipped:
    """kvstrata.manager.speed: least squares, relative errors, odd jobs moderated."""

    def __init__(self) -> None:
        self.speed = ReadSpeed()

    def ended(self, ahead: int, blocks: int, began: float, now: float) -> None:
        """See `Way`."""
        del blocks
        self.speed.learn(ahead, now - began)

    def seconds(self, ahead: int) -> float:
        """See `Way`."""
        return self.speed.seconds(ahead)


WAYS: dict[str, type[Way]] = {
    "last job": LastJob,
    "busy rate": BusyRate,
    "line, seconds": AbsoluteLine,
    "line, relative (shipped)": Shipped,
}


@dataclass(frozen=True, slots=True)
class Scene:
    """One disk and one load."""

    name: str
    speed: DiskSpeed
    load: float
    """Mean share of the time in which the disk is busy."""
    after: DiskSpeed | None = None
    """What it becomes half-way."""
    mixed: bool = True
    """Whether requests have 1 to 300 blocks, log-uniform, or 16 all of them."""


NVME = DiskSpeed(block_s=0.8e-3, latency_s=0.3e-3, threads=2, noise=0.3)
SCENES = [
    Scene("quiet: 1 thread, 20 % busy", replace(NVME, threads=1, block_s=0.4e-3), 0.2),
    Scene("2 threads, 20 % busy", NVME, 0.2),
    Scene("2 threads, 70 % busy", NVME, 0.7),
    Scene("2 threads, 95 % busy", NVME, 0.95),
    Scene("latency: 50 ms a job, 8 threads", DiskSpeed(0.5e-3, 50e-3, 8, 0.3), 0.5),
    Scene("all requests of 16 blocks", NVME, 0.5, mixed=False),
    Scene("noise 1.0", replace(NVME, noise=1.0), 0.5),
    Scene("stalls: 1 job of 100, 200 ms", replace(NVME, stall_chance=0.01, stall_s=0.2), 0.5),
    Scene("x3 slower", NVME, 0.2, replace(NVME, block_s=2.4e-3)),
    Scene("x10 slower", NVME, 0.05, replace(NVME, block_s=8e-3)),
    Scene("x10 faster", NVME, 0.5, replace(NVME, block_s=0.08e-3)),
]


def play(scene: Scene, ways: dict[str, Way], requests: int, seed: int) -> dict[str, list[list]]:
    """Return for each way (jobs ended since the change, error) of each request counted."""
    luck = random.Random(seed)
    disk = SimDisk(scene.speed, random.Random(seed + 1))
    flights: dict[int, tuple[int, int, float]] = {}
    queue = jobs = ended_since = 0
    now = 0.0
    errors: dict[str, list[list]] = {name: [] for name in ways}

    def ended(job: int, at: float) -> None:
        nonlocal queue, ended_since
        ahead, blocks, began = flights.pop(job)
        queue -= blocks
        ended_since += 1
        for way in ways.values():
            way.ended(ahead, blocks, began, at)

    mean = 52.0 if scene.mixed else 16.0
    cost = mean * (scene.speed.block_s + scene.speed.latency_s / JOB_BLOCKS) / scene.speed.threads
    for request in range(requests):
        now += luck.expovariate(scene.load / cost)
        disk.run_until(now, ended)
        if request == requests // 2 and scene.after:
            disk.speed, ended_since = scene.after, 0
        blocks = round(300 ** luck.random()) if scene.mixed else 16
        ahead_all = queue + blocks
        foretold = {name: way.seconds(ahead_all) for name, way in ways.items()}
        last = now
        while blocks:
            part = min(blocks, JOB_BLOCKS)
            queue += part
            blocks -= part
            jobs += 1
            flights[jobs] = (queue, part, now)
            last = max(last, disk.submit(jobs, part, now))
        counts = request >= (requests // 2 if scene.after else WARM_REQUESTS)
        for name, seconds in foretold.items():
            if counts:
                errors[name].append([ended_since, abs(seconds - (last - now)) / (last - now)])
    return errors


def settled(errors: list[list]) -> int:
    """Return after how many jobs the next 10 requests were foretold well."""
    for place in range(len(errors) - 10):
        if statistics.median(error for _, error in errors[place : place + 10]) < GOOD:
            return errors[place][0]
    return -1


WAIT_S = 5.0
BLOCK_TOKENS = 64
PREFILL = 8_000.0
DISKS = {
    "idle NVMe": (NVME, 0.2),
    "busy NVMe": (NVME, 0.95),
    "asked for more than it can": (NVME, 1.5),
    "as fast as the engine": (replace(NVME, block_s=16e-3), 0.3),
    "three times slower": (replace(NVME, block_s=48e-3), 0.3),
    "stalls 2 s, 1 job of 200": (replace(NVME, stall_chance=0.005, stall_s=2.0), 0.5),
    "object store, 100 ms": (DiskSpeed(2e-3, 0.1, 16, 0.5), 0.3),
}


def first_tokens(speed: DiskSpeed, load: float, rule: str, requests: int, seed: int) -> list[float]:
    """Return the time to first token of each request under one rule."""
    luck = random.Random(seed)
    disk = SimDisk(speed, random.Random(seed + 1))
    costs = Costs(BLOCK_TOKENS, 1)
    costs.note_engine(SessionId(1), PREFILL)
    cost = 52.0 * (speed.block_s + speed.latency_s / JOB_BLOCKS) / speed.threads
    now, jobs = 0.0, 0
    found = []
    for _ in range(requests):
        now += luck.expovariate(load / cost)
        disk.run_until(now, lambda job, at: costs.note_done(TransferId(job), at))
        hit = round(300 ** luck.random())
        blocks, probe = {"load": (hit, 0), "compute": (0, 0)}.get(rule, (0, 0))
        if rule == "decide":
            chosen = costs.choose(SessionId(1), [Run("disk", hit)], 0, now, now + WAIT_S)
            blocks, probe = chosen.load, chosen.probe
        last = now
        for wanted, waits in ((blocks, True), (probe, False)):
            for start in range(0, wanted, JOB_BLOCKS):
                jobs += 1
                part = min(JOB_BLOCKS, wanted - start)
                costs.note_read(TransferId(jobs), "disk", part, now)
                end = disk.submit(jobs, part, now)
                last = max(last, end) if waits else last
        rest = (hit - blocks) * BLOCK_TOKENS + 1
        if last - now > WAIT_S:
            last, rest = now + WAIT_S, hit * BLOCK_TOKENS + 1
        found.append(last - now + rest / PREFILL)
    return found


def print_worth(requests: int, seeds: int) -> None:
    """Print what deciding is worth."""
    rules = ("load", "compute", "decide")
    print("| disk | always load | never load | decide |\n|---|---|---|---|")
    for name, (speed, load) in DISKS.items():
        cells = []
        for rule in rules:
            times: list[float] = []
            for seed in range(seeds):
                times += first_tokens(speed, load, rule, requests, seed)
            tail = statistics.quantiles(times, n=10)[8]
            cells.append(f"{statistics.mean(times) * 1e3:.0f} / {tail * 1e3:.0f} ms")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the tables."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--requests", type=int, default=400)
    options.add_argument("--seeds", type=int, default=5)
    chosen = options.parse_args()
    print(f"| disk and load | {' | '.join(WAYS)} |")
    print("|---|" + "---|" * len(WAYS))
    for scene in SCENES:
        found: dict[str, list[float]] = {name: [] for name in WAYS}
        after: dict[str, list[int]] = {name: [] for name in WAYS}
        for seed in range(chosen.seeds):
            ways = {name: make() for name, make in WAYS.items()}
            for name, errors in play(scene, ways, chosen.requests, seed).items():
                found[name] += [error for _, error in errors]
                after[name].append(settled(errors) if scene.after else 0)
        cells = []
        for name, errors in found.items():
            cuts = statistics.quantiles(errors, n=10)
            cell = f"{cuts[4]:.0%} / {cuts[8]:.0%}"
            if scene.after:
                jobs = statistics.median(after[name])
                cell += f", after {jobs:.0f}" if jobs >= 0 else ", never"
            cells.append(cell)
        print(f"| {scene.name} | {' | '.join(cells)} |", flush=True)
    print()
    print_worth(chosen.requests, chosen.seeds)


if __name__ == "__main__":
    main()
