"""vLLM's KV events for the blocks in our tiers: who routes by events learns what is kept below.

The daemon says which keys came to a tier and left it; what they stand for, in vLLM's own hashes
and tokens, is known for prompts that this engine has served. So events tell of those only, of
each block once while it is there. What cannot be followed any more (too many blocks, a daemon that
is gone, something missed, new weights) is told of as removed: a router that knows too little costs
time, one that believes too much costs more.
Owner: the engine core's thread. Every call to the daemon is bounded, and none is made before the
interval has passed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from vllm.distributed.kv_events import (
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
)
from vllm.v1.core.kv_cache_utils import (
    generate_block_hash_extra_keys,
    maybe_convert_block_hash,
    to_event_extra_keys,
)

from kvstrata.connectors.vllm.metrics import ConnectorStats
from kvstrata.core.errors import DaemonError
from kvstrata.core.ids import SequenceHash
from kvstrata.core.tier import DISK, HOST
from kvstrata.runtime.messages import split_hashes
from kvstrata.runtime.session import Session

if TYPE_CHECKING:
    from vllm.v1.request import Request

__all__ = ["OWNER", "TierEvents"]

OWNER: Final = "kvstrata"
"""Events' `ownership`, with the tier behind a dot."""
_INTERVAL_S: Final = 0.1
_ANSWERS_MAX: Final = 4
"""Questions in one step; a longer record is read in the next ones."""
_KNOWN_MAX: Final = 1 << 15
"""Blocks that are remembered without having been told of, and as many that were."""


_FIELDS: Final = frozenset(BlockRemoved.__struct_fields__)


@dataclass(slots=True)
class _Block:
    """What a block of ours is in vLLM's words."""

    hashes: list[Any]  # of its pages
    parent: Any | None  # of the page before
    tokens: list[int]
    lora_id: int | None
    lora_name: str | None
    extra_keys: list[Any] | None
    tiers: set[str] = field(default_factory=set)  # where it was told to be


