"""The slots of the daemon's arena as blocks of the model's own layout.

They are read and filled in place where the daemon holds that layout, and through a buffer that
`layout.bridge` re-arranges where it holds another one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvstrata.layout import BlockLayout, Bridge
from kvstrata.storage.arena import Arena

__all__ = ["ArenaBlocks"]


class ArenaBlocks:
    """Owner: the thread that runs the model. Keeps the arena's memory mapped while it lives."""

    def __init__(
        self, arena: Arena, own: BlockLayout, held: BlockLayout, dtype: torch.dtype
    ) -> None:
        """Use `arena`, whose blocks have the layout `held`; raises LayoutError if it cannot be."""
        self._shape = tuple(each.size for each in own.dimensions)
        self._dtype = dtype
        self._bridge = None if own == held else Bridge(own, held)
        grid = arena.grid
        self._bytes: NDArray[np.uint8] = np.ndarray(
            (grid.slots, grid.block_bytes),
            np.uint8,
            arena.region.view,
            grid.base_bytes,
            (grid.stride_bytes, 1),
        )
        steps = [1]
        for each in reversed(self._shape[1:]):
            steps.insert(0, steps[0] * each)
        flat = torch.frombuffer(arena.region.view, dtype=dtype)
        size = dtype.itemsize
        self._slots = flat.as_strided(
            (grid.slots, *self._shape), (grid.stride_bytes // size, *steps), grid.base_bytes // size
        )

    def take(self, slots: Sequence[int]) -> tuple[torch.Tensor, Sequence[int]]:
        """Return blocks, `[blocks, *own axes]`, and which of them each slot's is."""
        if self._bridge is None:
            return self._slots, slots
        blocks, places = self.room(slots)
        self._bridge.take(self._bytes, slots, _bytes(blocks))
        return blocks, places

    def room(self, slots: Sequence[int]) -> tuple[torch.Tensor, Sequence[int]]:
        """Return blocks to fill, as `take`; they reach their slots with `give` at the latest."""
        if self._bridge is None:
            return self._slots, slots
        return torch.empty((len(slots), *self._shape), dtype=self._dtype), range(len(slots))

    def give(self, blocks: torch.Tensor, slots: Sequence[int]) -> None:
        """Put what `room` gave, filled, into the slots that it was asked for."""
        if self._bridge:
            self._bridge.give(_bytes(blocks), self._bytes, slots)


def _bytes(blocks: torch.Tensor) -> NDArray[np.uint8]:
    flat: NDArray[np.uint8] = blocks.view(len(blocks), -1).view(torch.uint8).numpy()
    return flat
