"""The canary: before any block, made-up bytes go from the engine's pages to a slot and back.

The slot is in an arena of this process, since a worker makes no calls; what copies is what copies
for the daemon's. The engine's side is read and written through its own tensors, so pages that lie
otherwise than `layout.paged` describes them are found, whatever shapes and strides say.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import torch

from kvstrata.connectors.vllm.metadata import PageCopy
from kvstrata.core.errors import LayoutError
from kvstrata.layout import BlockLayout, GroupedCache
from kvstrata.storage.arena import Arena
from kvstrata.storage.base import PAGE_BYTES, align

__all__ = ["Copier", "fly_canary"]

_SLOTS: Final = 2
_SLOT: Final = 1  # not the first: a wrong stride would not show there


class Copier(Protocol):
    """What copies between the engine's pages and slots."""

    def load(self, copy: PageCopy) -> None:
        """Fill pages from slots."""

    def save(self, copy: PageCopy) -> bool:
        """Fill slots from pages; return whether all are filled."""


def fly_canary(
    cache: GroupedCache,
    layout: BlockLayout,
    tensors: Sequence[Sequence[torch.Tensor]],
    make_copier: Callable[[Arena], Copier],
) -> None:
    """Save and load made-up pages of each group; afterwards every page is as it was.

    `tensors` has for each group its layers as the engine handed them over; their first pages are
    ours to use until this returns. Raises LayoutError if other bytes came back, or if a page was
    written that was not asked for.
    """
    room = _SLOTS * (align(layout.block_bytes) + 8) + 2 * PAGE_BYTES
    arena = Arena.create(room, layout)
    try:
        with torch.inference_mode():  # as the engine may have made them
            _fly(cache, layout, tensors, make_copier(arena))
    finally:
        arena.close()


def _fly(
    cache: GroupedCache,
    layout: BlockLayout,
    tensors: Sequence[Sequence[torch.Tensor]],
    copier: Copier,
) -> None:
    places = cache.pages_per_block(layout.block_tokens)
    # One group after the other: layers of two groups may have the same memory.
    for group, layers in enumerate(tensors):
        raw = [tensor.view(torch.uint8) for tensor in layers]
        _try_group(raw, group, places[group], copier)


def _try_group(raw: Sequence[torch.Tensor], group: int, places: int, copier: Copier) -> None:
    count = min(places, len(raw[0]) - 1)  # vLLM never gives out its first page
    around = range(min(count + 2, len(raw[0])))
    before = [layer[: len(around)].clone() for layer in raw]
    sent = [_random(layer[1 : count + 1]) for layer in raw]
    pages = list(range(count, 0, -1))  # so that a copy which ignores them does not pass
    copy = PageCopy([_SLOT] * count, list(range(count)), pages, [group] * count)
    try:
        for layer, data in zip(raw, sent, strict=True):
            layer[1 : count + 1] = data
        if not copier.save(copy):
            raise _odd("pages could not be stored")
        for layer in raw:
            layer[1 : count + 1] = 0
        copier.load(copy)
        for layer, data, old in zip(raw, sent, before, strict=True):
            if not torch.equal(layer[1 : count + 1], data):
                raise _odd("pages that were stored and loaded came back with other bytes")
            beside = [page for page in around if not 0 < page <= count]
            if not torch.equal(layer[beside], old[beside]):
                raise _odd("a load has changed pages that it was not asked for")
    finally:
        for layer, old in zip(raw, before, strict=True):
            layer[: len(around)] = old


def _random(like: torch.Tensor) -> torch.Tensor:
    data = torch.frombuffer(bytearray(secrets.token_bytes(like.numel())), dtype=torch.uint8)
    return data.reshape(like.shape)


def _odd(what: str) -> LayoutError:
    return LayoutError(
        f"canary: {what}",
        hint="this engine keeps its KV in another way than kvstrata knows; run without the "
        "connector",
    )