class TierEvents:
    """Turns what the daemon tells into events of vLLM's."""

    def __init__(
        self,
        page_tokens: int,
        block_tokens: int,
        stats: ConnectorStats,
        *,
        known_max: int = _KNOWN_MAX,
    ) -> None:
        """Tell of blocks of `block_tokens` in pages of `page_tokens`, which vLLM hashes."""
        self._stats = stats
        self._page_tokens = page_tokens
        self._pages = block_tokens // page_tokens
        self._known_max = known_max
        self._waiting: dict[SequenceHash, _Block] = {}  # oldest first, as below
        self._told: dict[SequenceHash, _Block] = {}
        self._void = False
        self._epoch = self._cursor = 0
        self._ask_at = 0.0

    def know(self, request: Request, hashes: Sequence[SequenceHash], first: int) -> None:
        """Remember what the blocks of a request from `first` on stand for."""
        for index in range(first, len(hashes)):
            key = hashes[index]
            if key in self._waiting or key in self._told:
                continue
            block = self._block(request, index)
            if block is not None:
                self._waiting[key] = block
        while len(self._waiting) > self._known_max:
            del self._waiting[next(iter(self._waiting))]

    def forget(self) -> None:
        """Tell next time that nothing is kept: what there is belongs to other weights."""
        self._void = True

    def take(self, session: Session) -> list[KVCacheEvent]:
        """Return what happened since the last time; empty while it is too early to ask again."""
        now = time.monotonic()
        up = session.welcome is not None
        if self._void or (self._told and not up) or (up and session.epoch != self._epoch):
            events = list(self._remove_all())
            self._void, self._cursor, self._ask_at = False, 0, 0.0
            self._epoch = session.epoch
            if events or not up:
                return events
        if not up or now < self._ask_at:
            return []
        self._ask_at = now + _INTERVAL_S
        return list(self._ask(session))

    # -- private -------------------------------------------------------------------------------

    def _ask(self, session: Session) -> Iterator[KVCacheEvent]:
        for _ in range(_ANSWERS_MAX):
            try:
                changed = session.changes(self._cursor)
            except DaemonError:  # a lost session has said so itself
                return
            self._cursor = changed.cursor
            if changed.lost:
                self._stats.count("missed_changes")
                yield from self._remove_all()
            for tier, stored, joined in changed.changes:
                keys = split_hashes(joined)
                yield from self._stored(tier, keys) if stored else self._removed(tier, keys)
            if not changed.more:
                return
        self._ask_at = 0.0

    def _stored(self, tier: str, keys: Sequence[SequenceHash]) -> Iterator[KVCacheEvent]:
        untold = 0
        for key in keys:
            block = self._told.get(key)
            if block is None:
                block = self._waiting.pop(key, None)
                if block is None:
                    untold += 1
                    continue
                self._told[key] = block
            if tier in block.tiers:
                continue
            block.tiers.add(tier)
            yield self._event(block, tier)
        while len(self._told) > self._known_max:
            untold += 1
            oldest = self._told.pop(next(iter(self._told)))
            yield from self._gone({each: [oldest] for each in oldest.tiers})
        self._stats.count("untold_blocks", untold)

    def _removed(self, tier: str, keys: Sequence[SequenceHash]) -> Iterator[KVCacheEvent]:
        left = []
        for key in keys:
            block = self._told.get(key)
            if block is None or tier not in block.tiers:
                continue
            left.append(block)
            block.tiers.discard(tier)
            if not block.tiers:  # a request that is still running may have it stored again
                self._waiting[key] = self._told.pop(key)
        yield from self._gone({tier: left})

    def _remove_all(self) -> Iterator[KVCacheEvent]:
        by_tier: dict[str, list[_Block]] = {}
        for block in self._told.values():
            for tier in block.tiers:
                by_tier.setdefault(tier, []).append(block)
            block.tiers = set()
        self._waiting |= self._told  # they may come again
        self._told.clear()
        yield from self._gone(by_tier)

    def _gone(self, by_tier: dict[str, list[_Block]]) -> Iterator[KVCacheEvent]:
        for tier, blocks in by_tier.items():
            if blocks:
                hashes = [name for block in blocks for name in block.hashes]
                yield BlockRemoved(block_hashes=hashes, group_idx=0, **_where(tier))

    def _event(self, block: _Block, tier: str) -> KVCacheEvent:
        return BlockStored(
            block_hashes=block.hashes,
            parent_block_hash=block.parent,
            token_ids=block.tokens,
            block_size=self._page_tokens,
            lora_id=block.lora_id,
            lora_name=block.lora_name,
            extra_keys=block.extra_keys,
            group_idx=0,
            **_where(tier),
        )

    def _block(self, request: Request, index: int) -> _Block | None:
        """Return a request's block in vLLM's words, None if vLLM has not named all of it yet."""
        first, behind = index * self._pages, (index + 1) * self._pages
        names = request.block_hashes
        if behind > len(names):
            return None
        size = self._page_tokens
        extras = [
            generate_block_hash_extra_keys(request, page * size, (page + 1) * size, 0)[0]
            for page in range(first, behind)
        ]
        adapter = request.lora_request
        return _Block(
            [maybe_convert_block_hash(each) for each in names[first:behind]],
            maybe_convert_block_hash(names[first - 1]) if first else None,
            list(request.all_token_ids[first * size : behind * size]),
            adapter.adapter_id if adapter else None,
            adapter.name if adapter else None,
            to_event_extra_keys(extras),
        )


def _where(tier: str) -> dict[str, str]:
    """Return a tier in vLLM's words, as far as this release has them."""
    said = {
        "medium": "CPU" if tier == HOST else "STORAGE",
        "locality": "LOCAL" if tier in {HOST, DISK} else "REMOTE",
        "ownership": f"{OWNER}.{tier}",
    }
    return {name: value for name, value in said.items() if name in _FIELDS}
