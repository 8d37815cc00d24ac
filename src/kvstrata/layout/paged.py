"""The geometry of an engine's paged cache, as bytes: where each layer's page lies.

vLLM 0.32 hands over one 4-D tensor per layer, `[pages, heads, tokens, channels]` with K and V
side by side in the channels (its layout `LBHNC`). Its CPU kernels use the page of a head as they
like, which is copied as it is and named by `packing`. A block of ours covers `block_tokens / page
tokens` pages of every layer and is stored as `[layer, page, head, token, channel]`:

    engine   layer 0: | page 0 | page 1 | page 2 | ...      layer 1: | page 0 | page 1 | ...
    block    | layer 0: page a, page b | layer 1: page a, page b | ... |   (one contiguous run)

Where workers split the heads, a block holds such a run of each, in the order of their ranks: it is
whole once all of them have written theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstrata.core.errors import LayoutError
from kvstrata.layout.block import DTYPE_BYTES, BlockLayout, Dimension

__all__ = ["PagedCache", "page_view"]


@dataclass(frozen=True, slots=True)
class PagedCache:
    """One group of equal layers in an engine's paged cache."""

    layers: int
    """Layers in the group."""
    heads: int
    """KV heads that this worker holds."""
    page_tokens: int
    """Tokens in one page of the engine."""
    channels: int
    """Elements of one token in one head, K and V together."""
    dtype: str
    """Element type, a key of `DTYPE_BYTES`."""
    packing: str = ""
    """Name of the order within a head's page if it is not `[token, channel]`: vLLM's CPU kernels
    pack keys for the instructions that they use (`vec`, `amx`, ...)."""
    ranks: int = 1
    """Workers that split the model's heads."""

    @property
    def writer(self) -> str:
        """Who knows how to read the blocks: different for each packing."""
        return f"vllm-cpu-{self.packing}" if self.packing else "vllm-paged-fused-kv"

    @property
    def page_bytes(self) -> int:
        """Length of one page of one layer in bytes."""
        return self.heads * self.page_tokens * self.channels * DTYPE_BYTES[self.dtype]

    def pages_per_block(self, block_tokens: int) -> int:
        """Return how many pages of a layer one block covers; raises LayoutError for a fraction."""
        if block_tokens % self.page_tokens:
            raise LayoutError(
                f"block_tokens: {block_tokens} is no multiple of the engine's page of "
                f"{self.page_tokens} tokens",
                hint=f"set block_tokens to a multiple of {self.page_tokens}",
            )
        return block_tokens // self.page_tokens

    def block_layout(self, block_tokens: int) -> BlockLayout:
        """Return the layout in which blocks of this cache are stored."""
        return BlockLayout(
            dimensions=(
                *((Dimension("rank", self.ranks),) if self.ranks > 1 else ()),
                Dimension("layer", self.layers),
                Dimension("page", self.pages_per_block(block_tokens)),
                Dimension("head", self.heads),
                Dimension("token", self.page_tokens),
                Dimension("channel", self.channels),
            ),
            dtype=self.dtype,
            block_tokens=block_tokens,
            writer=self.writer,
        )


def page_view(
    cache: PagedCache, shape: Sequence[int], strides: Sequence[int], *, name: str
) -> tuple[int, int]:
    """Return (pages, bytes from one page to the next) of a layer's tensor.

    `shape` and `strides` are the tensor's, in elements. Raises LayoutError unless each page is
    one contiguous `[heads, tokens, channels]` run: anything else is refused, never guessed.
    """
    inner = (cache.heads, cache.page_tokens, cache.channels)
    inner_strides = (cache.page_tokens * cache.channels, cache.channels, 1)
    known = len(shape) == 4 and tuple(shape[1:]) == inner  # noqa: PLR2004
    # A dimension of size 1 may carry any stride: it is never stepped over.
    contiguous = known and all(
        stride == expected or size == 1
        for size, stride, expected in zip(inner, strides[1:], inner_strides, strict=True)
    )
    page_elements = cache.heads * cache.page_tokens * cache.channels
    if not contiguous or strides[0] < page_elements:
        raise LayoutError(
            f"layer {name!r} has shape {tuple(shape)} and strides {tuple(strides)}, not contiguous "
            f"pages of {inner}",
            hint="this engine's KV layout is unknown to kvstrata; see docs/guides/vllm.md for "
            "the tested versions",
        )
    return shape[0], strides[0] * DTYPE_BYTES[cache.dtype]
