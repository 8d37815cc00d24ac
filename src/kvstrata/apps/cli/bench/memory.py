"""Host to host: the memcpy backend beside numpy's copy of the same blocks."""

from __future__ import annotations

import mmap
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Final

import numpy as np

from kvstrata.apps.cli.bench.turns import PathRow, path_of, take_turns, timed
from kvstrata.core.ids import TransferId
from kvstrata.storage.base import MemoryRegion
from kvstrata.transfer.backends.memcpy import MemcpyBackend
from kvstrata.transfer.base import CopyOp, Outcome

__all__ = ["measure_memory"]

BLOCK_BYTES: Final = 1 << 20
TIMEOUT_S: Final = 30.0


class _Blocks:
    """Blocks in random order from one region to another, and both ways to move them."""

    def __init__(self, threads: int, blocks: int) -> None:
        self.size_bytes = blocks * BLOCK_BYTES
        self._regions = [MemoryRegion(memoryview(mmap.mmap(-1, self.size_bytes))) for _ in range(2)]
        self._source, self._target = (np.frombuffer(each.view, np.uint8) for each in self._regions)
        self._source[:] = np.random.default_rng(1).integers(0, 256, self.size_bytes, np.uint8)
        places = random.Random(1).sample(range(blocks), blocks)
        self._ops = [
            CopyOp(place * BLOCK_BYTES, at * BLOCK_BYTES, BLOCK_BYTES, at)
            for at, place in enumerate(places)
        ]
        self._threads = threads
        self._told = threading.Event()
        self._backend = MemcpyBackend(threads=threads, notify=self._told.set)
        self._pool = ThreadPoolExecutor(threads)
        self._transfer = 0

    def ours(self) -> float:
        return timed(self.size_bytes, self._submit)

    def limit(self) -> float:
        return timed(self.size_bytes, self._copy)

    def check(self) -> None:
        """Both must bring the bytes, and not by leaving them there."""
        for move in (self._submit, self._copy):
            self._target[:] = 0
            move()
            for op in self._ops:
                there = self._target[op.target_offset :][: op.length]
                here = self._source[op.source_offset :][: op.length]
                assert np.array_equal(here, there), "other bytes arrived"

    def close(self) -> None:
        self._backend.close()
        self._pool.shutdown()

    def _submit(self) -> None:
        self._told.clear()
        self._transfer += 1
        assert self._backend.submit(TransferId(self._transfer), self._ops, *self._regions)
        assert self._told.wait(TIMEOUT_S), "no completion"
        (done,) = self._backend.poll()
        assert done.outcome is Outcome.DONE, done

    def _copy(self) -> None:
        parts = [self._ops[part :: self._threads] for part in range(self._threads)]
        if self._threads == 1:
            self._copy_part(parts[0])
        else:
            list(self._pool.map(self._copy_part, parts))

    def _copy_part(self, ops: Sequence[CopyOp]) -> None:
        for op in ops:
            np.copyto(
                self._target[op.target_offset :][: op.length],
                self._source[op.source_offset :][: op.length],
            )


def measure_memory(rounds: int, blocks: int) -> list[PathRow]:
    """Return a line for one thread and one for two."""
    found = []
    for threads in (1, 2):
        with closing(_Blocks(threads, blocks)) as side:
            side.check()
            samples = take_turns({"ours": side.ours, "limit": side.limit}, rounds)
        name = f"host copy, {threads} thread{'s' * (threads > 1)}"
        tool = f"numpy copyto, {threads} thread{'s' * (threads > 1)}"
        found.append(path_of(name, BLOCK_BYTES, samples["ours"], samples["limit"], tool))
    return found
