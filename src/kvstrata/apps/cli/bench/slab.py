"""What a slab writes and reads, and how long a slab of a million blocks takes to be found again.

Ours is the daemon's own path: jobs of 4 MiB through the executor, seals computed before each write
and after each read, index lines included. The limit is a file of the same length beside it, blocks
of the same size in random order, as many in flight as ours has threads (`limits.py`). Both files
are written once before the clock starts.

`bare` is as many threads that only call preadv or pwritev between the same slots, without seals,
index or executor: fio moves everything through a few buffers that stay in the caches, a tier moves
each block to a place of its own. What is between bare and limit no tier can win back; what is
between ours and bare is what checksum, index and queue cost together. Blocks lie
in what pages a daemon's do by default (docs/adr/0009).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from kvstrata.apps.cli.bench.limits import make_limit
from kvstrata.apps.cli.bench.turns import PathRow, path_of, take_turns
from kvstrata.core.config import BACKEND_DEFAULT, Limits
from kvstrata.core.ids import SequenceHash, SlotId, TransferId
from kvstrata.core.tier import DISK
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.manager import LowerTier, Manager
from kvstrata.policy import make_policy
from kvstrata.pool import Pool
from kvstrata.storage.arena import Arena
from kvstrata.storage.base import PAGE_BYTES, StoredBlock
from kvstrata.storage.entry import ENTRY_BYTES, encode_entry
from kvstrata.storage.hostmemory import HostMemory
from kvstrata.storage.seal import seal
from kvstrata.storage.slab import Slab, without_collector
from kvstrata.transfer.base import Job, JobDone, ReadJob, WriteJob
from kvstrata.transfer.executor import Executor
from kvstrata.transfer.mover import make_mover

__all__ = ["SIZES", "Setup", "measure_mover", "measure_recovery", "measure_slab"]

MIB: Final = 1 << 20
SIZES: Final = (256 << 10, 1 * MIB, 4 * MIB)
"""Lengths of the blocks that are measured."""
TIMEOUT_S: Final = 60.0
_JOB_BYTES: Final = 4 * MIB
_JOB_BLOCKS_MAX: Final = 16


@dataclass(frozen=True, slots=True)
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
    backend: str = BACKEND_DEFAULT
    """What moves the blocks."""

    @property
    def blocks(self) -> int:
        """Blocks that each run moves."""
        return self.total_bytes // self.block_bytes


class _Ours:
    """An arena, a slab and the executor between them."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        blocks, size = setup.blocks, setup.block_bytes
        layout = BlockLayout((Dimension("byte", size),), "int8", 8, "bench")
        room = blocks * (size + 8) + 3 * PAGE_BYTES
        with contextlib.closing(HostMemory.take(room)) as memory:
            self._arena = Arena.create(room, layout, memory)
            self.pages = str(memory.statistics()["pages"])
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
            self._arena,
            {DISK: self.slab},
            layout.fingerprint,
            limits,
            notify=self._news.release,
            mover=make_mover(setup.backend, limits, notify=self._news.release),
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
        step = max(1, min(_JOB_BLOCKS_MAX, _JOB_BYTES // self._setup.block_bytes))
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
        ended: list[JobDone] = []
        while len(ended) < len(jobs):
            assert self._news.acquire(timeout=TIMEOUT_S), "the disk hangs"
            ended += self._executor.poll()
        seconds = time.perf_counter() - began
        for done in ended:
            assert all(done.ok), done.reason
            assert list(done.checksums) == jobs[done.transfer][1], "other bytes came back"
        return self._setup.total_bytes / seconds


def measure_slab(setup: Setup, rounds: int) -> list[PathRow]:
    """Return the lines of one block size: write and read beside the limit, read without seals."""
    ours = _Ours(setup)
    try:
        limit = make_limit(setup.directory, setup.block_bytes, setup.blocks, setup.threads)
        ours.write()
        ours.read()
        found = []
        for way, own in (("write", ours.write), ("read", ours.read)):
            sides: dict[str, Callable[[], float]] = {
                "ours": own,
                "limit": partial(limit.run, way),
                "bare": partial(ours.bare, way),
            }
            samples = take_turns(sides, rounds)
            bare = f"p{way}v of the same slots, no checksum, {setup.threads} threads"
            for name, other, tool in (
                (f"slab {way}", "limit", f"{limit.tool}; ours in {ours.pages}"),
                (f"slab {way} beside bare calls", "bare", bare),
            ):
                line = path_of(name, setup.block_bytes, samples["ours"], samples[other], tool)
                found.append(line)
    finally:
        ours.close()
    return found


def measure_mover(setup: Setup, backend: str, rounds: int) -> list[PathRow]:
    """Return write and read by `backend` beside `setup.backend`, each with a slab of its own.

    Both are the whole job, seals and index lines included.
    """
    with contextlib.ExitStack() as opened:
        sides: dict[str, _Ours] = {}
        for side, name in (("ours", backend), ("limit", setup.backend)):
            folder = Path(opened.enter_context(tempfile.TemporaryDirectory(dir=setup.directory)))
            made = _Ours(replace(setup, directory=folder, backend=name))
            sides[side] = opened.enter_context(contextlib.closing(made))
            made.write()
            made.read()
        found = []
        for way in ("write", "read"):
            samples = take_turns(
                {side: made.write if way == "write" else made.read for side, made in sides.items()},
                rounds,
            )
            found.append(
                path_of(
                    f"slab {way} by {backend}",
                    setup.block_bytes,
                    samples["ours"],
                    samples["limit"],
                    f"{setup.backend}, {setup.threads} threads",
                )
            )
    return found


def measure_recovery(directory: Path, blocks: int) -> dict[str, Any]:
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
    return {
        "name": "slab index recovery",
        "blocks": blocks,
        "index_s": round(read_s, 3),
        "seconds": round(seconds, 3),
        "cpu_s": round(cpu_s, 3),
    }
