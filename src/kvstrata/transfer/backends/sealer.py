"""Computes the seals of blocks in memory: a backend whose ops read and write nothing else.

The source of a transfer is a `SealRequest`; op i covers the block of its i-th binding, and the
seal lands in `seals[i]`, readable once the transfer has completed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvstrata.core.errors import TransferError
from kvstrata.storage.base import MemoryRegion
from kvstrata.storage.seal import seal
from kvstrata.transfer.backends.threaded import ThreadedBackend
from kvstrata.transfer.base import CopyOp

__all__ = ["SealRequest", "SealerBackend"]


@dataclass(frozen=True, slots=True)
class SealRequest:
    """Blocks to seal, and where the seals go."""

    region: MemoryRegion
    """Where the blocks are."""
    bindings: tuple[bytes, ...]
    """For each op, key and layout fingerprint."""
    seals: list[bytes]
    """For each op, its seal once the transfer is done; empty bytes before."""


class SealerBackend(ThreadedBackend):
    """Hashes on threads; xxhash lets other threads run while it hashes a block."""

    name = "sealer"

    def move(self, op: CopyOp, source: Any, target: Any) -> None:
        """Compute one seal; `target` is not used."""
        del target
        request: SealRequest = source
        end = op.source_offset + op.length
        if not 0 <= op.source_offset <= end <= len(request.region.view):
            raise TransferError(f"{op} is outside its region", retryable=False)
        payload = request.region.view[op.source_offset : end]
        request.seals[op.first] = seal(request.bindings[op.first], payload)

    def capabilities(self) -> frozenset[tuple[str, str]]:
        """Memory only, to nowhere."""
        return frozenset({("memory", "seal")})
