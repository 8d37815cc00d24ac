"""What the slab writes and reads, beside what fio does on the same disk.

    python bench/slab.py [--directory D] [--json FILE] [--rounds N] [--quick] [--threads N]

Ours is the daemon's own path: jobs of 16 blocks through the executor, seals computed before each
write and after each read, index lines included. The limit is fio with libaio and O_DIRECT, blocks
of the same size in random order, as many in flight as ours has threads, on a file of the same
length beside it. Both files are written once before the clock starts. All sides take turns; the
numbers are medians, the ratio is one median over the other.

`bare` is as many threads that only call preadv or pwritev between the same slots, without seals,
index or executor: fio moves everything through a few buffers that stay in the caches, a tier moves
each block to a place of its own. What is between bare and limit no tier can win back.

Last, how long it takes to find a million blocks of a slab again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kvstrata.core.config import Limits
from kvstrata.core.ids import SequenceHash, SlotId, TransferId
from kvstrata.core.tier import DISK
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.manager import LowerTier, Manager
from kvstrata.policy import make_policy
from kvstrata.pool import Pool
from kvstrata.storage.arena import Arena
from kvstrata.storage.base import PAGE_BYTES, StoredBlock
from kvstrata.storage.entry import ENTRY_BYTES, encode_entry
from kvstrata.storage.seal import seal
from kvstrata.storage.slab import Slab, without_collector
from kvstrata.transfer.base import Job, ReadJob, WriteJob
from kvstrata.transfer.executor import Executor

MIB = 1 << 20
SIZES = (256 << 10, 1 * MIB, 4 * MIB)
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Setup:
    """One measurement's sizes."""

    directory: Path
    """Where both files lie."""
    block_bytes: int
    """Length of a block."""
    total_bytes: int
    """How much each run moves."""
    threads: int
    """How many operations are in flight."""

    @property
    def blocks(self) -> int:
        """Blocks that each run moves."""
        return self.total_bytes // self.block_bytes


