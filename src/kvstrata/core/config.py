"""Frozen configuration, and the one parser of its texts (`host:2GiB,disk:/var/kv:20GiB`)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from kvstrata.core.errors import ConfigError
from kvstrata.core.tenants import TENANT_NAME_MAX, Guarantee, TenantConfig, check_tenants
from kvstrata.core.tier import Tier

__all__ = [
    "BLOCK_TOKENS_DEFAULT",
    "Limits",
    "NodeConfig",
    "TierConfig",
    "parse_bytes",
    "parse_tenants",
    "parse_tiers",
]

BLOCK_TOKENS_DEFAULT: Final = 64
"""Tokens in one block, and the hash granularity that engines must share to share blocks."""

_UNITS: Final = {
    "": 1, "b": 1,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
_SIZE_BYTES_MAX: Final = 1 << 50  # 1 PiB: larger is a typing error, and would overflow file offsets


@dataclass(frozen=True, slots=True)
class TierConfig:
    """One tier: which, how large, and where its bytes are kept."""

    tier: Tier
    """Which tier this sizes."""
    capacity_bytes: int
    """Upper bound of the bytes that the tier may take, its own bookkeeping included."""
    directory: str | None = None
    """Directory of the disk tier's files; None for the host tier."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of every queue, wait and batch of a node. The defaults suit one engine on one node."""

    staging_timeout_s: float = 5.0
    """How long a lookup may keep an engine waiting for blocks that are being read from disk."""
    hold_timeout_s: float = 30.0
    """How long blocks found by a lookup stay pinned if the request never acquires them."""
    job_blocks_max: int = 16
    """Blocks in one transfer job: small enough that the good part of a prefix arrives early."""
    offload_blocks_in_flight_max: int = 256
    """Blocks being written to disk at once; the rest wait in the backlog."""
    offload_backlog_blocks_max: int = 65_536
    """Blocks waiting to be written to disk; what comes on top is counted and not written."""
    lease_share_max: float = 0.5
    """Share of the host tier that leases may keep from eviction, all together."""
    lease_s_max: float = 3600.0
    """Longest time for which a lease can be taken or renewed."""
    offload_priority_min: int = 0
    """Blocks of a lower priority than this, and those behind them, are not written to disk."""
    transfer_threads: int = 2
    """Threads that move bytes to and from disk."""
    checksum_threads: int = 1
    """Threads that compute block checksums."""
    drain_timeout_s: float = 2.0
    """How long a daemon that is told to stop goes on writing what waits for the disk."""
    call_blocks_max: int = 1 << 18
    """Hashes accepted in one message: 2**18 blocks of 64 tokens are 16 million tokens."""


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """What one node daemon owns."""

    tiers: tuple[TierConfig, ...]
    """Host first, then disk if there is one."""
    secret_file: str | None = None
    """File with the cluster secret; None keeps one beside the disk tier's blocks."""
    limits: Limits = Limits()
    """Bounds of queues, waits and batches."""
    policy: str = "lru"
    """Eviction policy of every tier, by name."""
    tenants: tuple[TenantConfig, ...] = ()
    """Tenants with a guarantee; all others share what these leave."""
    explain_across_salts: bool = False
    """Whether a client may learn that a prompt is stored under a salt that is not its own."""

    def __post_init__(self) -> None:
        check_tenants(self.tenants, [(each.tier.value, each.capacity_bytes) for each in self.tiers])

    @property
    def host(self) -> TierConfig:
        """The host tier's configuration; every node has one."""
        return self.tiers[0]

    @property
    def disk(self) -> TierConfig | None:
        """The disk tier's configuration, or None."""
        return self.tiers[1] if len(self.tiers) > 1 else None


