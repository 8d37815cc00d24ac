"""Copies between memory regions of this process, on as many threads as a memory bus has use for.

A long op is cut into pieces that several threads take; for its caller it stays one op.
bench/memcpy.py measures what a thread more brings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from kvstrata.core.errors import TransferError
from kvstrata.core.ids import TransferId
from kvstrata.storage.base import MemoryRegion
from kvstrata.transfer.backends.threaded import ThreadedBackend
from kvstrata.transfer.base import Completion, CopyOp, Outcome

__all__ = ["MemcpyBackend", "copy_bytes"]

_PIECE_BYTES: Final = 2 << 20
"""Longer ops are cut: a piece takes several times as long as waking the thread that copies it."""


def copy_bytes(
    source: MemoryRegion, source_offset: int, target: MemoryRegion, target_offset: int, length: int
) -> None:
    """Copy `length` bytes; numpy lets other threads run meanwhile, a slice assignment does not."""
    np.copyto(
        np.frombuffer(target.view, np.uint8, length, target_offset),
        np.frombuffer(source.view, np.uint8, length, source_offset),
    )


class MemcpyBackend(ThreadedBackend):
    """Memory to memory on threads; `submit` and `poll` belong to one thread, as everywhere."""

    name = "memcpy"

    def __init__(
        self,
        *,
        threads: int = 2,
        queue_transfers_max: int = 1024,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the workers; `notify` is called from a worker after each completion."""
        self._cut: dict[TransferId, list[int]] = {}  # for each piece the op that it is of
        self._pieces = threads > 1
        super().__init__(threads=threads, queue_transfers_max=queue_transfers_max, notify=notify)

    def submit(self, transfer: TransferId, ops: Sequence[CopyOp], source: Any, target: Any) -> bool:
        """Queue the transfer, long ops in pieces, or return False if the queue is full."""
        pieces = [(index, piece) for index, op in enumerate(ops) for piece in _cut(op)]
        if len(pieces) == len(ops) or not (self._pieces and _can_cut(ops, source, target)):
            return super().submit(transfer, ops, source, target)
        if not super().submit(transfer, [piece for _, piece in pieces], source, target):
            return False
        self._cut[transfer] = [index for index, _ in pieces]
        return True

    def poll(self) -> list[Completion]:
        """Return what completed since the last call."""
        return [self._of_whole_ops(completion) for completion in super().poll()]

    def _of_whole_ops(self, done: Completion) -> Completion:
        cut = self._cut.pop(done.transfer, None)
        if cut is None or done.outcome is Outcome.DONE:
            return done
        failed = tuple(sorted({cut[piece] for piece in done.failed_ops}))
        return replace(done, failed_ops=failed)

    def move(self, op: CopyOp, source: Any, target: Any) -> None:
        """Copy one op between two memory regions."""
        if not (isinstance(source, MemoryRegion) and isinstance(target, MemoryRegion)):
            raise TransferError("memcpy moves between memory regions only", retryable=False)
        try:
            copy_bytes(source, op.source_offset, target, op.target_offset, op.length)
        except ValueError as error:  # numpy's word for a range outside the region
            raise OSError(f"op {op} is outside its region: {error}") from error

    def capabilities(self) -> frozenset[tuple[str, str]]:
        """Memory to memory only."""
        return frozenset({("memory", "memory")})


def _cut(op: CopyOp) -> list[CopyOp]:
    if op.length <= _PIECE_BYTES:
        return [op]
    return [
        replace(
            op,
            source_offset=op.source_offset + start,
            target_offset=op.target_offset + start,
            length=min(_PIECE_BYTES, op.length - start),
        )
        for start in range(0, op.length, _PIECE_BYTES)
    ]


def _can_cut(ops: Sequence[CopyOp], source: Any, target: Any) -> bool:
    """Say whether pieces do what the ops do: one that fails moves nothing, overlaps are kept."""
    if not (isinstance(source, MemoryRegion) and isinstance(target, MemoryRegion)):
        return False
    return source.view.obj is not target.view.obj and all(
        0 <= op.source_offset <= len(source.view) - op.length
        and 0 <= op.target_offset <= len(target.view) - op.length
        for op in ops
    )