class Ours:
    """An arena, a slab and the executor between them."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        blocks, size = setup.blocks, setup.block_bytes
        layout = BlockLayout((Dimension("byte", size),), "int8", 8, "bench")
        self._arena = Arena.create(blocks * (size + 8) + 3 * PAGE_BYTES, layout)
        capacity = blocks * (size + ENTRY_BYTES) + 3 * PAGE_BYTES
        self.slab = Slab.open(str(setup.directory), capacity, layout)
        luck = random.Random(1)
        for slot in range(blocks):
            self._arena.slot(slot)[:] = luck.randbytes(size)
        self._keys = [SequenceHash(luck.randbytes(16)) for _ in range(blocks)]
        bindings = [key + layout.fingerprint for key in self._keys]
        self._seals = [seal(bindings[slot], self._arena.slot(slot)) for slot in range(blocks)]
        self._news = threading.Semaphore(0)
        limits = Limits(transfer_threads=setup.threads)
        self._executor = Executor(
            self._arena, {DISK: self.slab}, layout.fingerprint, limits, notify=self._news.release
        )
        self._targets = list(range(blocks))
        self._transfer = 0

    def write(self) -> float:
        """Write every host block to a random slot; return bytes per second."""
        random.shuffle(self._targets)
        return self._run(
            lambda transfer, part: WriteJob(
                transfer,
                DISK,
                tuple(SlotId(slot) for slot in part),
                tuple(SlotId(self._targets[slot]) for slot in part),
                tuple(self._keys[slot] for slot in part),
                (None,) * len(part),
                tuple(self._seals[slot] for slot in part),
                transfer * 1000,
            )
        )

    def read(self) -> float:
        """Read every block back to where it came from; return bytes per second."""
        return self._run(
            lambda transfer, part: ReadJob(
                transfer,
                DISK,
                tuple(SlotId(self._targets[slot]) for slot in part),
                tuple(SlotId(slot) for slot in part),
                tuple(self._keys[slot] for slot in part),
            )
        )

    def bare(self, way: str) -> float:
        """Move every block by plain system calls; return bytes per second."""
        region, grid = self.slab.region, self.slab.grid
        descriptor = region.direct if region.direct >= 0 else region.descriptor
        call = os.pwritev if way == "write" else os.preadv
        turns = itertools.count()

        def work() -> None:
            while (slot := next(turns)) < self._setup.blocks:
                target = self._targets[slot]
                moved = call(descriptor, [self._arena.slot(slot)], grid.offset(target))
                assert moved == grid.block_bytes, "a short transfer"

        threads = [threading.Thread(target=work) for _ in range(self._setup.threads)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self._setup.total_bytes / (time.perf_counter() - began)

    def close(self) -> None:
        """Give everything back."""
        self._executor.close()
        self._arena.close()
        self.slab.close()

    def _run(self, make: Callable[[TransferId, Sequence[int]], Job]) -> float:
        step = max(
            1,
            min(
                16, int(__import__("os").environ.get("JOBB", "4")) * MIB // self._setup.block_bytes
            ),
        )
        starts = range(0, self._setup.blocks, step)
        jobs: dict[TransferId, tuple[Job, list[bytes]]] = {}
        for start in starts:
            self._transfer += 1
            part = range(start, min(start + step, self._setup.blocks))
            transfer = TransferId(self._transfer)
            jobs[transfer] = make(transfer, part), [self._seals[slot] for slot in part]
        began = time.perf_counter()
        for job, _ in jobs.values():
            assert self._executor.try_submit(job), "more jobs than the executor takes"
        ended = []
        while len(ended) < len(jobs):
            assert self._news.acquire(timeout=TIMEOUT_S), "the disk hangs"
            ended += self._executor.poll()
        seconds = time.perf_counter() - began
        for done in ended:
            assert all(done.ok), done.reason
            assert list(done.checksums) == jobs[done.transfer][1], "other bytes came back"
        return self._setup.total_bytes / seconds


class Fio:
    """The limit."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.run("write")  # lays the file out

    def run(self, way: str) -> float:
        """Write or read the file once in random order; return bytes per second."""
        setup = self._setup
        done = subprocess.run(
            [
                str(shutil.which("fio")),
                "--name=limit",
                f"--filename={setup.directory / 'fio.bin'}",
                f"--size={setup.blocks * setup.block_bytes}",
                f"--bs={setup.block_bytes}",
                f"--rw=rand{way}",
                "--ioengine=libaio",
                "--direct=1",
                f"--iodepth={setup.threads}",
                "--overwrite=1",
                "--output-format=json",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        report = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][way]
        return float(report["bw_bytes"])


def measure(setup: Setup, rounds: int) -> list[dict[str, object]]:
    """Return the lines of one block size."""
    ours, limit = Ours(setup), Fio(setup)
    try:
        io = ours.slab.statistics()[0]["io"]
        ours.write()
        ours.read()
        sides: dict[str, list[Callable[[], float]]] = {
            way: [own, partial(limit.run, way), partial(ours.bare, way)]
            for way, own in (("write", ours.write), ("read", ours.read))
        }
        found: dict[str, list[list[float]]] = {way: [[], [], []] for way in sides}
        for turn in range(rounds):
            for way, calls in sides.items():
                for side in ((turn + place) % 3 for place in range(3)):
                    found[way][side].append(calls[side]())
    finally:
        ours.close()
    lines: list[dict[str, object]] = []
    for way, samples in found.items():
        here, there, bare = map(statistics.median, samples)
        spread = max(max(each) / min(each) for each in samples)
        lines.append(
            {
                "name": f"slab {way}",
                "block_bytes": setup.block_bytes,
                "ours": here / 1e9,
                "limit": there / 1e9,
                "ratio": here / there,
                "bare": bare / 1e9,
                "unit": "GB/s",
                "io": io,
                "spread": spread,
            }
        )
    return lines


def recovery(directory: Path, blocks: int) -> dict[str, object]:
    """Return how long a slab's index of `blocks` lines takes to become a pool that finds them."""
    layout = BlockLayout((Dimension("byte", 64),), "int8", 8, "bench")
    capacity = blocks * (PAGE_BYTES + ENTRY_BYTES) + 3 * PAGE_BYTES
    slab = Slab.open(str(directory), capacity, layout)
    luck, lines, parent = random.Random(2), [], None
    for slot in range(blocks):
        key = SequenceHash(luck.randbytes(16))
        block = StoredBlock(SlotId(slot), key, parent if slot % 64 else None, bytes(16), slot + 1)
        lines.append(encode_entry(block, 64))
        parent = key
    os.pwrite(slab.region.descriptor, b"".join(lines), slab.entry_offset(0))
    slab.close()
    began, cpu = time.perf_counter(), time.process_time()
    slab = Slab.open(str(directory), capacity, layout)
    with without_collector():
        found = slab.recover()
        read_s = time.perf_counter() - began
        tier = LowerTier(DISK, Pool(slab.grid.slots, make_policy("lru")))
        manager = Manager(Pool(1, make_policy("lru")), [tier], Limits())
        manager.recover(found, slab.floor)
    seconds = time.perf_counter() - began
    cpu_s = time.process_time() - cpu
    assert manager.counters.recovered_blocks == blocks, "blocks were lost"
    slab.close()
    return {"blocks": blocks, "index_s": read_s, "seconds": seconds, "cpu_s": cpu_s, "limit_s": 5.0}


def main() -> int:
    """Measure, print a table, write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--directory", type=Path, help="where the files lie; default: temporary")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=Limits().transfer_threads)
    parser.add_argument("--quick", action="store_true", help="only shows that it works")
    chosen = parser.parse_args()
    if shutil.which("fio") is None:
        print("no fio here; Debian: apt install fio", file=sys.stderr)
        return 2
    total, rounds = (32 * MIB, 2) if chosen.quick else (256 * MIB, chosen.rounds)
    paths: list[dict[str, object]] = []
    print(f"{'path':12}{'block':>8}{'ours':>10}{'limit':>10}{'ratio':>8}{'bare':>8}{'spread':>8}")
    for size in SIZES:
        with tempfile.TemporaryDirectory(dir=chosen.directory) as folder:
            for line in measure(Setup(Path(folder), size, total, chosen.threads), rounds):
                paths.append(line)
                print(
                    f"{line['name']:12}{size >> 10:>5}KiB{line['ours']:>10.2f}"
                    f"{line['limit']:>10.2f}{line['ratio']:>8.2f}{line['bare']:>8.2f}{line['spread']:>8.2f}",
                    flush=True,
                )
    with tempfile.TemporaryDirectory(dir=chosen.directory) as folder:
        start = recovery(Path(folder), 10_000 if chosen.quick else 1_000_000)
    print(f"recovery of {start['blocks']:,} blocks: {start['seconds']:.2f} s")
    if chosen.json:
        chosen.json.write_text(
            json.dumps({"paths": paths, "recovery": start}, indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
