"""Memory whose blocks are sealed by whoever moves them, while their bytes are still in its caches.

As a target: each block's seal is computed right after its bytes arrived. As a source: each block's
seal is computed again just before it is written, and one that differs is left out. A backend says
that it does so by the capabilities `SEALED_READ` and `SEALED_WRITE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvstrata.storage.base import MemoryRegion, SlotGrid
from kvstrata.storage.seal import seal
from kvstrata.transfer.base import CopyOp

__all__ = ["SEALED_READ", "SEALED_WRITE", "SealedMemory"]

SEALED_READ: Final = ("file", "sealed memory")
SEALED_WRITE: Final = ("sealed memory", "file")


@dataclass(frozen=True, slots=True)
class SealedMemory:
    """Blocks of one job in a memory region; op by op they are those from `CopyOp.first` on."""

    region: MemoryRegion
    """Where the blocks are."""
    grid: SlotGrid
    """How far apart blocks lie and how long they are, the last page's rest left out."""
    bindings: tuple[bytes, ...]
    """For each block of the job, key and layout fingerprint."""
    seals: list[bytes]
    """For each block its seal once it was computed, empty bytes before."""
    expected: tuple[bytes, ...] = ()
    """For each block the seal that it must have to be written."""

    def seal(self, op: CopyOp, offset: int) -> None:
        """Compute the seals of the blocks of `op`, which begin at `offset` of the region."""
        for place in range(op.count):
            start = offset + place * self.grid.stride_bytes
            payload = self.region.view[start : start + self.grid.block_bytes]
            index = op.first + place
            self.seals[index] = seal(self.bindings[index], payload)

    def unchanged(self, op: CopyOp) -> list[CopyOp]:
        """Return the parts of `op`, which reads from here, whose blocks still have their seals."""
        self.seal(op, op.source_offset)
        end = op.first + op.count
        if self.seals[op.first : end] == list(self.expected[op.first : end]):
            return [op]
        stride = self.grid.stride_bytes
        return [
            CopyOp(
                op.source_offset + place * stride, op.target_offset + place * stride, stride, index
            )
            for place, index in enumerate(range(op.first, end))
            if self.seals[index] == self.expected[index]
        ]
