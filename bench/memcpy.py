"""How fast the memcpy backend copies between memory regions, beside bare numpy.

    python bench/memcpy.py [--json FILE] [--quick]

Every round times all sides once, in an order that turns by one place; each call moves 64 MiB of a
region of 512 MiB, so that nothing is still in a cache. GB/s are medians. A ratio is the median of
the ratios of single rounds, so that a busy moment meets both of its sides; `cpu` compares the
processor time instead, which neighbours change less, and `quickest` the best round of each side,
which a second core was free for. Blocks of 8 MiB are the longest ops that a plan makes; the backend
cuts them into pieces.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import os
import queue
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from kvstrata.core.ids import TransferId
from kvstrata.storage.base import MemoryRegion
from kvstrata.transfer.backends.memcpy import MemcpyBackend
from kvstrata.transfer.base import CopyOp, Outcome

MIB: Final = 1 << 20
TOTAL: Final = 512 * MIB
CALL: Final = 64 * MIB
SIZES: Final = (256 << 10, MIB, 2 * MIB, 8 * MIB)
RESULTS: Final = Path(__file__).parent / "results" / "memcpy.json"
TIMEOUT_S: Final = 30

Side = Callable[[int, int], None]
"""Offset of a call, length of a block -> nothing; moves `CALL` bytes."""


def region() -> MemoryRegion:
    """Return memory whose pages are there."""
    view = memoryview(mmap.mmap(-1, TOTAL))
    np.frombuffer(view, np.uint8)[:] = 1
    return MemoryRegion(view, page_aligned=True)


def ours(threads: int, source: MemoryRegion, target: MemoryRegion) -> tuple[Side, MemcpyBackend]:
    """Return a side that moves through the backend."""
    news: queue.SimpleQueue[None] = queue.SimpleQueue()
    backend = MemcpyBackend(threads=threads, notify=lambda: news.put(None))

    def run(offset: int, size: int) -> None:
        places = range(offset, offset + CALL, size)
        ops = [CopyOp(place, place, size, index) for index, place in enumerate(places)]
        assert backend.submit(TransferId(1), ops, source, target), "a full queue"
        news.get(timeout=TIMEOUT_S)
        (done,) = backend.poll()
        assert done.outcome is Outcome.DONE, done.reason

    return run, backend


def bare(threads: int, source: MemoryRegion, target: MemoryRegion) -> Side:
    """Return a side of numpy alone."""
    read, write = (np.frombuffer(each.view, np.uint8) for each in (source, target))

    def copy(places: range, size: int) -> None:
        for place in places:
            np.copyto(write[place : place + size], read[place : place + size])

    pool = ThreadPoolExecutor(threads)

    def run(offset: int, size: int) -> None:
        if threads == 1:
            copy(range(offset, offset + CALL, size), size)
            return
        part = CALL // threads
        starts = range(offset, offset + CALL, part)
        for future in [pool.submit(copy, range(at, at + part, size), size) for at in starts]:
            future.result(TIMEOUT_S)

    return run


def measure(size: int, rounds: int) -> dict[str, Any]:
    """Return GB/s of every side for blocks of `size` bytes, and their ratios."""
    source, target = region(), region()
    one, backend_one = ours(1, source, target)
    two, backend_two = ours(2, source, target)
    sides = {"ours_1": one, "ours_2": two}
    sides |= {f"numpy_{threads}": bare(threads, source, target) for threads in (1, 2)}
    names = list(sides)
    taken: dict[str, list[float]] = {name: [] for name in names}
    busy: dict[str, list[float]] = {name: [] for name in names}
    offsets = itertools.cycle(range(0, TOTAL, CALL))
    for turn in range(rounds + 1):
        for name in names:
            offset = next(offsets)
            began, worked = time.perf_counter(), time.process_time()
            sides[name](offset, size)
            seconds, work = time.perf_counter() - began, time.process_time() - worked
            if turn:
                taken[name].append(seconds)
                busy[name].append(work)
        names.append(names.pop(0))
    backend_one.close()
    backend_two.close()

    def ratio(faster: str, slower: str, of: dict[str, list[float]] = taken) -> float:
        pairs = zip(of[slower], of[faster], strict=True)
        return round(median(low / high for low, high in pairs), 3)

    record: dict[str, Any] = {"block_bytes": size}
    for name, seconds in taken.items():
        record[f"{name}_gb_per_s"] = round(CALL / median(seconds) / 1e9, 2)
        record[f"{name}_gb_per_s_best"] = round(CALL / min(seconds) / 1e9, 2)
    record["ours_1_over_numpy_1"] = ratio("ours_1", "numpy_1")
    record["ours_1_over_numpy_1_cpu"] = ratio("ours_1", "numpy_1", busy)
    record["ours_2_over_ours_1"] = ratio("ours_2", "ours_1")
    quickest = min(taken["ours_1"]) / min(taken["ours_2"])
    record["ours_2_over_ours_1_quickest"] = round(quickest, 3)
    record["numpy_2_over_numpy_1"] = ratio("numpy_2", "numpy_1")
    return record


def main(given: list[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Measure copies between memory regions.")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="few rounds: only shows that it works")
    options = parser.parse_args(given)
    load = [round(os.getloadavg()[0], 2)]
    records = []
    for size in SIZES:
        records.append(measure(size, 3 if options.quick else 51))
        print(" ".join(f"{name}={value}" for name, value in records[-1].items()))
    load.append(round(os.getloadavg()[0], 2))
    report = {"cores": os.cpu_count(), "load_average": load, "results": records}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
