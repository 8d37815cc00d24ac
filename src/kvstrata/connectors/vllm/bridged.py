"""Copies between the engine's pages and blocks of another layout, through whole blocks.

A page is scattered over a block of another layout, so whole blocks of the engine's own order are
put together in a buffer, and re-arranged from there (`layout.bridge`). Each worker moves its heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstrata.connectors.vllm.metadata import PageCopy
from kvstrata.layout import Bridge, PagedCache
from kvstrata.storage.arena import Arena

__all__ = ["BridgedPages"]

_BUFFER_BYTES: Final = 16 << 20  # of blocks on their way, one block at least


@dataclass(frozen=True, slots=True)
class _Batch:
    slots: list[int]
    at: list[int]  # of each row, the position of its slot in `slots`
    places: list[int]
    pages: list[int]


class BridgedPages:
    """Owner: the engine's model runner thread. Keeps the arena's memory mapped while it lives."""

    def __init__(
        self,
        bridge: Bridge,
        arena: Arena,
        cache: PagedCache,
        pages: Sequence[NDArray[np.uint8]],
    ) -> None:
        """`pages` are those of each layer, `[pages, page bytes]`; `bridge` is for this worker."""
        self._bridge, self._pages = bridge, pages
        grid = arena.grid
        self._blocks: NDArray[np.uint8] = np.ndarray(
            (grid.slots, grid.block_bytes),
            np.uint8,
            arena.region.view,
            grid.base_bytes,
            (grid.stride_bytes, 1),
        )
        layer_bytes = bridge.own_bytes // cache.layers
        self._shape = cache.layers, layer_bytes // cache.page_bytes, cache.page_bytes

    def load(self, copy: PageCopy) -> None:
        """Fill the engine's pages."""
        for batch in self._batches(copy):
            buffer = self._buffer(len(batch.slots))
            self._bridge.take(self._blocks, batch.slots, buffer.reshape(len(batch.slots), -1))
            for layer, pages in enumerate(self._pages):
                pages[batch.pages] = buffer[batch.at, layer, batch.places]

    def save(self, copy: PageCopy) -> bool:
        """Fill the slots; return False, and leave some unfilled, if a block's pages have holes."""
        for batch in self._batches(copy):
            buffer = self._buffer(len(batch.slots))
            named = set(zip(batch.at, batch.places, strict=True))
            if len(named) != len(batch.slots) * self._shape[1]:
                return False  # the holes would be filled with what the buffer had
            for layer, pages in enumerate(self._pages):
                buffer[batch.at, layer, batch.places] = pages[batch.pages]
            self._bridge.give(buffer.reshape(len(batch.slots), -1), self._blocks, batch.slots)
        return True

    def _buffer(self, blocks: int) -> NDArray[np.uint8]:
        """Return room for so many blocks in the engine's order: `[block, layer, place, page]`."""
        return np.empty((blocks, *self._shape), np.uint8)

    def _batches(self, copy: PageCopy) -> Iterator[_Batch]:
        """Yield a few slots at a time, with what `copy` wants of them."""
        rows: dict[int, list[int]] = {}
        for row, slot in enumerate(copy.slots):
            rows.setdefault(slot, []).append(row)
        slots, size = list(rows), max(1, _BUFFER_BYTES // self._bridge.own_bytes)
        for start in range(0, len(slots), size):
            few = slots[start : start + size]
            wanted = [row for slot in few for row in rows[slot]]
            yield _Batch(
                few,
                [at for at, slot in enumerate(few) for _ in rows[slot]],
                [copy.places[row] for row in wanted],
                [copy.pages[row] for row in wanted],
            )
