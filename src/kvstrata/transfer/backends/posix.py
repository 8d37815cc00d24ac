"""Reads and writes of files and block devices with pread and pwrite on threads."""

from __future__ import annotations

import os
from typing import Any

from kvstrata.core.errors import TransferError
from kvstrata.storage.base import FileRegion, MemoryRegion
from kvstrata.transfer.backends.threaded import ThreadedBackend
from kvstrata.transfer.base import CopyOp

__all__ = ["PosixBackend"]


class PosixBackend(ThreadedBackend):
    """Memory to file and file to memory; a short transfer is continued, an end of file fails."""

    name = "posix"

    def move(self, op: CopyOp, source: Any, target: Any) -> None:
        """Move one op between a memory region and a file region, in either direction."""
        if isinstance(source, FileRegion) and isinstance(target, MemoryRegion):
            self._read(op, source.descriptor, target.view)
        elif isinstance(source, MemoryRegion) and isinstance(target, FileRegion):
            self._write(op, source.view, target.descriptor)
        else:
            raise TransferError("posix moves between memory and a file only", retryable=False)

    def capabilities(self) -> frozenset[tuple[str, str]]:
        """File to memory and memory to file."""
        return frozenset({("file", "memory"), ("memory", "file")})

    def _read(self, op: CopyOp, descriptor: int, memory: memoryview) -> None:
        _check_range(memory, op.target_offset, op.length)
        _check_start(op.source_offset)
        done = 0
        while done < op.length:
            start = op.target_offset + done
            piece = memory[start : op.target_offset + op.length]
            moved = os.preadv(descriptor, [piece], op.source_offset + done)
            if not moved:
                raise TransferError(
                    f"file ended {op.length - done} bytes early at {op.source_offset + done}",
                    retryable=False,
                )
            done += moved

    def _write(self, op: CopyOp, memory: memoryview, descriptor: int) -> None:
        _check_range(memory, op.source_offset, op.length)
        _check_start(op.target_offset)
        done = 0
        while done < op.length:
            piece = memory[op.source_offset + done : op.source_offset + op.length]
            done += os.pwritev(descriptor, [piece], op.target_offset + done)


def _check_range(memory: memoryview, offset: int, length: int) -> None:
    """A slice past the end is silently short, and a short write would be retried for ever."""
    if not 0 <= offset <= len(memory) - length:
        raise TransferError(
            f"bytes {offset} to {offset + length} are outside a region of {len(memory)}",
            retryable=False,
        )


def _check_start(offset: int) -> None:
    """To preadv and pwritev -1 means the file's own position, which nobody here keeps."""
    if offset < 0:
        raise TransferError(f"a file has no byte {offset}", retryable=False)
