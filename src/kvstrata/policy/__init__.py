"""Eviction: in which order idle slots are given up. A seam; the pool decides what is idle."""

from kvstrata.policy.auto import AutoPolicy
from kvstrata.policy.base import EvictionPolicy
from kvstrata.policy.frequency import UseCounts
from kvstrata.policy.lru import LruPolicy
from kvstrata.policy.ranked import RankedPolicy
from kvstrata.policy.registry import make_policy, policy_names
from kvstrata.policy.tenants import OwnerTable, TenantPolicy

__all__ = [
    "AutoPolicy",
    "EvictionPolicy",
    "LruPolicy",
    "OwnerTable",
    "RankedPolicy",
    "TenantPolicy",
    "UseCounts",
    "make_policy",
    "policy_names",
]
