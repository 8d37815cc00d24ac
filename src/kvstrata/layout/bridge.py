"""Between an engine's blocks and those of a daemon that holds another layout.

A daemon holds one layout (docs/adr/0004). An engine whose own layout has the same numbers in other
places re-arranges them inside of its copy: one plan serves both ways, so what was stored comes back
as it was (docs/adr/0014).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstrata.core.errors import LayoutError
from kvstrata.layout.block import DTYPE_BYTES, BlockLayout
from kvstrata.layout.transform import plan_transform

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Bridge", "check_bridge"]


def check_bridge(own: BlockLayout, held: BlockLayout) -> None:
    """Raise LayoutError unless blocks of `own` and of `held` are the same numbers, re-arranged."""
    if own == held:
        return
    plan_transform(held, own)
    plan_transform(own, held)
    if own.block_bytes != held.block_bytes:  # the plans cover both: a bug, and wrong KV
        raise LayoutError(
            f"blocks of {own.block_bytes} and {held.block_bytes} bytes have the same numbers?",
            hint="this is a bug of kvstrata; report it",
        )


class Bridge:
    """Copies between blocks of a daemon's layout and an engine's blocks, or one worker's part.

    Holds no state but its plan, so any thread may use it.
    """

    def __init__(self, own: BlockLayout, held: BlockLayout) -> None:
        """Plan the copies; `own` may be the part of one worker, `held` is the whole.

        A block of made-up bytes goes there and back first. Raises LayoutError unless every number
        of `own` has a place in `held`, and comes back to the bit.
        """
        self._plan = plan_transform(held, own)
        self._unit = np.dtype(f"u{DTYPE_BYTES[own.dtype]}")  # bits are moved, whatever they mean
        self.own_bytes = own.block_bytes
        """Length of a block, or part, of the engine's."""
        self._prove(own, held)

    def take(self, held: NDArray[np.uint8], slots: Sequence[int], own: NDArray[np.uint8]) -> None:
        """Fill `own`, `[blocks, own bytes]`, from the slots of `held`, `[slots, block bytes]`."""
        ours, theirs, chosen = own.view(self._unit), held.view(self._unit), list(slots)
        for copy in self._plan:
            place = _view(theirs, copy.source_offset, copy.counts, copy.source_strides)
            _view(ours, copy.target_offset, copy.counts, copy.target_strides)[...] = place[chosen]

    def give(self, own: NDArray[np.uint8], held: NDArray[np.uint8], slots: Sequence[int]) -> None:
        """Put `own`, `[blocks, own bytes]`, into the slots of `held`, `[slots, block bytes]`.

        Of a part only its own bytes of each slot are written.
        """
        ours, theirs, chosen = own.view(self._unit), held.view(self._unit), list(slots)
        for copy in self._plan:
            place = _view(theirs, copy.source_offset, copy.counts, copy.source_strides)
            place[chosen] = _view(ours, copy.target_offset, copy.counts, copy.target_strides)

    def _prove(self, own: BlockLayout, held: BlockLayout) -> None:
        luck = np.random.default_rng(0)
        sent = luck.integers(0, 256, (1, own.block_bytes), np.uint8)
        back, block = ~sent, np.zeros((1, held.block_bytes), np.uint8)
        self.give(sent, block, [0])
        self.take(block, [0], back)
        if not np.array_equal(sent, back):
            raise LayoutError(
                f"a block of {own.describe()} came back as other bits through {held.describe()}",
                hint="this is a bug of kvstrata; report it",
            )


def _view(
    blocks: NDArray[Any], offset: int, counts: Sequence[int], strides: Sequence[int]
) -> NDArray[Any]:
    """Return `[blocks, *counts]` of `[blocks, elements]`, sharing its memory."""
    size = blocks.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(counts, strides, strict=True))
    assert 0 <= offset <= last < blocks.shape[1], "a copy stays inside of its block"
    steps = (blocks.strides[0], *(step * size for step in strides))
    return np.lib.stride_tricks.as_strided(blocks[:, offset:], (blocks.shape[0], *counts), steps)
