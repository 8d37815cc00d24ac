"""Caches whose layers are in several groups: one table of pages each, all in one block.

An engine that serves a model with sliding windows keeps a table of pages for each kind of layer,
and forgets those pages of a window that no query will read again. A block of ours has the pages of
every layer, in the order of the model's layers, whatever group they are in:

    engine   group 0 (layers 0, 2): pages 7 8 9 ...       group 1 (layers 1, 3): pages - - 4 ...
    block    | layer 0: page 7 | layer 1: page - | layer 2: page 7 | layer 3: page - |

Such a block is stored only with all its pages, so that it is the same whoever wrote it. Where
workers split the layers (pipeline stages) each writes the run of its own: the same block, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from math import lcm
from typing import NamedTuple

from kvstrata.core.errors import LayoutError
from kvstrata.layout.block import BlockLayout, Dimension
from kvstrata.layout.paged import PagedCache

__all__ = ["GroupedCache", "LayerGroup", "LayerRun"]


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers with pages of one kind and one table of them."""

    cache: PagedCache
    """Their pages."""
    places: tuple[int, ...]
    """For each of them, which of the model's layers it is."""
    window_tokens: int = 0
    """How many tokens a query sees, itself included; 0 for all."""
    state_bytes: int = 0
    """If a page has no KV but the state behind its last token: its length, without padding."""


class LayerRun(NamedTuple):
    """Where the pages of one layer lie in a block."""

    group: int
    """Index of its group."""
    place: int
    """Its place among the layers of that group."""
    offset_bytes: int
    """Where its first page begins, from the beginning of a worker's part."""


