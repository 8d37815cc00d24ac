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
from pathlib import Path
from typing import Final

from kvstrata.core.errors import ConfigError, DaemonGoneError
from kvstrata.layout import BlockLayout
from kvstrata.storage.base import PAGE_BYTES, MemoryRegion, SlotGrid, StoredBlock, align

__all__ = ["Arena", "ArenaAddress", "check_host_size", "machine_memory_bytes"]

_HEAD: Final = struct.Struct("<8s16sQQ")  # magic, layout fingerprint, slots, stride
_MAGIC: Final = b"KVSARENA"
_MEMORY_SHARE_MAX: Final = 0.9  # the rest is for the daemon, the engine and the system
_UNLIMITED: Final = 1 << 60  # cgroup v1 writes a number near 2**63 for "no limit"


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
    def create(cls, capacity_bytes: int, layout: BlockLayout) -> Arena:
        """Make an arena of at most `capacity_bytes`, bookkeeping included.

        Raises ConfigError if the machine has no such memory or not one block fits.
        """
        check_host_size(capacity_bytes)
        stride = align(layout.block_bytes)
        slots = (capacity_bytes - 2 * PAGE_BYTES) // (stride + 8)
        if slots < 1:
            raise ConfigError(
                f"tiers.host: {capacity_bytes} bytes hold not one block of {layout.block_bytes}",
                hint=f"use at least {(stride + 3 * PAGE_BYTES) // 1024 + 1}KiB, better a few GiB",
            )
        length = align(PAGE_BYTES + 8 * slots) + slots * stride
        descriptor = os.memfd_create("kvstrata-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, length)
            arena = cls(descriptor, length, layout, slots)
        except OSError as error:
            os.close(descriptor)
            raise ConfigError(
                f"tiers.host: the system refused {length} bytes of memory ({error.strerror})",
                hint="use a smaller host tier or raise the memory limit",
            ) from error
        arena._view[: _HEAD.size] = _HEAD.pack(_MAGIC, layout.fingerprint, slots, stride)
        return arena

    @classmethod
    def attach(cls, address: ArenaAddress, layout: BlockLayout) -> Arena:
        """Map the arena that another process owns.

        Raises DaemonGoneError if its owner is gone, ConfigError if it is not an arena of `layout`.
        """
        try:
            descriptor = os.open(address.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise DaemonGoneError(f"cannot map {address.path}: {error.strerror}") from error
        try:
            _check_head(descriptor, address, layout)
            return cls(descriptor, address.length_bytes, layout, address.slots)
        except BaseException:
            os.close(descriptor)
            raise

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


def check_host_size(capacity_bytes: int) -> None:
    """Raise ConfigError if a host tier of this size is more than the machine can give."""
    machine = machine_memory_bytes()
    if capacity_bytes > _MEMORY_SHARE_MAX * machine:
        raise ConfigError(
            f"tiers.host: {capacity_bytes} bytes are more than {_MEMORY_SHARE_MAX:.0%} of the "
            f"{machine} bytes that this machine or its cgroup has",
            hint=f"use at most {int(_MEMORY_SHARE_MAX * machine) >> 20}MiB",
        )


def machine_memory_bytes() -> int:
    """Return the memory that this process may use: the machine's or its cgroup's, the smaller."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in _cgroup_limits():
        try:
            text = limit.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < _UNLIMITED:
            found.append(int(text))
    return min(found)


def _cgroup_limits() -> list[Path]:
    """Return the files that may limit us: of our own cgroup and of every one above it."""
    root = Path("/sys/fs/cgroup")
    files = [root / "memory" / "memory.limit_in_bytes"]
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers:
            continue  # version 1: its memory limit is visible at the root of a container
        own = root / path.lstrip("/")
        files += [
            each / "memory.max" for each in (own, *own.parents) if root in (each, *each.parents)
        ]
    return files
