"""An engine's pages on a device beside the slots that keep them: which bytes go where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from kvstrata.connectors.vllm.metadata import PageCopy
from kvstrata.layout import BlockLayout, GroupedCache
from kvstrata.storage.arena import Arena
from kvstrata.transfer.cuda.choose import CopyShape
from kvstrata.transfer.cuda.copier import RunCopier, Ticket
from kvstrata.transfer.cuda.pagelock import BackgroundLock
from kvstrata.transfer.cuda.platform import DevicePlatform
from kvstrata.transfer.cuda.tables import RunTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DeviceBlocks", "DeviceLayer", "copy_shape"]

_TICKETS_MAX: Final = 256
"""Loads, and saves, under way; one more is refused and its pages are computed."""


@dataclass(frozen=True, slots=True)
class DeviceLayer:
    """One layer's pages on the device."""

    tensor: Any
    """The engine's, which is so kept."""
    pages: int
    """How many there are."""
    stride_bytes: int
    """From one page to the next."""
    page_bytes: int
    """Length of one."""

    def __len__(self) -> int:
        """Return the number of pages."""
        return self.pages

    @property
    def address(self) -> int:
        """Where the first page begins."""
        return int(self.tensor.data_ptr())


def copy_shape(cache: GroupedCache) -> CopyShape:
    """Return what copiers are tried with: all layers, with the pages of the first group."""
    first = cache.groups[0].cache
    layers = sum(group.cache.layers for group in cache.groups)
    return CopyShape("this engine's pages", layers, 1, first.page_bytes)


class DeviceBlocks:
    """Copies to and from one arena; owned by the worker half."""

    def __init__(
        self,
        platform: DevicePlatform,
        chosen: Mapping[str, str],
        cache: GroupedCache,
        layout: BlockLayout,
        pages: Sequence[Sequence[Any]],
        arena: Arena,
    ) -> None:
        """Begin to page-lock `arena`; `pages` has for each group its layers, `DeviceLayer` each."""
        self._platform, self._arena, self._cache = platform, arena, cache
        self._pages, self._runs = pages, cache.runs(layout.block_tokens)
        self._places = cache.pages_per_block(layout.block_tokens)
        view = arena.region.view
        self._host: Any = platform.host_tensor(view)
        self._address = int(np.frombuffer(view, np.uint8).ctypes.data)
        layers = [layer.tensor for group in pages for layer in group]
        makers = platform.makers([*_storages(layers), self._host])
        made = {way: makers[name]() for way, name in chosen.items()}
        self._copiers = {
            way: RunCopier(platform.streams, tickets_max=_TICKETS_MAX, mover=mover)
            for way, mover in made.items()
        }
        self._lock = BackgroundLock(
            platform.runtime, self._address, len(view), enter_thread=platform.enter_thread
        )

    @property
    def is_ready(self) -> bool:
        """Whether the arena is page-locked."""
        return self._lock.is_ready

    @property
    def lock(self) -> BackgroundLock:
        """The arena's lock."""
        return self._lock

    def load(self, copy: PageCopy) -> Ticket:
        """Begin to fill pages from slots; CapacityError with too many loads under way."""
        return self._submit(copy, "to_device")

    def save(self, copy: PageCopy) -> Ticket:
        """Begin to fill slots from pages, which the engine's stream may write once they are read.

        CapacityError with too many saves under way.
        """
        ticket = self._submit(copy, "to_host")
        if ticket.issued:  # what comes behind an error is reported as not saved
            ticket.wait_layer(ticket.issued - 1, self._platform.engine_stream())
        return ticket

    def poll(self) -> list[Ticket]:
        """Return the tickets that ended since the last call; never waits."""
        return [ticket for copier in self._copiers.values() for ticket in copier.poll()]

    def close(self) -> bool:
        """Give all back unless a copy is under way, or the lock's thread; return whether it is."""
        busy = [copier for copier in self._copiers.values() if copier.close()]
        if busy or not self._lock.close():
            return False
        self._copiers, self._host = {}, None  # views of the arena: its memory ends with them
        self._arena.close()
        return True

    # -- private -------------------------------------------------------------------------------

    def _submit(self, copy: PageCopy, direction: str) -> Ticket:
        rows = np.array([copy.slots, copy.places, copy.pages], np.int64).reshape(3, -1)
        groups = np.array(copy.groups or [0] * rows.shape[1], np.int64)
        of_group = [rows[:, groups == index] for index in range(len(self._pages))]
        self._check(of_group)
        tables = []
        for run in self._runs:
            table = self._table(of_group[run.group], run, direction)
            if len(table):
                tables.append(table)
        return self._copiers[direction].submit(tables, self._platform.engine_stream())

    def _table(self, rows: NDArray[np.int64], run: Any, direction: str) -> RunTable:
        slots, places, pages = rows
        layer, grid = self._pages[run.group][run.place], self._arena.grid
        device = pages * layer.stride_bytes + layer.address
        host = slots * grid.stride_bytes + places * layer.page_bytes
        host += self._address + grid.base_bytes + run.offset_bytes
        source, target = (host, device) if direction == "to_device" else (device, host)
        return RunTable(source, target, np.full(len(pages), layer.page_bytes, np.int64))

    def _check(self, of_group: Sequence[NDArray[np.int64]]) -> None:
        """Refuse what would leave the memory: a device does not look. IndexError."""
        for index, rows in enumerate(of_group):
            limits = self._arena.grid.slots, self._places[index], len(self._pages[index][0])
            for numbers, limit in zip(rows, limits, strict=True):
                if len(numbers) and not (numbers.min() >= 0 and numbers.max() < limit):
                    raise IndexError(f"a copy names {numbers.max()} of {limit}")


def _storages(tensors: Sequence[Any]) -> list[Any]:
    """Return the memory under the tensors as one-dimensional uint8 tensors, each once."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = torch.tensor([], dtype=torch.uint8, device=tensor.device).set_(
            storage, 0, (storage.nbytes(),), (1,)
        )
    return list(found.values())
