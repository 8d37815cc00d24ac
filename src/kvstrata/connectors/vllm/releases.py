"""What an older vLLM lacks, imported only when the engine asks for it.

So the connector can be imported there, and refuses it with the table of tested releases.

* 0.31 has no sources of hits by tier (`vllm.v1.metrics.cache_hit_source`) and never asks for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

__all__ = ["hit_sources"]


def hit_sources(tokens: int, below: int) -> dict[CacheHitSource, int]:
    """Split loaded `tokens`, of which `below` came from a tier below the host, for vLLM's metrics.

    Needs vLLM 0.32, which alone asks.
    """
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    disk = min(below, tokens)
    split = {CacheHitSource.DISK: disk, CacheHitSource.HOST: tokens - disk}
    return {source: count for source, count in split.items() if count}
