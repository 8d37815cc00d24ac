"""Eviction: in which order idle slots are given up. A seam; the pool decides what is idle."""

from kvstrata.policy.base import EvictionPolicy
from kvstrata.policy.lru import LruPolicy

__all__ = ["EvictionPolicy", "LruPolicy"]
