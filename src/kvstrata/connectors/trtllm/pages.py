"""The engine's pages as bytes, from the one pool tensor of V1 or the regions of V2.

V1 hands over one tensor `[pages, layers, kv, elements]`; a page of it is one run, in which each
`[layer, kv]` is `[head, token, channel]`. V2 hands over a `KvCacheLayout`: groups of layers, each
with regions in which a page is one row, and page numbers of its own. A block of ours is its pages
one after the other, each the rows of all regions:

    V1   | page a: layer 0 K, layer 0 V, layer 1 K, ... | page b: ... |
    V2   | page a: group 0 region 0, region 1, group 1 region 0, ... | page b: ... |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

import torch

from kvstrata.core.errors import LayoutError
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.layout.block import DTYPE_BYTES

__all__ = ["EnginePages", "Region", "pages_of_layout", "pages_of_tensor"]

_POOL_DIMENSIONS: Final = 4
_UNKNOWN: Final = "this TensorRT-LLM is unknown to kvstrata; run without the connector"


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes of one group of layers: `[pages, bytes]`, sharing the engine's memory."""

    group: int
    """Position of the group among the engine's groups; page numbers are the group's."""
    rows: torch.Tensor
    """The bytes, uint8."""


@dataclass(frozen=True, slots=True)
class EnginePages:
    """Everything that the engine keeps of a page, and how a block of it is stored."""

    regions: tuple[Region, ...]
    """In the order in which a page is stored."""
    page_tokens: int
    """Tokens in one page."""
    dimensions: tuple[Dimension, ...]
    """Axes of a stored page."""
    dtype: str
    """Element type of a stored page."""
    writer: str
    """Who knows how to read it."""
    whole_offers: bool
    """The engine takes every offer whole, at once (V1); else some may be called off."""

    @property
    def groups(self) -> int:
        """How many groups of layers there are."""
        return 1 + max(region.group for region in self.regions)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in a block."""
        return sum(region.rows.shape[1] for region in self.regions)

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self.regions[0].rows.device

    def count(self, group: int) -> int:
        """Return how many pages the group has."""
        return min(int(each.rows.shape[0]) for each in self.regions if each.group == group)

    def is_page(self, pages: Sequence[int]) -> bool:
        """Return whether `pages`, one of each group, are all pages that exist."""
        return len(pages) == self.groups and all(
            0 <= page < self.count(group) for group, page in enumerate(pages)
        )

    def block_layout(self, block_tokens: int) -> BlockLayout:
        """Return the layout in which blocks of these pages are stored."""
        count = Dimension("page", block_tokens // self.page_tokens)
        return BlockLayout((count, *self.dimensions), self.dtype, block_tokens, self.writer)


def pages_of_tensor(tensor: Any, page_tokens: int, heads: int) -> EnginePages:
    """Return the pages of the V1 manager's pool; raises LayoutError unless it is as expected."""
    shape = tuple(tensor.shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    elements = shape[-1] if len(shape) == _POOL_DIMENSIONS else 0
    known = (
        elements > 0
        and shape[2] == 2  # noqa: PLR2004  # K and V
        and heads > 0
        and elements % (heads * page_tokens) == 0
        and dtype in DTYPE_BYTES
        and tensor.is_contiguous()
    )
    if not known:
        raise LayoutError(
            f"the KV pool is {dtype} {shape}, not contiguous [pages, layers, 2, {heads} heads * "
            f"{page_tokens} tokens * channels]",
            hint=_UNKNOWN,
        )
    rows = tensor.view(shape[0], -1).view(torch.uint8)
    dimensions = (
        Dimension("layer", shape[1]),
        Dimension("kv", 2),
        Dimension("head", heads),
        Dimension("token", page_tokens),
        Dimension("channel", elements // (heads * page_tokens)),
    )
    return EnginePages(
        (Region(0, rows),), page_tokens, dimensions, dtype, "trtllm-pool", whole_offers=True
    )


def pages_of_layout(layout: Any, page_tokens: int) -> EnginePages:
    """Return the pages of the V2 manager; raises LayoutError for what we do not know."""
    if layout.tokens_per_block != page_tokens:
        raise LayoutError(
            f"the KV layout has {layout.tokens_per_block} tokens in a page, the engine's arguments "
            f"{page_tokens}",
            hint=_UNKNOWN,
        )
    regions: list[Region] = []
    said: list[str] = []  # what is where: part of the layout's name, so that another is another
    layers: list[int] = []
    for position, group in enumerate(layout.groups):
        _check_group(position, group)
        layers += group.layer_ids
        for given in (*group.regions, *getattr(group, "replicated_regions", ())):
            rows = given.as_tensor()
            _check_rows(rows, given)
            regions.append(Region(position, rows))
            buffers = ",".join(f"{each.layer_id}.{each.role}" for each in given.buffers)
            said.append(f"{position}:{given.size}:{buffers}")
    if not regions or len(set(layers)) != len(layers):
        raise LayoutError("the KV layout has no regions, or a layer twice", hint=_UNKNOWN)
    size = sum(int(each.rows.shape[1]) for each in regions)
    name = sha256(";".join(said).encode()).hexdigest()[:16]
    dimensions = (Dimension("byte", size),)
    return EnginePages(
        tuple(regions),
        page_tokens,
        dimensions,
        "uint8",
        f"trtllm-regions-x{name}",
        whole_offers=False,
    )


def _check_group(position: int, group: Any) -> None:
    if group.layer_group_id != position:
        raise LayoutError(
            f"layer group {group.layer_group_id} stands at position {position}", hint=_UNKNOWN
        )
    if group.window_size is not None:
        raise LayoutError(
            f"layer group {position} has a window of {group.window_size} tokens",
            hint="only full attention is served; run this model without the connector",
        )
    if any(each.expansion != 1 for region in group.regions for each in region.buffers):
        raise LayoutError(f"layer group {position} has expanded pages", hint=_UNKNOWN)


def _check_rows(rows: Any, region: Any) -> None:
    if rows.dtype != torch.uint8 or tuple(rows.shape) != (region.num_slots, region.size):
        raise LayoutError(
            f"a region's pages are {rows.dtype} {tuple(rows.shape)}, not bytes "
            f"{(region.num_slots, region.size)}",
            hint=_UNKNOWN,
        )
    if region.size > region.stride or not region.size:
        raise LayoutError(
            f"a region has pages of {region.size} bytes, {region.stride} apart", hint=_UNKNOWN
        )
