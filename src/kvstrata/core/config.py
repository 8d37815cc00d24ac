"""Frozen configuration, and the one parser of its texts (`host:2GiB,disk:/var/kv:20GiB`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from kvstrata.core.errors import ConfigError
from kvstrata.core.tenants import TENANT_NAME_MAX, Guarantee, TenantConfig, check_tenants
from kvstrata.core.tier import Admission, TierKind, TierName

__all__ = [
    "BACKEND_DEFAULT",
    "BLOCK_TOKENS_DEFAULT",
    "BYPASS_BYTES",
    "NO_CODEC",
    "PLACE_SEPARATOR",
    "HostMemoryConfig",
    "HugePages",
    "Limits",
    "NodeConfig",
    "TierConfig",
    "parse_bytes",
    "parse_tenants",
    "parse_tiers",
    "tier_names",
]

BLOCK_TOKENS_DEFAULT: Final = 64
"""Tokens in one block, and the hash granularity that engines must share to share blocks."""
NO_CODEC: Final = "none"
"""The codec chain of a tier whose blocks are stored as they are."""
BACKEND_DEFAULT: Final = "posix"
"""What moves blocks between host and disk if nobody says otherwise: our threads."""
BYPASS_BYTES: Final = 256 << 20
"""Size of a host tier that nobody asked for, where blocks wait on their way to lower tiers."""

PLACE_SEPARATOR: Final = "|"
"""What stands between the directories and devices of one tier."""

_UNITS: Final = {
    "": 1, "b": 1,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
_PLUGIN: Final = re.compile(r"[a-z][a-z0-9_.-]*")
_CODEC: Final = re.compile(r"[a-z][a-z0-9_.+-]*")
_EXAMPLES: Final = {
    TierKind.DISK: "disk:DIRECTORY:SIZE, for example disk:/var/kv:20GiB, or for several "
    "disk:/nvme0/kv|/nvme1/kv:4TiB",
    TierKind.SHARED: "shared:DIRECTORY:SIZE, for example shared:/nfs/kv:1TiB",
    TierKind.OBJECT: "object:URL:SIZE, for example object:s3://BUCKET/PREFIX:1TiB",
    TierKind.STORE: "store:NAME:URL:SIZE, for example store:redis:redis://HOST:6379:64GiB",
}
_SIZE_BYTES_MAX: Final = 1 << 50  # 1 PiB: larger is a typing error, and would overflow file offsets


@dataclass(frozen=True, slots=True)
class TierConfig:
    """One tier: which, how large, where its bytes are kept, and what enters it."""

    kind: TierKind
    """What keeps its bytes."""
    capacity_bytes: int
    """Upper bound of the bytes that the tier may take, its own bookkeeping included."""
    directory: str | None = None
    """Directories and block devices of a disk tier, `|` between them; directory of a shared tier's
    files; None for the others."""
    admission: Admission = Admission.WRITE_THROUGH
    """Which blocks of the tier above enter it; means nothing for the host tier."""
    bypass: bool = False
    """For the host tier: it is only where blocks wait on their way between engine and the tier
    below, and keeps each from eviction until it is written there."""
    url: str | None = None
    """Where an object tier is (`storage/location.py`), or a store; None for the others."""
    codec: str = NO_CODEC
    """For a shared, an object or a store tier: what its blocks are written with, as `zstd+aes`."""
    plugin: str | None = None
    """For a store tier: the name under which a package offers it; None for the others."""

    @property
    def places(self) -> tuple[str, ...]:
        """Where a disk tier's bytes are: one directory or device, or several to stripe over.

        Empty for every other tier.
        """
        if self.kind is not TierKind.DISK or self.directory is None:
            return ()
        return tuple(self.directory.split(PLACE_SEPARATOR))


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of every queue, wait and batch of a node. The defaults suit one engine on one node."""

    staging_timeout_s: float = 5.0
    """How long a lookup may keep an engine waiting for blocks that come from below the host."""
    hold_timeout_s: float = 30.0
    """How long blocks found by a lookup stay pinned if the request never acquires them."""
    job_blocks_max: int = 16
    """Blocks in one transfer job: small enough that the good part of a prefix arrives early."""
    offload_blocks_in_flight_max: int = 256
    """Blocks being written to one tier at once; the rest wait in the backlog."""
    offload_backlog_blocks_max: int = 65_536
    """Blocks waiting to be written to one tier; what comes on top is counted and not written."""
    relay_blocks_max: int = 32
    """Host slots that blocks on their way from one lower tier to the next may take at once."""
    demote_share: float = 0.125
    """Share of a tier, its coldest blocks, that is written below ahead of eviction where the tier
    below takes blocks on evict."""
    admission_uses_min: int = 2
    """Uses, computing it included, after which a block enters a tier that admits by frequency."""
    lease_share_max: float = 0.5
    """Share of the host tier that leases may keep from eviction, all together."""
    lease_s_max: float = 3600.0
    """Longest time for which a lease can be taken or renewed."""
    offload_priority_min: int = 0
    """Blocks of a lower priority than this, and those behind them, stay in the host."""
    weigh_costs: bool = True
    """Whether a hit is loaded only as far as that is faster than computing it; else all of it."""
    cost_margin: float = 0.1
    """By which share of its own time loading must be faster than computing."""
    cost_probe_interval_s: float = 10.0
    """How long a tier that is too slow is left alone before a few blocks are read to see again."""
    transfer_threads: int = 8
    """Threads that move bytes to and from disk: as many operations are under way at once."""
    keyed_threads: int = 16
    """Threads for each shared or object tier: as many requests are under way at once."""
    object_timeout_s: float = 10.0
    """Longest time for one call to an object store, with all that is sent again."""
    rest_s: float = 5.0
    """How long a shared or object tier that failed, or was too late, is not asked for blocks."""
    probe_blocks_max: int = 32
    """Blocks for which a shared or object tier is asked at first when a lookup would miss; twice as
    many each time they are all there. 0 asks for nothing that this daemon does not know of."""
    probe_timeout_s: float = 0.5
    """How long a request waits for such an answer, which counts as staging."""
    probe_again_s: float = 10.0
    """How long a block that was not there is not asked for again."""
    delete_retry_s: float = 5.0
    """Time until what a shared or object tier could not delete is tried again."""
    checksum_threads: int = 1
    """Threads that compute block checksums."""
    drain_timeout_s: float = 2.0
    """How long a daemon that is told to stop goes on writing what waits for lower tiers."""
    call_blocks_max: int = 1 << 18
    """Hashes accepted in one message: 2**18 blocks of 64 tokens are 16 million tokens."""


