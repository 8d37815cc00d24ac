"""What vLLM is told of the rows that our tiers hold for it; it makes KV events of that itself.

A tier of vLLM's names blocks by key, and vLLM adds what it remembers of each key: tokens and parent
where `self_describing_kv_events` is set and it has seen the block since its CPU tier lost it, and
nothing but the hash otherwise. Only blocks that this engine could load are told of: not those of
before a reset, and none once the weights have changed. They are told of as removed instead.
Owner: vLLM's scheduler thread.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.kv_offload.base import Locality, Medium, OffloadingEvent, OffloadKey

from kvstrata.connectors.following import Moved, is_local
from kvstrata.connectors.vllm.events import OWNER
from kvstrata.core.tier import HOST

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec

__all__ = ["RowEvents", "RowName", "publishes"]

log = logging.getLogger("kvstrata.vllm")


class RowName(NamedTuple):
    """A row, as its engine knows it."""

    mark: str
    """Of the time between two resets in which it was stored."""
    key: bytes
    """vLLM's name of it."""


def publishes(spec: OffloadingSpec) -> bool:
    """Return whether vLLM wants events, and can say of rows as much as of what goes with them."""
    wanted = spec.kv_events_config
    if not wanted.enable_kv_cache_events:
        return False
    if wanted.self_describing_kv_events and spec.blocks_per_chunk > 1:
        # vLLM tells of a row as of all its pages, but forgets them at a reset of its connector:
        # of what is removed after it would name the last page only.
        log.warning(
            "kvstrata's tier publishes no KV events with self_describing_kv_events and "
            "blocks_per_chunk above 1"
        )
        return False
    return True


class RowEvents:
    """Passes on what came and went, as long as it can be loaded."""

    def __init__(self) -> None:
        """Have told nothing."""
        self._mark: str | None = ""
        self._told: dict[str, set[OffloadKey]] = {}

    def take(self, mark: str | None, moves: Iterable[Moved[RowName]]) -> list[OffloadingEvent]:
        """Return what happened; only rows under `mark` can be loaded, with None no row can."""
        return [*self._begin(mark), *self._pass_on(moves)]

    def _begin(self, mark: str | None) -> Iterator[OffloadingEvent]:
        if mark == self._mark:
            return
        self._mark = mark
        told, self._told = self._told, {}
        for tier, keys in told.items():
            if keys:
                yield _event(tier, keys, removed=True)

    def _pass_on(self, moves: Iterable[Moved[RowName]]) -> Iterator[OffloadingEvent]:
        for moved in moves:
            told = self._told.setdefault(moved.tier, set())
            named = {OffloadKey(name.key) for name in moved.names if name.mark == self._mark}
            keys = named - told if moved.stored else named & told
            if moved.stored:
                told |= keys
            else:
                told -= keys
            if keys:
                yield _event(moved.tier, keys, removed=not moved.stored)


def _event(tier: str, keys: Collection[OffloadKey], *, removed: bool) -> OffloadingEvent:
    return OffloadingEvent(
        keys=list(keys),
        medium=Medium.CPU if tier == HOST else Medium.STORAGE,
        removed=removed,
        locality=Locality.LOCAL if is_local(tier) else Locality.REMOTE,
        ownership=f"{OWNER}.{tier}",
        removal_expected=True,  # so that vLLM remembers what the key stands for
    )