@dataclass(frozen=True, slots=True)
class GroupedCache:
    """All groups of an engine's cache. Raises LayoutError unless each layer is in exactly one."""

    groups: tuple[LayerGroup, ...]
    """The groups, in the engine's order."""
    stages: tuple[range, ...] = ()
    """For each pipeline stage the layers that its workers hold; empty where all hold every one."""

    def __post_init__(self) -> None:
        places = sorted(place for group in self.groups for place in group.places)
        counts = [group.cache.layers == len(group.places) for group in self.groups]
        ranks = {group.cache.ranks for group in self.groups}
        staged = [layer for stage in self.stages for layer in stage]
        if self.stages and (not self.is_whole or staged != places or not all(self.stages)):
            raise LayoutError(
                f"stages: {self.stages} do not split {len(places)} layers of one group",
                hint="this engine's KV layout is unknown to kvstrata; run without the connector",
            )
        if not places or places != list(range(len(places))) or not all(counts) or len(ranks) != 1:
            raise LayoutError(
                f"groups: {[group.places for group in self.groups]} are not each layer once",
                hint="this engine's KV layout is unknown to kvstrata; run without the connector",
            )

    @property
    def ranks(self) -> int:
        """Workers that split the model's heads."""
        return self.groups[0].cache.ranks

    @property
    def workers(self) -> int:
        """Workers that write a part of each block: a block is whole once all of them have."""
        return self.ranks * max(1, len(self.stages))

    def held_by(self, stage: int) -> range:
        """Return the layers of a pipeline stage; raises LayoutError if there is no such stage."""
        stages = self.stages or (range(sum(group.cache.layers for group in self.groups)),)
        if not 0 <= stage < len(stages):
            raise LayoutError(
                f"this worker is of stage {stage} of {len(stages)}",
                hint="this engine is unknown to kvstrata; run without the connector",
            )
        return stages[stage]

    @property
    def page_tokens(self) -> int:
        """The smallest number of tokens that are whole pages in every group."""
        return lcm(*(group.cache.page_tokens for group in self.groups))

    @property
    def is_whole(self) -> bool:
        """Whether any leading part of a prefix in the pages can be used: one group, no window."""
        return len(self.groups) == 1 and not self.groups[0].window_tokens

    @property
    def can_bridge(self) -> bool:
        """Whether its workers can re-arrange blocks of another layout."""
        return self.is_whole and not self.stages

    @property
    def state_groups(self) -> tuple[int, ...]:
        """Which groups keep states; if there are any, each group has blocks of its own."""
        return tuple(index for index, group in enumerate(self.groups) if group.state_bytes)

    @property
    def windows(self) -> tuple[int, ...]:
        """For each chain of blocks how many of its last ones a hit needs; 0 for all.

        The first chain has the pages of attention; each group of states has one more.
        """
        return (0, *(1 for _ in self.state_groups))

    def pages_per_block(self, block_tokens: int) -> list[int]:
        """Return for each group how many of a layer's pages one block covers.

        Raises LayoutError for a fraction.
        """
        return [group.cache.pages_per_block(block_tokens) for group in self.groups]

    def runs(self, block_tokens: int) -> list[LayerRun]:
        """Return where each layer lies in a block, in the order of the model's layers."""
        return list(self._runs(self.pages_per_block(block_tokens)))

    def block_layout(self, block_tokens: int) -> BlockLayout:
        """Return the layout in which blocks of this cache are stored.

        Raises LayoutError for a fraction of a page, and for a window shorter than a block: the
        engine may have forgotten pages of a block before it is complete.
        """
        places = self.pages_per_block(block_tokens)
        if self.state_groups:
            return self._state_layout(block_tokens)
        for group in self.groups:
            if 0 < group.window_tokens < block_tokens:
                raise LayoutError(
                    f"block_tokens: {block_tokens} are more than the sliding window of "
                    f"{group.window_tokens} tokens",
                    hint=f"set block_tokens to {self.page_tokens} or another multiple of it that "
                    f"is at most {group.window_tokens}, or run without the connector",
                )
        layers = sum(group.cache.layers for group in self.groups)
        kinds = {replace(group.cache, layers=layers) for group in self.groups}
        if len(kinds) == 1:
            return kinds.pop().block_layout(block_tokens)
        pages = zip(self.groups, places, strict=True)
        sizes = [g.cache.layers * count * g.cache.page_bytes for g, count in pages]
        ranks = (Dimension("rank", self.ranks),) if self.ranks > 1 else ()
        return BlockLayout(
            dimensions=(*ranks, Dimension("byte", sum(sizes))),
            dtype="uint8",
            block_tokens=block_tokens,
            writer=f"vllm-mixed-{self._digest()}",
        )

    def _state_layout(self, block_tokens: int) -> BlockLayout:
        """Return the layout of a block of any one group; all must be of one size."""
        sizes = {(group.cache.layers, group.cache.page_bytes) for group in self.groups}
        attention = [group for group in self.groups if not group.state_bytes]
        odd = self.ranks != 1 or len(attention) != 1 or any(g.window_tokens for g in attention)
        if odd or len(sizes) != 1:
            kinds = [(g.state_bytes and "states", *g.places, g.window_tokens) for g in self.groups]
            raise LayoutError(
                f"groups: with states only one worker, one group of full attention and as many "
                f"layers in each group are known, not {self.ranks} and {kinds}",
                hint="run this model without the connector",
            )
        pages = {group.cache.page_tokens for group in self.groups}
        if pages != {block_tokens}:
            raise LayoutError(
                f"block_tokens: {block_tokens} is not the engine's page of {min(pages)} tokens",
                hint=f"set block_tokens to {min(pages)}: a model with states has them at ends of "
                "pages only",
            )
        layers, page_bytes = sizes.pop()
        return BlockLayout(
            dimensions=(Dimension("byte", layers * page_bytes),),
            dtype="uint8",
            block_tokens=block_tokens,
            writer=f"vllm-states-{self._digest()}",
        )

    def _runs(self, pages: list[int]) -> Iterator[LayerRun]:
        at = {
            place: (index, number)
            for index, group in enumerate(self.groups)
            for number, place in enumerate(group.places)
        }
        offset = 0
        for place in range(len(at)):
            index, number = at[place]
            yield LayerRun(index, number, offset)
            offset += pages[index] * self.groups[index].cache.page_bytes

    def _digest(self) -> str:
        """Return what tells layouts of unlike layers apart: each layer's own geometry."""
        kinds: list[tuple[object, str]] = sorted(
            (place, repr(replace(group.cache, layers=1)))
            for group in self.groups
            for place in group.places
        )
        # Groups with states are in blocks of their own: which layers are together counts, too.
        kinds += sorted((g.places, str(g.state_bytes)) for g in self.groups if self.state_groups)
        return sha256(repr(kinds).encode()).hexdigest()[:16]