class HugePages(Enum):
    """What pages the host tier's memory is made of."""

    OFF = "off"
    """Small ones."""
    AUTO = "auto"
    """Transparent huge pages where the system gives some, else small ones."""
    TRY = "try"
    """Reserved huge pages, else transparent ones, else small ones."""
    REQUIRE = "require"
    """Reserved huge pages or nothing."""


@dataclass(frozen=True, slots=True)
class HostMemoryConfig:
    """How the memory of the host tier is taken from the system."""

    huge_pages: HugePages = HugePages.AUTO
    """Which pages are asked for."""
    numa_node: int | None = None
    """Node of the machine whose memory it is; None leaves that to the system."""
    prefault: bool = False
    """Whether all of it is taken before the daemon is ready, not page by page later."""
    share_max: float = 0.9
    """Share of the machine's or its cgroup's memory that it may have; the rest is for the daemon,
    the engine and the system."""


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """What one node daemon owns."""

    tiers: tuple[TierConfig, ...]
    """Host first, then the tiers below it, nearest first."""
    secret_file: str | None = None
    """File with the cluster secret; None keeps one beside the first disk tier's blocks."""
    limits: Limits = Limits()
    """Bounds of queues, waits and batches."""
    policy: str = "lru"
    """Eviction policy of every tier, by name."""
    tenants: tuple[TenantConfig, ...] = ()
    """Tenants with a guarantee; all others share what these leave."""
    share_tenants: bool = False
    """Whether tenants of one salt find each other's blocks."""
    explain_across_salts: bool = False
    """Whether a client may learn that a prompt is stored under a salt that is not its own."""
    host_memory: HostMemoryConfig = HostMemoryConfig()
    """How the host tier's memory is taken."""
    backend: str = BACKEND_DEFAULT
    """What moves blocks between host and disk: a backend's name, or `auto` to try all."""

    def __post_init__(self) -> None:
        sizes = [tier.capacity_bytes for tier in self.tiers]
        check_tenants(self.tenants, list(zip(tier_names(self.tiers), sizes, strict=True)))

    @property
    def host(self) -> TierConfig:
        """The host tier's configuration; every node has one."""
        return self.tiers[0]

    @property
    def lower(self) -> dict[TierName, TierConfig]:
        """The tiers below the host by name, nearest first."""
        return dict(zip(tier_names(self.tiers)[1:], self.tiers[1:], strict=True))


