"""Copies between memory regions of this process."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvstrata.core.errors import TransferError
from kvstrata.storage.base import MemoryRegion
from kvstrata.transfer.backends.threaded import ThreadedBackend
from kvstrata.transfer.base import CopyOp

__all__ = ["MemcpyBackend", "copy_bytes"]


def copy_bytes(
    source: MemoryRegion, source_offset: int, target: MemoryRegion, target_offset: int, length: int
) -> None:
    """Copy `length` bytes; numpy lets other threads run meanwhile, a slice assignment does not."""
    np.copyto(
        np.frombuffer(target.view, np.uint8, length, target_offset),
        np.frombuffer(source.view, np.uint8, length, source_offset),
    )


class MemcpyBackend(ThreadedBackend):
    """Memory to memory on threads."""

    name = "memcpy"

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
