"""Tenants: names under which blocks are found and accounted, and what is guaranteed to some.

What one tenant stored is not found by another, unless the operator lets tenants share (ADR 16).
The name is no secret: who can give any name finds what is stored under it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from kvstrata.core.errors import ConfigError

__all__ = [
    "NO_TAG",
    "TAG_BYTES",
    "TENANT_NAME_MAX",
    "Guarantee",
    "TenantConfig",
    "check_tenants",
    "guaranteed_slots",
    "tenant_tag",
]

TAG_BYTES: Final = 8
"""Length of the tag of a tenant or a namespace, as it stands in index lines."""
NO_TAG: Final = bytes(TAG_BYTES)
"""The tag of nobody in particular."""
TENANT_NAME_MAX: Final = 256
"""Longest name of a tenant, in characters."""
_TENANTS_MAX: Final = 256  # with a guarantee: each has an order of its own in every tier


@dataclass(frozen=True, slots=True)
class Guarantee:
    """A part of a tier: either a share of it or bytes."""

    tier: str
    """Name of the tier; empty for each tier that is not named otherwise."""
    share: float = 0.0
    """0 to 1, of the tier's slots; not used with `size_bytes`."""
    size_bytes: int = 0
    """Bytes of the tier's capacity; 0 where it is a share."""

    def share_of(self, capacity_bytes: int) -> float:
        """Return it as a share of a tier of `capacity_bytes`."""
        return self.size_bytes / capacity_bytes if self.size_bytes else self.share


@dataclass(frozen=True, slots=True)
class TenantConfig:
    """One tenant, and what nobody else may take from it."""

    name: str
    """Its name, as clients and requests give it."""
    guarantees: tuple[Guarantee, ...]
    """One for each tier; tiers that none names are guaranteed nothing."""

    def share_of(self, tier: str, capacity_bytes: int) -> float:
        """Return the share of one tier that is guaranteed."""
        found = {each.tier: each for each in self.guarantees}
        guarantee = found.get(tier) or found.get("")
        return guarantee.share_of(capacity_bytes) if guarantee else 0.0


def tenant_tag(name: str) -> bytes:
    """Return the `TAG_BYTES` that stand for a tenant, the same ones in every process.

    The empty name is a tenant too.
    """
    return sha256(b"kvstrata tenant\0" + name.encode()).digest()[:TAG_BYTES]


def check_tenants(tenants: Sequence[TenantConfig], capacities: Sequence[tuple[str, int]]) -> None:
    """Raise ConfigError unless the tiers, given as (name, bytes), can hold what is guaranteed."""
    names = [tenant.name for tenant in tenants]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"tenants: {name!r} is named twice", hint="write one --tenant for each tenant"
            )
    if len(tenants) > _TENANTS_MAX:
        raise ConfigError(
            f"tenants: {len(tenants)} have guarantees, at most {_TENANTS_MAX} can",
            hint="give guarantees to the largest ones; the others share the rest",
        )
    known = {name for name, _ in capacities}
    for tenant in tenants:
        for guarantee in tenant.guarantees:
            if guarantee.tier and guarantee.tier not in known:
                raise ConfigError(
                    f"tenants: {tenant.name!r} is guaranteed a part of tier {guarantee.tier!r}, "
                    "which this node does not have",
                    hint=f"its tiers are {', '.join(sorted(known))}",
                )
    for tier, capacity_bytes in capacities:
        total = sum(tenant.share_of(tier, capacity_bytes) for tenant in tenants)
        if total > 1.0 + 1e-9:  # shares such as 0.1 have no exact sum
            raise ConfigError(
                f"tenants: the guarantees in tier {tier!r} add up to {100 * total:.1f}% of it",
                hint="lower some of them, or enlarge the tier",
            )


def guaranteed_slots(
    tenants: Sequence[TenantConfig], tier: str, capacity_bytes: int, slots: int
) -> list[int]:
    """Return for each tenant how many of a tier's `slots` it is guaranteed, rounded down."""
    shares = [tenant.share_of(tier, capacity_bytes) for tenant in tenants]
    return [int(share * slots + 1e-6) for share in shares]  # 0.29 * 100 is less than 29
