"""What the older of the tested vLLM releases lacks, or was not tried with.

* With 0.31 no model that takes media or keeps states was run, nothing was moved layer by layer, and
  `KvstrataTier` was not tried, so they are refused there.
* 0.31 has no sources of hits by tier (`vllm.v1.metrics.cache_hit_source`) and never asks for them.
* What KV events are made of has moved and grown from release to release; those of several cache
  groups were not tried with 0.31.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import vllm

from kvstrata.connectors.versions import TESTED_VERSIONS
from kvstrata.connectors.vllm.metrics import ConnectorStats
from kvstrata.core.errors import LayoutError
from kvstrata.layout import BlockLayout, GroupedCache
from kvstrata.runtime.session import Session

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    from kvstrata.connectors.vllm.events import TierEvents

__all__ = ["hit_sources", "is_newest", "refuse_untried", "tier_events"]

log = logging.getLogger("kvstrata.vllm")


def is_newest() -> bool:
    """Return whether this vLLM is of the newest of the tested releases."""
    return str(vllm.__version__).startswith(f"{_newest()}.")


def refuse_untried(config: VllmConfig) -> None:
    """Raise LayoutError for models that were tried with the newest of the tested releases only."""
    if config.model_config.is_multimodal_model and not is_newest():
        raise LayoutError(
            f"the model takes media, which were not tried with vLLM {vllm.__version__}",
            hint=f"use vLLM {_newest()}, or run this model without the connector",
        )


def _newest() -> str:
    return TESTED_VERSIONS["vllm"].releases[-1]


def hit_sources(tokens: int, below: int) -> dict[CacheHitSource, int]:
    """Split loaded `tokens`, of which `below` came from a tier below the host, for vLLM's metrics.

    Needs vLLM 0.32, which alone asks.
    """
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    disk = min(below, tokens)
    split = {CacheHitSource.DISK: disk, CacheHitSource.HOST: tokens - disk}
    return {source: count for source, count in split.items() if count}


def tier_events(
    config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    cache: GroupedCache,
    layout: BlockLayout,
    stats: ConnectorStats,
    session: Session,
) -> TierEvents | None:
    """Return what tells of our tiers from now on; None, which is logged, where that is unknown."""
    try:
        from kvstrata.connectors.vllm.events import TierEvents, event_words
    except ImportError as error:
        log.warning("kvstrata publishes no KV events with this vLLM: %s", error)
        return None
    if not cache.is_whole and not is_newest():
        log.warning(
            "kvstrata publishes no KV events for a model with several cache groups or windows "
            "with vLLM %s",
            vllm.__version__,
        )
        return None
    words = event_words(config, kv_cache_config, cache, layout)
    if any(group.page_tokens % words.hash_tokens for group in words.groups):
        log.warning(
            "kvstrata publishes no KV events: vLLM has a hash each %d tokens only",
            words.hash_tokens,
        )
        return None
    events = TierEvents(words, stats)
    events.take(session)
    return events