def tier_names(tiers: Sequence[TierConfig]) -> list[TierName]:
    """Return the names of `tiers`: their kinds, from the second of a kind on with its number."""
    names: list[TierName] = []
    counts: Counter[str] = Counter()
    for tier in tiers:
        counts[tier.kind.value] += 1
        number = counts[tier.kind.value]
        names.append(TierName(f"{tier.kind.value}{number if number > 1 else ''}"))
    return names


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
    """Return the tiers of `[host:SIZE[:bypass],]disk:PLACES:SIZE[:ADMISSION],...`, host first.

    Places are directories or block devices, `|` between them; over several the tier is striped.
    Besides `disk` there are `shared:DIRECTORY:SIZE`, `object:URL:SIZE` and `store:NAME:URL:SIZE`,
    all with a codec chain behind the size if wanted. A list that begins below the host gets a host
    of `BYPASS_BYTES` that is bypassed. Raises
    ConfigError for an unknown, repeated, missing or misplaced tier, and for a bad size.
    """
    found = [_parse_tier(part.strip()) for part in text.split(",") if part.strip()]
    names = [tier.kind.value for tier in found]
    if not names or TierKind.HOST.value in names[1:]:
        raise ConfigError(
            f"tiers: {','.join(names) or 'nothing'!r} is not a list of tiers",
            hint="write host at most once, as the first: host:2GiB,disk:/var/kv:20GiB",
        )
    if found[0].kind is not TierKind.HOST:
        found.insert(0, TierConfig(TierKind.HOST, BYPASS_BYTES, bypass=True))
    places = [place for tier in found for place in (tier.places or (tier.directory or tier.url,))]
    if twice := [place for place in places if place and places.count(place) > 1]:
        raise ConfigError(
            f"tiers: two tiers would keep their files in {twice[0]!r}",
            hint="give each tier a directory or URL of its own, and name each once",
        )
    if found[0].bypass and (len(found) == 1 or found[1].admission is not Admission.WRITE_THROUGH):
        raise ConfigError(
            "tiers: a bypassed host needs a tier below it that takes every block",
            hint="write host:64MiB:bypass,disk:/var/kv:20GiB, without another admission",
        )
    return tuple(found)


def _parse_tier(text: str) -> TierConfig:
    name, _, rest = text.partition(":")
    if name == TierKind.HOST.value:
        size = rest.removesuffix(":bypass")
        capacity = parse_bytes(size, field="tiers.host")
        return TierConfig(TierKind.HOST, capacity, bypass=size != rest)
    if name in {kind.value for kind in _EXAMPLES}:
        return _parse_lower(TierKind(name), text, rest)
    raise ConfigError(
        f"tiers: unknown tier {name!r}",
        hint="known tiers are host, disk, shared, object and store: host:2GiB,disk:/var/kv:20GiB",
    )


def _parse_lower(kind: TierKind, text: str, rest: str) -> TierConfig:
    """Return a tier below the host; its place may have colons in it, so it is read from the end."""
    rest, admission = _split_admission(rest)
    place, _, size = rest.rpartition(":")
    codec = NO_CODEC
    if kind.keyed and _CODEC.fullmatch(size) and _SIZE.fullmatch(place.rpartition(":")[2]):
        codec = size
        place, _, size = place.rpartition(":")
    places = place.split(PLACE_SEPARATOR) if kind is TierKind.DISK else [place]
    if not all(each.strip() for each in places):
        what = "URL" if kind in {TierKind.OBJECT, TierKind.STORE} else "directory"
        raise ConfigError(
            f"tiers.{kind.value}: {text!r} names no {what}", hint=f"write {_EXAMPLES[kind]}"
        )
    capacity = parse_bytes(size, field=f"tiers.{kind.value}")
    if kind is TierKind.OBJECT:
        return TierConfig(kind, capacity, admission=admission, url=place, codec=codec)
    if kind is TierKind.STORE:
        name, url = _split_plugin(place)
        return TierConfig(kind, capacity, None, admission, url=url, codec=codec, plugin=name)
    return TierConfig(kind, capacity, place, admission, codec=codec)


def _split_plugin(place: str) -> tuple[str, str]:
    """Return the name and the URL of a store's place `NAME:URL`."""
    name, _, url = place.partition(":")
    if not _PLUGIN.fullmatch(name) or not url.strip():
        raise ConfigError(
            f"tiers.store: {place.partition(':')[0]!r} and what follows are no name and URL",
            hint=f"write {_EXAMPLES[TierKind.STORE]}",
        )
    return name, url


def _split_admission(text: str) -> tuple[str, Admission]:
    """Return `text` without the admission at its end, and that; write-through if none is named."""
    before, _, last = text.rpartition(":")
    if last in {each.value for each in Admission}:
        return before, Admission(last)
    return text, Admission.WRITE_THROUGH


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
