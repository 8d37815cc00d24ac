"""Frozen configuration, and the one parser of its texts (`host:2GiB,disk:/var/kv:20GiB`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from kvstrata.core.errors import ConfigError
from kvstrata.core.tier import Tier

__all__ = [
    "BLOCK_TOKENS_DEFAULT",
    "Limits",
    "NodeConfig",
    "TierConfig",
    "parse_bytes",
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
    weigh_costs: bool = True
    """Whether a hit is loaded only as far as that is faster than computing it; else all of it."""
    cost_margin: float = 0.1
    """By which share of its own time loading must be faster than computing."""
    cost_probe_interval_s: float = 10.0
    """How long a tier that is too slow is left alone before a few blocks are read to see again."""
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
