"""What checksums cost, and what verifying costs an arrival from disk.

    python bench/checksums.py [--json FILE] [--quick] [--directory DIR]

**functions**: blocks of 1 MiB out of 256 MiB, so that they come from memory, and the same block
again and again, which stays in a cache. GB/s per core are bytes over processor time of the thread
that computes. `pause` is the longest time for which another thread could not run while one call
went over 256 MiB, as a share of that call: near 1 means that the interpreter is kept.

**arrival**: 64 blocks of 1 MiB from random slots of a slab into the arena by `PosixBackend`, into
memory that it seals on the way and into memory that it does not. Both in every round, in an
order that changes; the slowdown is the median of the rounds' own, and the processor time likewise.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import queue
import random
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, Final

import blake3
import numpy as np
import xxhash

from kvstrata.core.ids import TransferId
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.arena import Arena
from kvstrata.storage.base import PAGE_BYTES, MemoryRegion
from kvstrata.storage.entry import ENTRY_BYTES
from kvstrata.storage.seal import seal
from kvstrata.storage.slab import Slab
from kvstrata.transfer.backends.posix import PosixBackend
from kvstrata.transfer.base import CopyOp, Outcome
from kvstrata.transfer.sealed import SealedMemory

MIB: Final = 1 << 20
TOTAL: Final = 256 * MIB
BLOCKS: Final = 64
SLOTS: Final = 512
THREADS: Final = 8  # the daemon's default
RESULTS: Final = Path(__file__).parent / "results" / "checksums.json"
TIMEOUT_S: Final = 60

Function = Callable[[memoryview], object]


def functions() -> dict[str, Function]:
    """Return every checksum that is installed here; a copy comes first, for comparison."""
    target = np.empty(TOTAL, np.uint8)

    def copy(data: memoryview) -> None:
        np.copyto(target[: len(data)], np.frombuffer(data, np.uint8))

    found: dict[str, Function] = {
        "copy": copy,
        "xxh3_64": lambda data: xxhash.xxh3_64(data).digest(),
        "xxh3_128": lambda data: xxhash.xxh3_128(data).digest(),
        "blake3": lambda data: blake3.blake3(data).digest(),
        "crc32": zlib.crc32,
        "sha256": lambda data: hashlib.sha256(data).digest(),
    }
    with contextlib.suppress(ImportError):
        found["crc32c"] = import_module("crc32c").crc32c
    return found


def measure_functions(rounds: int) -> list[dict[str, Any]]:
    """Return a line for every function."""
    memory = np.random.default_rng(0).integers(0, 256, TOTAL, np.uint8)
    whole = memoryview(memory)
    blocks = [whole[at : at + MIB] for at in range(0, TOTAL, MIB)]
    found = functions()
    speeds: dict[str, list[list[float]]] = {name: [[], [], [], []] for name in found}
    for turn in range(rounds):
        part = [blocks[(turn * 64 + index) % len(blocks)] for index in range(64)]
        for name, function in found.items():
            cold, cached, two, pause = speeds[name]
            one_cpu, one_wall = _timed(function, part)
            cold.append(64 * MIB / one_cpu / 1e9)
            cached.append(64 * MIB / _timed(function, part[:1] * 64)[0] / 1e9)
            two.append(one_wall / _two_threads(function, part))
            pause.append(_longest_pause(lambda f=function: f(whole)))
    return [
        {
            "name": name,
            "gb_per_s_per_core": round(median(cold), 2),
            "gb_per_s_per_core_cached": round(median(cached), 2),
            "two_threads_over_one": round(median(two), 2),
            "two_threads_over_one_best": round(max(two), 2),
            "pause": round(min(pause), 2),
            "releases_gil": min(pause) < 0.5,
        }
        for name, (cold, cached, two, pause) in speeds.items()
    ]


def _timed(function: Function, blocks: Iterable[memoryview]) -> tuple[float, float]:
    began, worked = time.perf_counter(), time.thread_time()
    for block in blocks:
        function(block)
    return time.thread_time() - worked, time.perf_counter() - began


def _two_threads(function: Function, blocks: list[memoryview]) -> float:
    """Return the seconds that two threads take for half of the blocks each."""
    halves = blocks[::2], blocks[1::2]
    threads = [threading.Thread(target=_timed, args=(function, half)) for half in halves]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def _longest_pause(call: Callable[[], object]) -> float:
    """Return the longest time for which this thread could not run, as a share of the call."""
    times: list[float] = []

    def run() -> None:
        times.append(time.perf_counter())
        call()
        times.append(time.perf_counter())

    worker = threading.Thread(target=run)
    last, pause = time.perf_counter(), 0.0
    worker.start()
    while len(times) < 2:  # begun and ended
        now = time.perf_counter()
        last, pause = now, max(pause, now - last)
    worker.join()
    return max(pause, time.perf_counter() - last) / (times[1] - times[0])


class Arrival:
    """A slab, an arena, and the backend between them."""

    def __init__(self, directory: Path) -> None:
        layout = BlockLayout((Dimension("byte", MIB),), "int8", 8, "bench")
        self._arena = Arena.create(SLOTS * (MIB + 8) + 3 * PAGE_BYTES, layout)
        self._slab = Slab.open(str(directory), SLOTS * (MIB + ENTRY_BYTES) + 3 * PAGE_BYTES, layout)
        self.direct = self._slab.region.direct >= 0
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._backend = PosixBackend(threads=THREADS, notify=lambda: self._news.put(None))
        self._luck = random.Random(1)
        self._bindings = [self._luck.randbytes(16) + layout.fingerprint for _ in range(BLOCKS)]
        self._places = list(range(SLOTS))
        data = np.random.default_rng(0)
        for slot in range(SLOTS):
            np.frombuffer(self._arena.slot(slot), np.uint8)[:] = data.integers(
                0, 256, MIB, np.uint8
            )
        for start in range(0, SLOTS, BLOCKS):
            every = range(start, start + BLOCKS)
            self._move(self._ops(every, every), self._arena.region, self._slab.region)

    def run(self, *, sealed: bool) -> tuple[float, float]:
        """Bring 64 blocks in; return wall and processor seconds."""
        self._luck.shuffle(self._places)
        sources = self._places[:BLOCKS]
        self._luck.shuffle(self._places)
        targets = self._places[:BLOCKS]
        ops = self._ops(sources, targets)
        seals = [b""] * BLOCKS
        target: MemoryRegion | SealedMemory = self._arena.region
        if sealed:
            grid = self._arena.grid
            target = SealedMemory(self._arena.region, grid, tuple(self._bindings), seals)
        began, worked = time.perf_counter(), time.process_time()
        self._move(ops, self._slab.region, target)
        took = time.perf_counter() - began, time.process_time() - worked
        if sealed:
            expected = seal(self._bindings[-1], self._arena.slot(targets[-1]))
            assert seals[-1] == expected, "not what arrived was sealed"
        return took

    def close(self) -> None:
        """Give everything back."""
        self._backend.close()
        self._arena.close()
        self._slab.close()

    def _ops(self, sources: Iterable[int], targets: Iterable[int]) -> list[CopyOp]:
        """Return ops from slots of one side to slots of the other, whose grids differ."""
        ours, theirs = self._arena.grid, self._slab.grid
        pairs = enumerate(zip(sources, targets, strict=True))
        return [CopyOp(theirs.offset(a), ours.offset(b), MIB, at) for at, (a, b) in pairs]

    def _move(self, ops: list[CopyOp], source: Any, target: Any) -> None:
        if isinstance(source, MemoryRegion):
            ops = [CopyOp(op.target_offset, op.source_offset, MIB, op.first) for op in ops]
        assert self._backend.submit(TransferId(1), ops, source, target), "a full queue"
        self._news.get(timeout=TIMEOUT_S)
        (done,) = self._backend.poll()
        assert done.outcome is Outcome.DONE, done.reason


def measure_arrival(directory: Path, rounds: int) -> dict[str, Any]:
    """Return GB/s with and without seals, and what they slow an arrival down by."""
    with contextlib.closing(Arrival(directory)) as arrival:
        taken: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for turn in range(-2, rounds):
            for sealed in (bool(turn % 2), not turn % 2):
                took = arrival.run(sealed=sealed)
                if turn >= 0:
                    taken[sealed].append(took)
        direct = arrival.direct
    pairs = list(zip(taken[True], taken[False], strict=True))
    size = BLOCKS * MIB / 1e9
    return {
        "blocks": BLOCKS,
        "block_bytes": MIB,
        "threads": THREADS,
        "io": "direct" if direct else "buffered",
        "rounds": rounds,
        "bare_gb_per_s": round(size / median(wall for wall, _ in taken[False]), 3),
        "sealed_gb_per_s": round(size / median(wall for wall, _ in taken[True]), 3),
        "slowdown": round(median(ours[0] / bare[0] for ours, bare in pairs) - 1, 4),
        "slowdown_of_medians": round(
            median(wall for wall, _ in taken[True]) / median(wall for wall, _ in taken[False]) - 1,
            4,
        ),
        "slowdown_of_quickest": round(min(taken[True])[0] / min(taken[False])[0] - 1, 4),
        "seal_cpu_ms_per_block": round(
            1000 * median(ours[1] - bare[1] for ours, bare in pairs) / BLOCKS, 3
        ),
        "bare_cpu_ms_per_block": round(1000 * median(cpu for _, cpu in taken[False]) / BLOCKS, 3),
    }


@contextlib.contextmanager
def _folder(directory: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=directory) as name:
        yield Path(name)


def main(given: list[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Measure checksums and what verifying costs.")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="few rounds: only shows that it works")
    parser.add_argument("--directory", type=Path, help="where the slab is; needs 512 MiB")
    options = parser.parse_args(given)
    load = [round(os.getloadavg()[0], 2)]
    with _folder(options.directory) as folder:
        arrival = measure_arrival(folder, 3 if options.quick else 61)
    print(arrival)
    lines = measure_functions(2 if options.quick else 9)
    for line in lines:
        print(line)
    load.append(round(os.getloadavg()[0], 2))
    report = {
        "cores": os.cpu_count(),
        "load_average": load,
        "versions": {
            "xxhash": xxhash.VERSION,
            "blake3": blake3.__version__,
            "zlib": zlib.ZLIB_RUNTIME_VERSION,
        },
        "arrival": arrival,
        "functions": lines,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
