"""The seam for tier stores, and the regions that they own. Laws: docs/contracts/tier-store.md."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol, TypeAlias

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.core.tenants import NO_TAG

__all__ = [
    "COUNTER_MAX",
    "NOBODY",
    "PAGE_BYTES",
    "FileRegion",
    "Health",
    "MemoryRegion",
    "Piece",
    "Region",
    "SlotGrid",
    "StoredBlock",
    "StripedRegion",
    "TierStore",
    "align",
]

PAGE_BYTES: Final = 4096
COUNTER_MAX: Final = (1 << 63) - 1
"""Largest write counter that is believed: what follows it still fits into 64 bits."""
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
    page_aligned: bool = False
    """Whether it begins at a page, so that whole pages of it can move past the page cache."""


class Health:
    """How often a file or device failed, and whether it is to be left alone.

    Written by the threads that move bytes, under `lock`, and read by everyone. Reads and writes are
    judged apart: a write into the page cache succeeds on any device. What a full or read-only file
    system refuses is counted and says nothing about the bytes that it keeps.
    """

    FAILURES_MAX: Final = 3
    """Failed reads, or writes, without a good one between them, after which it is left alone."""
    _REFUSALS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})

    def __init__(self, lock: AbstractContextManager[object] | None = None) -> None:
        self.read_errors = 0
        """Reads that failed."""
        self.write_errors = 0
        """Writes that failed."""
        self.direct_refusals = 0
        """Moves that had to go through the page cache after all."""
        self.failed = False
        """Whether it failed so often that nothing is read from or written to it any more."""
        self.reason = ""
        """The last failure, for people."""
        self._in_a_row = [0, 0]  # reads, writes
        self._lock = lock or nullcontext()

    def succeeded(self, *, write: bool) -> None:
        """Take note that a read or a write moved its bytes."""
        if self._in_a_row[write]:
            self._in_a_row[write] = 0

    def failed_to(self, error: OSError, *, write: bool) -> None:
        """Take note that a read or a write failed."""
        with self._lock:
            self.read_errors += not write
            self.write_errors += write
            self.reason = str(error)
            if error.errno not in self._REFUSALS:
                self._in_a_row[write] += 1
                self.failed = self.failed or self._in_a_row[write] >= self.FAILURES_MAX


class Piece(NamedTuple):
    """Contiguous bytes of one file or device."""

    region: FileRegion
    """Where they are."""
    offset: int
    """Where they begin there."""
    length: int
    """How many."""


@dataclass(frozen=True, slots=True)
class FileRegion:
    """An open file or block device, addressed from its start."""

    descriptor: int
    """File descriptor, open for reading and writing; owned by the store."""
    direct: int = -1
    """Another one that moves whole pages past the page cache (O_DIRECT); -1 where it cannot."""
    health: Health = field(default_factory=Health, compare=False)
    """How it has been doing."""

    def pieces(self, offset: int, length: int) -> Sequence[Piece]:
        """Return where these bytes lie: here, in one piece."""
        return (Piece(self, offset, length),)


@dataclass(frozen=True, slots=True)
class StripedRegion:
    """Several files or devices as one address space: slots and index lines dealt round-robin."""

    members: tuple[FileRegion, ...]
    """The files or devices; slot s is in the (s modulo n)-th."""
    member_grid: SlotGrid
    """Where slots lie in each of them."""
    grid: SlotGrid
    """Where slots lie in the address space."""
    lines_offset: int
    """Where index lines begin, in the address space and in each member."""
    line_bytes: int
    """Length of an index line."""

    def pieces(self, offset: int, length: int) -> Sequence[Piece]:
        """Return where these bytes lie, in order; none for bytes that are no slot's and no line's.

        Bytes of several slots are as many pieces.
        """
        here, there = self.grid, self.member_grid
        found: list[Piece] = []
        while length > 0:
            if offset >= here.base_bytes:
                slot, rest = divmod(offset - here.base_bytes, here.stride_bytes)
                unit, base = here.stride_bytes, there.base_bytes
            elif offset >= self.lines_offset:
                slot, rest = divmod(offset - self.lines_offset, self.line_bytes)
                unit, base = self.line_bytes, self.lines_offset
            else:
                return ()
            if slot >= here.slots:
                return ()
            place, member = divmod(slot, len(self.members))
            part = min(unit - rest, length)
            found.append(Piece(self.members[member], base + place * unit + rest, part))
            offset, length = offset + part, length - part
        return found


Region: TypeAlias = MemoryRegion | FileRegion | StripedRegion


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


class StoredBlock(NamedTuple):
    """What a store remembers of one block besides its bytes; a tuple, as a start makes millions."""

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
