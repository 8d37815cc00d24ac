"""What the parts of the brain share: the tiers, the seals, the counters, the jobs to give out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvstrata.core.config import Limits
from kvstrata.core.ids import SequenceHash, TransferId
from kvstrata.core.tier import Tier
from kvstrata.manager.explain import Departure, Departures
from kvstrata.manager.tenants import Tenants
from kvstrata.pool import Pool
from kvstrata.transfer.base import Job

__all__ = ["BrainState", "Counters"]


@dataclass(slots=True)
class Counters:
    """Everything that happened, in blocks unless named otherwise; nothing is dropped uncounted."""

    lookups: int = 0
    """Requests that looked for their prefix (each counted once, however often it asked)."""
    hit_blocks_host: int = 0
    """Blocks given to requests that were in the host when first looked for."""
    hit_blocks_disk: int = 0
    """Blocks given to requests that were staged from disk for them."""
    stored_blocks: int = 0
    """Blocks sealed and registered in the host."""
    duplicate_blocks: int = 0
    """Blocks sealed whose key had meanwhile been registered."""
    written_blocks: int = 0
    """Blocks written to disk."""
    recovered_blocks: int = 0
    """Blocks whose index lines were found on disk at start."""
    corrupt_blocks: int = 0
    """Blocks read from disk whose seal did not match; withdrawn, never served."""
    read_failed_blocks: int = 0
    """Blocks that could not be read from disk; withdrawn."""
    write_failed_blocks: int = 0
    """Blocks that could not be written to disk; they stay in the host."""
    seal_failed_blocks: int = 0
    """Blocks dropped because their seal could not be computed."""
    staging_timeout_blocks: int = 0
    """Blocks whose read from disk ended after its deadline; thrown away."""
    throttled_reserve_blocks: int = 0
    """Blocks an engine wanted to store while every host slot was held."""
    throttled_stage_blocks: int = 0
    """Blocks on disk that could not be staged because every host slot was held."""
    throttled_write_blocks: int = 0
    """Blocks not written to disk because its slots were held or the backlog was full."""
    throttled_quota_blocks: int = 0
    """Blocks an engine wanted to store, or that were to be written to disk, while what could be
    evicted was guaranteed to other tenants."""
    throttled_lease_blocks: int = 0
    """Blocks that a lease could not keep because leases have their share of the host."""
    kept_off_disk_blocks: int = 0
    """Blocks not written to disk because they, or blocks before them, are below the floor of
    priority for it or have a time to live."""
    expired_blocks: int = 0
    """Blocks whose time to live ended while they were kept."""
    evicted_unwritten_blocks: int = 0
    """Blocks that left the host before their turn to be written to disk."""
    expired_holds: int = 0
    """Requests that looked, were answered and never came back for their blocks."""


@dataclass(slots=True)
class BrainState:
    """Owned by the manager; its parts keep references."""

    host: Pool
    """The host tier's slots."""
    disk: Pool | None
    """The disk tier's slots, or None."""
    limits: Limits
    """Bounds of queues, waits and batches."""
    host_seals: list[bytes]
    """Seal of the block in each host slot; meaningful while the slot is registered."""
    disk_seals: list[bytes]
    """Seal of the block in each disk slot; meaningful while the slot is registered."""
    tenants: Tenants = field(default_factory=Tenants)
    """Who stored what."""
    policy: str = "lru"
    """Name of the eviction policy, for those who ask why."""
    counters: Counters = field(default_factory=Counters)
    """What happened so far."""
    outbox: list[Job] = field(default_factory=list)
    """Jobs decided on and not yet taken by `step`."""
    departures: Departures = field(default_factory=Departures)
    """Why blocks that were here are not."""
    now: float = 0.0
    """The latest moment that the manager was told of."""
    last_transfer: int = 0
    """The last transfer id given out."""

    def left(self, keys: Iterable[SequenceHash], what: str, tier: Tier, by: str = "") -> None:
        """Take note that `keys` left `tier`, or did not come to be in it."""
        self.departures.note(keys, Departure(what, tier, self.now, by))

    def next_transfer(self) -> TransferId:
        """Return an id that no job of this brain had before."""
        self.last_transfer += 1
        return TransferId(self.last_transfer)
