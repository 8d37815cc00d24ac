"""Pages of models with several cache groups or a window: which go where, and their copies.

vLLM gives each group a table of pages. Where a sliding window has moved on, a table has the null
page instead: it holds nothing, and nobody will read what was there. So a load fills whatever pages
vLLM has allocated behind its own hit, and a block is saved only while it has all of its pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstrata.connectors.vllm.metadata import PageCopy
from kvstrata.connectors.vllm.states import load_states
from kvstrata.layout import BlockLayout, GroupedCache
from kvstrata.storage.arena import Arena

__all__ = ["GroupedPages", "first_complete", "load_copy", "save_copy"]

_NULL_PAGE: Final = 0  # vLLM's pool takes it out before it gives any page to a request

Tables = Sequence[Sequence[int]]
"""For each group the engine's pages of one request, from its first token on."""


def load_copy(
    cache: GroupedCache,
    block_tokens: int,
    tables: Tables,
    tokens: range,
    slots: Sequence[int],
) -> tuple[PageCopy, list[int]]:
    """Return what to copy into the pages of `tokens`, and the pages that no slot is there for.

    `tokens` begins and ends with a page of every group; `slots` has one for each block of the
    request, from its first on, or fewer than `tokens` needs. With states see `load_states`.
    """
    if cache.state_groups:
        blocks = range(tokens.start // block_tokens, tokens.stop // block_tokens)
        return load_states(cache, tables, blocks, slots)
    copy, lost = PageCopy([], [], []), []
    for index, (group, table) in enumerate(zip(cache.groups, tables, strict=True)):
        size = group.cache.page_tokens
        places = block_tokens // size
        for page in range(tokens.start // size, tokens.stop // size):
            if table[page] == _NULL_PAGE:
                continue
            block, place = divmod(page, places)
            if block >= len(slots):
                lost.append(table[page])
                continue
            copy.slots.append(slots[block])
            copy.places.append(place)
            copy.pages.append(table[page])
            copy.groups.append(index)
    return copy, lost


def save_copy(
    cache: GroupedCache,
    block_tokens: int,
    tables: Tables,
    blocks: Sequence[int],
    slots: Sequence[int],
) -> PageCopy:
    """Return what to copy from the pages of `blocks` into a slot each; all pages must be there.

    States are not among them: they have slots of their own.
    """
    copy = PageCopy([], [], [])
    for index, (group, table) in enumerate(zip(cache.groups, tables, strict=True)):
        if group.state_bytes:
            continue
        places = block_tokens // group.cache.page_tokens
        for block, slot in zip(blocks, slots, strict=True):
            pages = table[block * places : (block + 1) * places]
            assert len(pages) == places, f"block {block} has {len(pages)} of {places} pages"
            assert _NULL_PAGE not in pages, f"block {block} of group {index} has a null page"
            copy.slots.extend([slot] * places)
            copy.places.extend(range(places))
            copy.pages.extend(pages)
            copy.groups.extend([index] * places)
    return copy


def first_complete(
    cache: GroupedCache, block_tokens: int, tables: Tables, first: int, last: int
) -> int:
    """Return the first block from `first` on behind which, up to `last`, no page is missing."""
    for group, table in zip(cache.groups, tables, strict=True):
        if group.state_bytes:
            continue
        places = block_tokens // group.cache.page_tokens
        pages = table[first * places : last * places]
        if _NULL_PAGE in pages:
            behind = pages[::-1].index(_NULL_PAGE)
            first = last - behind // places
    return first


class GroupedPages:
    """An engine's pages beside the slots that keep them; owned by the worker half."""

    def __init__(
        self,
        cache: GroupedCache,
        layout: BlockLayout,
        pages: Sequence[Sequence[NDArray[np.uint8]]],
        arena: Arena,
        rank: int,
        held: range,
    ) -> None:
        """`pages` has for each group the layers `held`, each `[pages, page bytes]`."""
        grid = arena.grid
        part_bytes = layout.block_bytes // cache.ranks
        self._layers: list[list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]] = [
            [] for _ in cache.groups
        ]
        runs = cache.runs(layout.block_tokens)
        for run in (runs[layer] for layer in held):
            size = cache.groups[run.group].cache.page_bytes
            slots: NDArray[np.uint8] = np.ndarray(
                (
                    grid.slots,
                    layout.block_tokens // cache.groups[run.group].cache.page_tokens,
                    size,
                ),
                np.uint8,
                arena.region.view,
                grid.base_bytes + rank * part_bytes + run.offset_bytes,
                (grid.stride_bytes, size, 1),
            )
            self._layers[run.group].append((pages[run.group][run.place - held.start], slots))

    def layers(self, group: int) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """Return pages and slots of each layer of a group, in the order of the model's layers."""
        return self._layers[group]

    def load(self, copy: PageCopy) -> None:
        """Fill pages from slots."""
        for layers, rows in zip(self._layers, self._rows(copy), strict=True):
            for pages, slots in layers:
                pages[rows.pages] = slots[rows.slots, rows.places]

    def save(self, copy: PageCopy) -> bool:
        """Fill slots from pages; return whether all are filled, which they always are."""
        for layers, rows in zip(self._layers, self._rows(copy), strict=True):
            for pages, slots in layers:
                slots[rows.slots, rows.places] = pages[rows.pages]
        return True

    def _rows(self, copy: PageCopy) -> list[PageCopy]:
        if len(self._layers) == 1:
            return [copy]
        split = [PageCopy([], [], []) for _ in self._layers]
        for slot, place, page, group in zip(
            copy.slots, copy.places, copy.pages, copy.groups, strict=True
        ):
            rows = split[group]
            rows.slots.append(slot)
            rows.places.append(place)
            rows.pages.append(page)
        return split
