"""vLLM's KV events for the blocks in our tiers: who routes by events learns what is kept below.

What the daemon holds is followed by key (`connectors/following.py`); here keys get vLLM's words.
vLLM names each page of each of its cache groups, and its events say of which group. A block of ours
is told of in every group whose pages it has:

    all layers' pages in one block      an event for each group, of the same tokens
    models with states                  attention's blocks in its group, a state in its own

So who knows vLLM's rules of what a hit needs in each group (its events say kind and window) can
tell how far a prefix goes, and an event never says more than that its own group's KV is there.
New weights make everything kept worthless: then it is told of as removed.
Owner: the engine core's thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vllm.distributed.kv_events import (
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
)
from vllm.v1.core.kv_cache_utils import (
    generate_block_hash_extra_keys,
    maybe_convert_block_hash,
    resolve_kv_cache_block_sizes,
    to_event_extra_keys,
)
from vllm.v1.kv_cache_interface import (
    get_kv_cache_spec_kind,
    get_kv_cache_spec_sliding_window,
)

from kvstrata.connectors.following import INTERVAL_S, Follower, Moved, is_local
from kvstrata.connectors.vllm.metrics import ConnectorStats
from kvstrata.connectors.vllm.states import chains
from kvstrata.core.ids import SequenceHash
from kvstrata.core.tier import HOST
from kvstrata.layout import BlockLayout, GroupedCache
from kvstrata.runtime.session import Session

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

__all__ = ["OWNER", "EventGroup", "EventWords", "TierEvents", "event_words"]

OWNER: Final = "kvstrata"
"""Events' `ownership`, with the tier behind a dot."""
_FIELDS: Final = frozenset(BlockRemoved.__struct_fields__)


class EventGroup(NamedTuple):
    """One of vLLM's cache groups, as its events name it."""

    number: int
    """Its place among the engine's groups."""
    page_tokens: int
    """Tokens in one of its pages."""
    kind: str
    """vLLM's word for how its layers attend."""
    window: int | None
    """How many tokens they see, None for all."""


@dataclass(frozen=True, slots=True)
class EventWords:
    """How an engine's blocks are called in vLLM's events."""

    cache: GroupedCache
    """The engine's groups."""
    block_tokens: int
    """Tokens in a block."""
    hash_tokens: int
    """Tokens behind each of which vLLM has a hash; all groups' pages are multiples of it."""
    groups: tuple[EventGroup, ...]
    """The groups again, in vLLM's words."""

    @property
    def chains(self) -> list[tuple[EventGroup, ...]]:
        """Return for each chain of keys (see `states.chains`) the groups whose KV it holds."""
        states = self.cache.state_groups
        pages = tuple(group for group in self.groups if group.number not in states)
        return [pages, *((self.groups[number],) for number in states)]


def event_words(
    config: VllmConfig, kv_cache_config: KVCacheConfig, cache: GroupedCache, layout: BlockLayout
) -> EventWords:
    """Return how the blocks of an engine are called."""
    _, hash_tokens = resolve_kv_cache_block_sizes(kv_cache_config, config)
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    groups = [
        EventGroup(
            number,
            group.cache.page_tokens,
            str(get_kv_cache_spec_kind(spec).value),
            get_kv_cache_spec_sliding_window(spec),
        )
        for number, (group, spec) in enumerate(zip(cache.groups, specs, strict=True))
    ]
    return EventWords(cache, layout.block_tokens, hash_tokens, tuple(groups))


class _Pages(NamedTuple):
    """A block's pages of one length, in vLLM's words."""

    hashes: list[Any]
    parent: Any | None  # of the page before
    extra_keys: list[Any] | None


class _Block(NamedTuple):
    """What a block of ours is in vLLM's words, whatever its group."""

    tokens: list[int]
    lora_id: int | None
    lora_name: str | None
    pages: dict[int, _Pages]  # by their tokens


class _Name(NamedTuple):
    block: _Block
    groups: tuple[EventGroup, ...]


