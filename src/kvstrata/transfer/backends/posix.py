"""Reads and writes of files and block devices with pread and pwrite on threads.

Whole pages between page-aligned memory and a file that has a direct descriptor go past the page
cache; everything else, index lines above all, goes through it. docs/adr/0009 says why threads.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from kvstrata.core.errors import TransferError
from kvstrata.storage.base import (
    PAGE_BYTES,
    FileRegion,
    MemoryRegion,
    Piece,
    StripedRegion,
)
from kvstrata.transfer.backends.threaded import ThreadedBackend
from kvstrata.transfer.base import CopyOp
from kvstrata.transfer.sealed import SEALED_READ, SEALED_WRITE, SealedMemory

__all__ = ["PosixBackend"]


class PosixBackend(ThreadedBackend):
    """Memory to file and file to memory; a short transfer is continued, an end of file fails.

    What fails and what succeeds is noted in the region's `Health`; a region that failed too often
    is not touched any more.
    """

    name = "posix"

    def move(self, op: CopyOp, source: Any, target: Any) -> None:
        """Move one op between a memory region and a file region, in either direction."""
        if isinstance(target, SealedMemory):
            _move(op, source, target.region)
            target.seal(op, op.target_offset)
        elif isinstance(source, SealedMemory):
            for part in source.unchanged(op):
                _move(part, source.region, target)
        else:
            _move(op, source, target)

    def capabilities(self) -> frozenset[tuple[str, str]]:
        """File to memory and memory to file, sealing on the way if asked to."""
        return frozenset({("file", "memory"), ("memory", "file"), SEALED_READ, SEALED_WRITE})


def _move(op: CopyOp, source: Any, target: Any) -> None:
    if isinstance(source, FileRegion | StripedRegion) and isinstance(target, MemoryRegion):
        memory, place = target, op.target_offset
        pieces = source.pieces(op.source_offset, op.length)
        write = False
    elif isinstance(source, MemoryRegion) and isinstance(target, FileRegion | StripedRegion):
        memory, place = source, op.source_offset
        pieces = target.pieces(op.target_offset, op.length)
        write = True
    else:
        raise TransferError("posix moves between memory and a file only", retryable=False)
    _check_range(memory.view, place, op.length)
    if not pieces:
        raise TransferError(f"{op} is outside its region", retryable=False)
    for piece in pieces:
        _move_piece(piece, memory, place, write=write)
        place += piece.length


def _move_piece(piece: Piece, memory: MemoryRegion, place: int, *, write: bool) -> None:
    region, offset, length = piece
    if offset < 0:  # to preadv and pwritev -1 means the file's own position, which nobody keeps
        raise TransferError(f"a file has no byte {offset}", retryable=False)
    health = region.health
    if health.failed:
        raise TransferError(f"left alone after {health.reason}", retryable=False)
    call = os.pwritev if write else os.preadv
    done = 0
    may_be_direct = region.direct >= 0 and memory.page_aligned
    while done < length:
        descriptor = region.descriptor
        if may_be_direct and not ((place + done) | (offset + done) | (length - done)) % PAGE_BYTES:
            descriptor = region.direct
        part = memory.view[place + done : place + length]
        try:
            moved = call(descriptor, [part], offset + done)
        except OSError as error:
            if error.errno == errno.EINVAL and descriptor == region.direct:
                may_be_direct = False  # cut to a part of a page by some limit, or not allowed here
                health.direct_refusals += 1
                continue
            health.failed_to(error, write=write)
            raise
        if not moved:
            raise TransferError(
                f"file ended {length - done} bytes early at {offset + done}", retryable=False
            )
        done += moved
    health.succeeded(write=write)


def _check_range(memory: memoryview, offset: int, length: int) -> None:
    """A slice past the end is silently short, and a short write would be retried for ever."""
    if not 0 <= offset <= len(memory) - length:
        raise TransferError(
            f"bytes {offset} to {offset + length} are outside a region of {len(memory)}",
            retryable=False,
        )
