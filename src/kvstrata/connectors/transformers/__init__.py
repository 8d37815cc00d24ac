"""Hugging Face transformers: a cache that keeps blocks around `generate`."""

from kvstrata.connectors.transformers.cache import KvstrataCache
from kvstrata.connectors.transformers.prefixes import CacheStatistics

__all__ = ["CacheStatistics", "KvstrataCache"]