class TierEvents:
    """Turns what the daemon tells into events of vLLM's."""

    def __init__(
        self,
        words: EventWords,
        stats: ConnectorStats,
        *,
        interval_s: float = INTERVAL_S,
    ) -> None:
        """Tell of an engine's blocks, and ask at most once in `interval_s`."""
        self._follower = Follower[_Name](stats.count, interval_s=interval_s)
        self._words = words
        self._chains = words.chains
        self._sizes = {group.page_tokens for group in words.groups}

    def know(self, request: Request, hashes: Sequence[SequenceHash], first: int) -> None:
        """Remember what the blocks of a request from `first` on stand for."""
        fresh = hashes[first:]
        keys = chains(self._words.cache, fresh)
        for place in range(len(fresh)):
            own = keys[place :: len(fresh)]  # of this block in each chain
            if all(map(self._follower.knows, own)):
                continue
            block = self._block(request, first + place)
            if block is None:
                continue
            for key, groups in zip(own, self._chains, strict=True):
                self._follower.know(key, _Name(block, groups))

    def forget(self) -> None:
        """Tell next time that nothing is kept: what there is belongs to other weights."""
        self._follower.forget()

    def take(self, session: Session) -> list[KVCacheEvent]:
        """Return what happened since the last time; empty while it is too early to ask again."""
        return [event for moved in self._follower.take(session) for event in _events(moved)]

    # -- private -------------------------------------------------------------------------------

    def _block(self, request: Request, index: int) -> _Block | None:
        """Return a request's block in vLLM's words, None if vLLM has not named all of it yet."""
        tokens = range(index * self._words.block_tokens, (index + 1) * self._words.block_tokens)
        if tokens.stop > len(request.block_hashes) * self._words.hash_tokens:
            return None
        adapter = request.lora_request
        return _Block(
            list(request.all_token_ids[tokens.start : tokens.stop]),
            adapter.adapter_id if adapter else None,
            adapter.name if adapter else None,
            {size: self._pages(request, tokens, size) for size in self._sizes},
        )

    def _pages(self, request: Request, tokens: range, size: int) -> _Pages:
        starts = range(tokens.start, tokens.stop, size)
        extras = [
            generate_block_hash_extra_keys(request, start, start + size, 0)[0] for start in starts
        ]
        return _Pages(
            [self._name_behind(request, start + size) for start in starts],
            self._name_behind(request, tokens.start) if tokens.start else None,
            to_event_extra_keys(extras),
        )

    def _name_behind(self, request: Request, tokens: int) -> Any:
        """Return vLLM's name of the page that ends behind so many tokens, in any group.

        Its hashes are chained from the root, so that of a long page is the last one in it.
        """
        return maybe_convert_block_hash(request.block_hashes[tokens // self._words.hash_tokens - 1])


def _events(moved: Moved[_Name]) -> Iterator[KVCacheEvent]:
    where = _where(moved.tier)
    if moved.stored:
        for name in moved.names:
            for group in name.groups:
                yield _stored(name.block, group, where)
        return
    gone: dict[int, list[Any]] = {}
    for name in moved.names:
        for group in name.groups:
            gone.setdefault(group.number, []).extend(name.block.pages[group.page_tokens].hashes)
    for number, hashes in gone.items():
        yield BlockRemoved(block_hashes=hashes, group_idx=number, **where)


def _stored(block: _Block, group: EventGroup, where: dict[str, str]) -> KVCacheEvent:
    pages = block.pages[group.page_tokens]
    return BlockStored(
        block_hashes=pages.hashes,
        parent_block_hash=pages.parent,
        token_ids=block.tokens,
        block_size=group.page_tokens,
        lora_id=block.lora_id,
        lora_name=block.lora_name,
        extra_keys=pages.extra_keys,
        group_idx=group.number,
        kv_cache_spec_kind=group.kind,
        kv_cache_spec_sliding_window=group.window,
        **where,
    )


def _where(tier: str) -> dict[str, str]:
    """Return a tier in vLLM's words, as far as this release has them."""
    said = {
        "medium": "CPU" if tier == HOST else "STORAGE",
        "locality": "LOCAL" if is_local(tier) else "REMOTE",
        "ownership": f"{OWNER}.{tier}",
    }
    return {name: value for name, value in said.items() if name in _FIELDS}
