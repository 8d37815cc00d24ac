"""SGLang's host pool as pages of bytes, and how a page lies in one of our blocks.

A block is one page. Its bytes are the pool's own, page after page, in the order of the pool's
axes; `layer_first` and `page_first_direct` give the same block, `page_first` another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kvstrata.core.errors import LayoutError
from kvstrata.layout import BlockLayout, Dimension, Shard

__all__ = ["Bytes", "FlatPages", "HostPages", "PageSpace", "PoolGeometry", "page_numbers"]

Bytes = NDArray[np.uint8]
"""One row of bytes."""

_REMEDY: Final = "use layer_first, page_first or page_first_direct as hicache-mem-layout"


class PageSpace(Protocol):
    """Where pages are copied from and to."""

    def read(self, page: int, block: Bytes) -> None:
        """Copy a page into a block."""

    def write(self, page: int, block: Bytes) -> None:
        """Copy a block into a page."""


@dataclass(frozen=True, slots=True)
class PoolGeometry:
    """What decides the bytes of a page in a host pool."""

    order: str
    """SGLang's name of the order in memory: `layer_first`, `page_first`, `page_first_direct`."""
    layers: int
    """Layers of this rank."""
    pages: int
    """Pages in the pool."""
    page_tokens: int
    """Tokens in a page."""
    heads: int | None
    """KV heads of this rank; None for a latent cache (MLA), which has no heads and no K and V."""
    channels: int
    """Elements of one token's vector in one layer and head."""
    dtype: str
    """Element type of the pool."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the pool's buffer must have; raises LayoutError for an unknown order."""
        vector = (1 if self.heads is None else self.heads, self.channels)
        tokens = self.pages * self.page_tokens
        split = () if self.heads is None else (2,)
        match self.order:
            case "layer_first":
                return (*split, self.layers, tokens, *vector)
            case "page_first":
                return (*split, tokens, self.layers, *vector)
            case "page_first_direct":
                return (*split, self.pages, self.layers, self.page_tokens, *vector)
            case _:
                raise LayoutError(
                    f"the host pool's layout {self.order!r} is unknown to kvstrata", hint=_REMEDY
                )

    def block_layout(self, shard: Shard) -> BlockLayout:
        """Return the layout of a block that holds one page."""
        assert self.shape, "an unknown order was refused"
        layer, token = Dimension("layer", self.layers), Dimension("token", self.page_tokens)
        inner = (token, layer) if self.order == "page_first" else (layer, token)
        channel = Dimension("channel", self.channels)
        dimensions = [*inner, channel]
        if self.heads is not None:
            dimensions = [Dimension("kv", 2), *inner, Dimension("head", self.heads), channel]
        return BlockLayout(tuple(dimensions), self.dtype, self.page_tokens, "sglang-pages", shard)


class HostPages:
    """A host pool's buffer, cut into pages; shares its memory."""

    def __init__(self, geometry: PoolGeometry, buffer: Bytes, itemsize: int) -> None:
        """`buffer` is the whole pool, flat; raises LayoutError unless its length fits."""
        expected = prod(geometry.shape) * itemsize
        if buffer.ndim != 1 or len(buffer) != expected:
            raise LayoutError(
                f"the host pool has {buffer.size} bytes, not {expected} of {geometry.shape}",
                hint=_REMEDY,
            )
        split = 1 if geometry.heads is None else 2
        lead = (split, geometry.layers) if geometry.order == "layer_first" else (split,)
        # [lead..., pages, bytes]: in every known order a page is contiguous below `lead`.
        self._pages = buffer.reshape(*lead, geometry.pages, -1)
        self._piece = (*lead, self._pages.shape[-1])
        self.count = geometry.pages

    def read(self, page: int, block: Bytes) -> None:
        """Copy a page into a block."""
        block.reshape(self._piece)[...] = self._pages[..., page, :]

    def write(self, page: int, block: Bytes) -> None:
        """Copy a block into a page."""
        self._pages[..., page, :] = block.reshape(self._piece)


class FlatPages:
    """Pages that SGLang hands over one by one, each a flat array (its generic interface)."""

    def __init__(self, arrays: Sequence[Bytes]) -> None:
        self._arrays = arrays

    def read(self, page: int, block: Bytes) -> None:
        """Copy a page into a block."""
        block[...] = self._arrays[page]

    def write(self, page: int, block: Bytes) -> None:
        """Copy a block into a page."""
        self._arrays[page][...] = block


def page_numbers(indices: Any, page_tokens: int, pages: int) -> list[int]:
    """Return the page behind each run of `page_tokens` token indices of SGLang's.

    Raises LayoutError unless every run is one whole page of the pool: anything else is not ours
    to copy.
    """
    tokens = np.asarray(indices).reshape(-1)
    if len(tokens) % page_tokens:
        raise LayoutError(
            f"{len(tokens)} indices are no whole pages of {page_tokens} tokens",
            hint="this SGLang hands over pages in a way that kvstrata does not know",
        )
    runs = tokens.reshape(-1, page_tokens)
    first = runs[:, 0]
    whole = (runs == first[:, None] + np.arange(page_tokens)).all()
    inside = ((first >= 0) & (first < pages * page_tokens) & (first % page_tokens == 0)).all()
    if not (whole and inside):
        raise LayoutError(
            "the indices are not whole pages of the host pool",
            hint="this SGLang hands over pages in a way that kvstrata does not know",
        )
    return [int(each) // page_tokens for each in first]
