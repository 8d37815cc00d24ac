"""Which memory and files NIXL knows, each held as long as somebody uses it.

Not thread-safe; the agent calls it under its lock. Memory that is registered stays mapped and
its file descriptor stays open until the last holder lets go, whatever its owner does meanwhile.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from kvstrata.core.errors import TransferError
from kvstrata.storage.base import MemoryRegion
from kvstrata.transfer.backends.nixl.binding import nixl_errors

__all__ = ["FileHold", "MemoryHold", "Registrations", "region_address"]

_REGISTRATIONS_MAX: Final = 4096
_FILE_BYTES: Final = 1 << 62  # a file has no end for a writer; NIXL wants one


def region_address(region: MemoryRegion) -> int:
    """Return where a region begins in our address space."""
    return int(np.frombuffer(region.view, np.uint8).ctypes.data)


class MemoryHold:
    """Registered memory and how many use it."""

    __slots__ = ("address", "array", "holders", "length", "listed")

    def __init__(self, array: np.ndarray[Any, Any], listed: Any) -> None:
        self.array = array  # an exported buffer: its mapping cannot be closed under us
        self.address: int = array.ctypes.data
        self.length = int(array.nbytes)
        self.listed = listed
        self.holders = 0


class FileHold:
    """A registered file, under a descriptor of our own.

    The store may close its descriptor and the number may come to mean another file while NIXL
    still has writes to hand to the kernel.
    """

    __slots__ = ("descriptor", "listed")

    def __init__(self, descriptor: int, listed: Any) -> None:
        self.descriptor = descriptor
        self.listed = listed


class Registrations:
    """Sorted, disjoint memory regions; files come and go with each transfer (3 microseconds)."""

    def __init__(self, binding: Any, raw: Any, memory: Sequence[int], files: Sequence[int]) -> None:
        """Register memory with the backend handles `memory`, files with those in `files`."""
        self._binding, self._raw, self._errors = binding, raw, nixl_errors(binding)
        self._memory_handles, self._file_handles = list(memory), list(files)
        self._starts: list[int] = []
        self._holds: list[MemoryHold] = []

    def __len__(self) -> int:
        return len(self._holds)

    def hold(self, region: MemoryRegion) -> MemoryHold:
        """Register memory, or hold the registration that contains it.

        Raises TransferError if it overlaps one without being inside: NIXL would then find
        neither of them any more. Also if there are too many, or NIXL refuses.
        """
        if not len(region.view):
            raise TransferError("an empty region cannot be registered", retryable=False)
        array = np.frombuffer(region.view, np.uint8)
        address, end = array.ctypes.data, array.ctypes.data + array.nbytes
        place = bisect_right(self._starts, address)
        before = self._holds[place - 1] if place else None
        if before is not None and end <= before.address + before.length:
            before.holders += 1
            return before
        behind = self._starts[place] if place < len(self._starts) else end
        if behind < end or (before is not None and before.address + before.length > address):
            raise TransferError(
                f"memory of {array.nbytes} bytes overlaps a registered region; register the whole "
                "before its parts",
                retryable=False,
            )
        if len(self._holds) >= _REGISTRATIONS_MAX:
            raise TransferError(f"{_REGISTRATIONS_MAX} regions are registered", retryable=True)
        binding = self._binding
        listed = binding.nixlRegDList(binding.DRAM_SEG, [(address, array.nbytes, 0, "")])
        self._register(listed, self._memory_handles)
        hold = MemoryHold(array, listed)
        hold.holders = 1
        self._starts.insert(place, address)
        self._holds.insert(place, hold)
        return hold

    def hold_file(self, descriptor: int) -> FileHold:
        """Register a duplicate of `descriptor`; raises TransferError if it is not open."""
        try:
            own = os.dup(descriptor)
        except OSError as error:
            raise TransferError(f"file {descriptor}: {error.strerror}", retryable=False) from error
        binding = self._binding
        listed = binding.nixlRegDList(binding.FILE_SEG, [(0, _FILE_BYTES, own, "")])
        try:
            self._register(listed, self._file_handles)
        except TransferError:
            os.close(own)
            raise
        return FileHold(own, listed)

    def let_go(self, hold: MemoryHold | FileHold) -> None:
        """Undo one `hold`; the last one deregisters."""
        if isinstance(hold, FileHold):
            if self._raw is not None:
                self._raw.deregisterMem(hold.listed, self._file_handles)
            os.close(hold.descriptor)
            return
        assert hold.holders > 0, "let go more often than held"
        if self._raw is None:
            return  # the agent ended before its holder
        hold.holders -= 1
        if hold.holders:
            return
        place = bisect_right(self._starts, hold.address) - 1
        assert self._holds[place] is hold
        del self._starts[place], self._holds[place]
        self._raw.deregisterMem(hold.listed, self._memory_handles)

    def forget_agent(self) -> None:
        """Drop the reference to the agent; what was registered with it is registered no more."""
        self._raw = None
        self._starts.clear()
        self._holds.clear()

    def _register(self, listed: Any, handles: Sequence[int]) -> None:
        if not handles:
            raise TransferError("no plug-in of this agent serves such a region", retryable=False)
        try:
            self._raw.registerMem(listed, handles)
        except self._errors as error:
            raise TransferError(
                f"NIXL registers no such region: {error}", retryable=False
            ) from error
