"""The host tier's bytes: one shared anonymous file (memfd) that worker processes map too.

    | head: 1 page | generations: 8 bytes a slot, padded | slot 0 | slot 1 | ...

A memfd has no name in any file system, so nothing is left behind however its owner dies; other
processes of the same user open it through `/proc/<owner>/fd/<n>`. A slot's generation changes
whenever the slot is given out for writing: a reader compares it before and after its copy.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from kvstrata.core.errors import ConfigError, DaemonGoneError
from kvstrata.layout import BlockLayout
from kvstrata.storage.base import PAGE_BYTES, MemoryRegion, SlotGrid, StoredBlock, align
from kvstrata.storage.hostmemory import HostMemory, advise_huge
from kvstrata.storage.memory import check_host_size

__all__ = ["Arena", "ArenaAddress"]

_HEAD: Final = struct.Struct("<8s16sQQ")  # magic, layout fingerprint, slots, stride
_MAGIC: Final = b"KVSARENA"
_HUGE: Final = struct.Struct("<B")  # behind the head: whether mappings ask for huge pages


@dataclass(frozen=True, slots=True)
class ArenaAddress:
    """What another process needs to map an arena."""

    path: str
    """`/proc/<pid>/fd/<n>` of the owner."""
    length_bytes: int
    """Length of the whole mapping."""
    slots: int
    """Number of slots."""


class Arena:
    """A mapped arena; its owner's or another process's, the bytes are the same."""

    def __init__(self, descriptor: int, length_bytes: int, layout: BlockLayout, slots: int) -> None:
        """Map an open descriptor. Use `create` or `attach`."""
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, length_bytes)
        self._view = memoryview(self._map)
        table_end = PAGE_BYTES + 8 * slots
        self.generations: memoryview = self._view[PAGE_BYTES:table_end].cast("Q")
        self.length_bytes = length_bytes
        self._grid = SlotGrid(
            base_bytes=align(table_end),
            stride_bytes=align(layout.block_bytes),
            block_bytes=layout.block_bytes,
            slots=slots,
        )

    @classmethod
    def create(
        cls, capacity_bytes: int, layout: BlockLayout, memory: HostMemory | None = None
    ) -> Arena:
        """Make an arena of at most `capacity_bytes`, bookkeeping included.

        In `memory` if given, which its owner still closes; else in memory of its own. Raises
        ConfigError if the machine has no such memory or not one block fits.
        """
        if memory is None:
            check_host_size(capacity_bytes)
        stride = align(layout.block_bytes)
        room = memory.length_bytes if memory else capacity_bytes
        slots = (room - 2 * PAGE_BYTES) // (stride + 8)
        if slots < 1:
            raise ConfigError(
                f"tiers.host: {capacity_bytes} bytes hold not one block of {layout.block_bytes}",
                hint=f"use at least {(stride + 3 * PAGE_BYTES) // 1024 + 1}KiB, better a few GiB",
            )
        length = align(PAGE_BYTES + 8 * slots) + slots * stride
        used = memory or HostMemory.take(length)
        try:
            descriptor = os.dup(used.descriptor)
            try:
                arena = cls(descriptor, used.length_bytes, layout, slots)
            except OSError as error:
                os.close(descriptor)
                raise ConfigError(
                    f"tiers.host: the system refused to map {length} bytes ({error.strerror})",
                    hint="use a smaller host tier or raise the memory limit",
                ) from error
        finally:
            if memory is None:
                used.close()
        if used.transparent_huge:
            advise_huge(arena._map)  # before the first page is touched
        arena._view[: _HEAD.size] = _HEAD.pack(_MAGIC, layout.fingerprint, slots, stride)
        _HUGE.pack_into(arena._view, _HEAD.size, used.transparent_huge)
        return arena

    @classmethod
    def attach(cls, address: ArenaAddress, layout: BlockLayout) -> Arena:
        """Map the arena that another process owns.

        Raises DaemonGoneError if its owner is gone or the system refuses, ConfigError if it is not
        an arena of `layout`.
        """
        try:
            descriptor = os.open(address.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise DaemonGoneError(f"cannot map {address.path}: {error.strerror}") from error
        try:
            _check_head(descriptor, address, layout)
            arena = cls(descriptor, address.length_bytes, layout, address.slots)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError):  # no memory or descriptor left: no reason to end
                raise DaemonGoneError(f"cannot map {address.path}: {error.strerror}") from error
            raise
        if _HUGE.unpack_from(arena._view, _HEAD.size)[0]:
            advise_huge(arena._map)  # who touches a page first decides what it is
        return arena

    @property
    def address(self) -> ArenaAddress:
        """Where other processes find this arena while we live."""
        path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        return ArenaAddress(path, self.length_bytes, self._grid.slots)

    @property
    def region(self) -> MemoryRegion:
        """The whole mapping."""
        return MemoryRegion(self._view, page_aligned=True)

    @property
    def grid(self) -> SlotGrid:
        """Where each slot lies in the mapping."""
        return self._grid

    def slot(self, slot: int) -> memoryview:
        """Return the bytes of one slot's block, writable."""
        start = self._grid.offset(slot)
        return self._view[start : start + self._grid.block_bytes]

    def recover(self) -> Iterable[StoredBlock]:
        """Return nothing: memory does not outlive its owner."""
        return ()

    def sync(self) -> None:
        """Do nothing: memory does not survive a loss of power."""

    def close(self) -> None:
        """Unmap; views that others still hold keep the memory until they are gone."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self._descriptor = -1
        try:
            self.generations.release()
            self._view.release()
            self._map.close()
        except BufferError:
            return  # a copier still has a view: the mapping ends with that view


def _check_head(descriptor: int, address: ArenaAddress, layout: BlockLayout) -> None:
    head = os.pread(descriptor, _HEAD.size, 0)
    expected = _HEAD.pack(_MAGIC, layout.fingerprint, address.slots, align(layout.block_bytes))
    if os.fstat(descriptor).st_size != address.length_bytes or head != expected:
        raise ConfigError(
            f"{address.path} is no arena of {layout.describe()}",
            hint="restart the daemon and the engine with the same kvstrata version",
        )
