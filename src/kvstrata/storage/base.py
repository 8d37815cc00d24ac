"""The seam for tier stores, and the regions that they own. Laws: docs/contracts/tier-store.md."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.core.tenants import NO_TAG

__all__ = [
    "NOBODY",
    "FileRegion",
    "MemoryRegion",
    "Region",
    "SlotGrid",
    "StoredBlock",
    "TierStore",
    "align",
]

PAGE_BYTES = 4096
NOBODY: Final = 2 * NO_TAG
"""The owner of a block that nobody in particular stored, or of whom that is not known."""


def align(size_bytes: int) -> int:
    """Return `size_bytes` rounded up to whole pages."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """Writable bytes in this process."""

    view: memoryview
    """One-dimensional view of unsigned bytes."""


@dataclass(frozen=True, slots=True)
class FileRegion:
    """An open file or block device, addressed from its start."""

    descriptor: int
    """File descriptor, open for reading and writing; owned by the store."""


Region: TypeAlias = MemoryRegion | FileRegion


@dataclass(frozen=True, slots=True)
class SlotGrid:
    """Where slots lie in a region: slot s is at `base + s * stride`, `block_bytes` long."""

    base_bytes: int
    """Offset of slot 0 in the region."""
    stride_bytes: int
    """Distance between neighbouring slots; at least `block_bytes`, a multiple of the page."""
    block_bytes: int
    """Length of the block in a slot."""
    slots: int
    """Number of slots."""

    def offset(self, slot: int) -> int:
        """Return where `slot` begins in the region."""
        return self.base_bytes + slot * self.stride_bytes


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """What a store remembers of one block besides its bytes."""

    slot: SlotId
    """Where its bytes are."""
    key: SequenceHash
    """Its sequence hash."""
    parent: SequenceHash | None
    """The key of the block before it, None at the root."""
    checksum: bytes
    """Seal of its bytes (`storage.seal`), 16 bytes."""
    written: int
    """Rises with every write to the store; orders blocks by age after a restart."""
    owner: bytes = NOBODY
    """Who is charged for it: tags of a namespace and of a tenant, 8 bytes each."""


class TierStore(Protocol):
    """Owns the bytes of one tier: a region cut into equal slots.

    A store moves no block bytes itself and knows no states: pools decide, backends move. What it
    recovers it vouches for as an index only; every block's bytes are verified on arrival.
    """

    @property
    def region(self) -> Region:
        """Where the bytes are; valid until `close`."""

    @property
    def grid(self) -> SlotGrid:
        """Where each slot lies in the region."""

    def recover(self) -> Iterable[StoredBlock]:
        """Return the blocks that an earlier life of this store left, oldest first."""

    def sync(self) -> None:
        """Return once everything written so far would survive a loss of power."""

    def close(self) -> None:
        """Give back descriptors and memory; twice is harmless."""