def parse_bytes(text: str, *, field: str) -> int:
    """Return a size like `512MiB`, `2GB` or `4096` in bytes; `field` names it in the error."""
    found = _SIZE.fullmatch(text)
    unit = found and _UNITS.get(found[2].lower())
    if not found or not unit:
        raise ConfigError(
            f"{field}: {text!r} is not a size",
            hint="write a number and a unit, for example 512MiB or 20GB",
        )
    size = float(found[1]) * unit
    if not 1 <= size <= _SIZE_BYTES_MAX:
        raise ConfigError(
            f"{field}: {text!r} is {size:.0f} bytes, outside 1 byte to 1 PiB",
            hint="check the number and its unit",
        )
    return int(size)


def parse_tiers(text: str) -> tuple[TierConfig, ...]:
    """Return the tiers of `host:SIZE[,disk:DIRECTORY:SIZE]`, host first.

    Raises ConfigError for an unknown, repeated, missing or misplaced tier, and for a bad size.
    """
    found = [_parse_tier(part.strip()) for part in text.split(",") if part.strip()]
    order = [tier.tier for tier in found]
    if order not in ([Tier.HOST], [Tier.HOST, Tier.DISK]):
        names = ",".join(tier.value for tier in order) or "nothing"
        raise ConfigError(
            f"tiers: {names!r} is not a list that this version can run",
            hint="write host first, then at most one disk: host:2GiB,disk:/var/kv:20GiB",
        )
    return tuple(found)


def _parse_tier(text: str) -> TierConfig:
    name, _, rest = text.partition(":")
    if name == Tier.HOST.value:
        return TierConfig(Tier.HOST, parse_bytes(rest, field="tiers.host"))
    if name == Tier.DISK.value:
        directory, _, size = rest.rpartition(":")
        if not directory:
            raise ConfigError(
                f"tiers.disk: {text!r} names no directory",
                hint="write disk:DIRECTORY:SIZE, for example disk:/var/kv:20GiB",
            )
        return TierConfig(Tier.DISK, parse_bytes(size, field="tiers.disk"), directory)
    raise ConfigError(
        f"tiers: unknown tier {name!r}",
        hint="known tiers are host and disk: host:2GiB,disk:/var/kv:20GiB",
    )


def parse_tenants(texts: Iterable[str]) -> tuple[TenantConfig, ...]:
    """Return the tenants of texts like `NAME=30%` and `NAME=host:8GiB,disk:20%`.

    Raises ConfigError for a text that says no share and no size; `check_tenants` says the rest.
    """
    return tuple(_parse_tenant(text.strip()) for text in texts if text.strip())


def _parse_tenant(text: str) -> TenantConfig:
    name, equals, rest = text.rpartition("=")
    parts = [part.strip() for part in rest.split(",") if part.strip()]
    if not equals or not parts or len(name) > TENANT_NAME_MAX:
        raise ConfigError(
            f"tenants: {text!r} guarantees nothing to a tenant",
            hint="write NAME=30% for a share of each tier, or NAME=host:8GiB,disk:100GiB",
        )
    found = [_parse_guarantee(part, name) for part in parts]
    tiers = [guarantee.tier for guarantee in found]
    if len(set(tiers)) != len(tiers) or (len(tiers) > 1 and "" in tiers):
        raise ConfigError(
            f"tenants: {text!r} says more than one thing about the same tier",
            hint="name each tier once, or write one share for all of them",
        )
    return TenantConfig(name, tuple(found))


def _parse_guarantee(text: str, name: str) -> Guarantee:
    tier, _, size = text.rpartition(":")
    if size.endswith("%"):
        try:
            share = float(size[:-1]) / 100
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:  # NaN is neither
            raise ConfigError(
                f"tenants.{name}: {size!r} is not a share", hint="write 1% to 100%, or a size"
            )
        return Guarantee(tier, share=share)
    if not tier:
        raise ConfigError(
            f"tenants.{name}: {text!r} names no tier for its size",
            hint="write host:8GiB for a size in one tier, or 30% for a share of each",
        )
    return Guarantee(tier, size_bytes=parse_bytes(size, field=f"tenants.{name}"))
