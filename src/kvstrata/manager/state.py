"""What the parts of the brain share: the tiers, the seals, the counters, the jobs to give out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kvstrata.core.config import Limits
from kvstrata.core.ids import SequenceHash, SlotId, TransferId
from kvstrata.core.tier import HOST, Admission, TierName
from kvstrata.manager.changes import Changes
from kvstrata.manager.costs import Costs
from kvstrata.manager.explain import Departure, Departures
from kvstrata.manager.tenants import Tenants
from kvstrata.pool import Pool
from kvstrata.transfer.base import Job

__all__ = ["BrainState", "Counters", "LowerTier"]


@dataclass(slots=True)
class Counters:
    """Everything that happened, in blocks unless named otherwise; nothing is dropped uncounted."""

    lookups: int = 0
    """Requests that looked for their prefix (each counted once, however often it asked)."""
    hit_blocks_host: int = 0
    """Blocks given to requests that were in the host when first looked for."""
    hit_blocks_staged: int = 0
    """Blocks given to requests that were staged for them from a tier below the host."""
    stored_blocks: int = 0
    """Blocks sealed and registered in the host."""
    duplicate_blocks: int = 0
    """Blocks sealed whose key had meanwhile been registered."""
    written_blocks: int = 0
    """Blocks written to tiers below the host."""
    relayed_blocks: int = 0
    """Blocks read from one tier below the host to be written to another."""
    recovered_blocks: int = 0
    """Blocks whose index lines were found at start."""
    corrupt_blocks: int = 0
    """Blocks read whose seal did not match; withdrawn, never served."""
    read_failed_blocks: int = 0
    """Blocks that could not be read; withdrawn from the tier that had them."""
    lost_blocks: int = 0
    """Blocks on a device that failed so often that it is left alone; withdrawn."""
    write_failed_blocks: int = 0
    """Blocks that could not be written to a tier; they stay where they are."""
    seal_failed_blocks: int = 0
    """Blocks dropped because their seal could not be computed."""
    staging_timeout_blocks: int = 0
    """Blocks whose read ended after its deadline; thrown away."""
    throttled_reserve_blocks: int = 0
    """Blocks an engine wanted to store while every host slot was held."""
    throttled_stage_blocks: int = 0
    """Blocks below the host that could not be staged because every host slot was held."""
    throttled_write_blocks: int = 0
    """Blocks not written to a tier because its slots were held or its backlog was full."""
    throttled_relay_blocks: int = 0
    """Blocks not carried from one lower tier to the next because no host slot was free for it."""
    throttled_quota_blocks: int = 0
    """Blocks an engine wanted to store, or that were to be written to a tier, while what could be
    evicted was guaranteed to other tenants."""
    not_worth_loading_blocks: int = 0
    """Blocks of hits that were left where they are because computing them is faster."""
    throttled_lease_blocks: int = 0
    """Blocks that a lease could not keep because leases have their share of the host."""
    kept_in_host_blocks: int = 0
    """Blocks not written below the host because they, or blocks before them, are below the floor
    of priority for it or have a time to live."""
    expired_blocks: int = 0
    """Blocks whose time to live ended while they were kept."""
    evicted_unwritten_blocks: int = 0
    """Blocks that left their tier before their turn to be written to the one below."""
    deleted_blocks: int = 0
    """Blocks deleted from shared and object tiers: evicted, cleared, or expired there."""
    undeleted_blocks: int = 0
    """Blocks that stay in a shared or object tier because too many waited to be deleted."""
    adopted_blocks: int = 0
    """Blocks found in shared and object tiers that were there already."""
    probed_blocks: int = 0
    """Blocks that shared and object tiers were asked for because a lookup would have missed."""
    found_blocks: int = 0
    """Those of them that were there: another daemon wrote them."""
    unadopted_blocks: int = 0
    """Blocks found there that this daemon had no room for; left where they are."""
    expired_holds: int = 0
    """Requests that looked, were answered and never came back for their blocks."""


@dataclass(slots=True)
class LowerTier:
    """A tier below the host: blocks reach it and leave it through the host only."""

    name: TierName
    """What it is called."""
    pool: Pool
    """Its slots."""
    admission: Admission = Admission.WRITE_THROUGH
    """Which blocks of the tier above enter it."""
    seals: list[bytes] = field(default_factory=list)
    """Seal of the block in each slot; meaningful while the slot is registered."""
    written: int = 0
    """Write counter of the block last given out to be written to it."""
    hit_blocks: int = 0
    """Blocks given to requests that were staged from it for them."""
    keyed: bool = False
    """Whether its blocks lie under their keys: slots are then a count only, each block's seal is in
    its header, and what leaves must be deleted."""
    doomed: dict[SequenceHash, None] = field(default_factory=dict)
    """Keys that wait to be deleted there."""
    delete_after: float = 0.0
    """Until when deleting rests because it failed."""
    rests_until: float = 0.0
    """Until when it is not asked for blocks because it failed or was too late."""

    def __post_init__(self) -> None:
        self.seals = self.seals or [b""] * self.pool.slots_total

    def __contains__(self, key: object) -> bool:
        return key in self.pool

    def slots_of(self, keys: Iterable[SequenceHash]) -> list[SlotId]:
        """Return the slots of `keys`, which the caller guarantees are all here."""
        return [slot for slot in self.pool.scan(keys) if slot is not None]


@dataclass(slots=True)
class BrainState:
    """Owned by the manager; its parts keep references."""

    host: Pool
    """The host tier's slots."""
    lower: tuple[LowerTier, ...]
    """The tiers below it, nearest first."""
    limits: Limits
    """Bounds of queues, waits and batches."""
    host_seals: list[bytes]
    """Seal of the block in each host slot; meaningful while the slot is registered."""
    tenants: Tenants = field(default_factory=Tenants)
    """Who stored what."""
    costs: Costs | None = None
    """What loading costs, or None to load whatever is kept."""
    policy: str = "lru"
    """Name of the eviction policy, for those who ask why."""
    counters: Counters = field(default_factory=Counters)
    """What happened so far."""
    outbox: list[Job] = field(default_factory=list)
    """Jobs decided on and not yet taken by `step`."""
    departures: Departures = field(default_factory=Departures)
    """Why blocks that were here are not."""
    changes: Changes = field(default_factory=Changes)
    """What came and went, for those who follow."""
    now: float = 0.0
    """The latest moment that the manager was told of."""
    last_transfer: int = 0
    """The last transfer id given out."""

    def left(self, keys: Iterable[SequenceHash], what: str, tier: TierName, by: str = "") -> None:
        """Take note that `keys` left `tier`, or did not come to be in it."""
        gone = list(keys)
        self.departures.note(gone, Departure(what, tier, self.now, by))
        self.changes.note(tier, gone, stored=False)

    def arrived(self, keys: Sequence[SequenceHash], tier: TierName) -> None:
        """Take note that `keys` can be found in `tier`."""
        self.changes.note(tier, keys, stored=True)

    def evicted(self, keys: Sequence[SequenceHash], tier: TierName) -> None:
        """Take note that the policy gave up `keys` in `tier`; count those that are nowhere below.

        Where the tier below takes what is evicted, a block that it has not is a loss.
        """
        if not keys:
            return
        self.left(keys, "evicted", tier, self.policy)
        place = 0 if tier == HOST else 1 + [each.name for each in self.lower].index(tier)
        if place < len(self.lower) and self.lower[place].admission is Admission.ON_EVICT:
            below = self.lower[place]
            self.counters.evicted_unwritten_blocks += sum(key not in below for key in keys)

    def below(self, key: SequenceHash) -> LowerTier | None:
        """Return the nearest tier below the host that has `key` and does not rest."""
        for tier in self.lower:
            if key in tier.pool and self.now >= tier.rests_until:
                return tier
        return None

    def tier(self, name: TierName) -> LowerTier:
        """Return the tier below the host of this name."""
        return next(tier for tier in self.lower if tier.name == name)

    def pools(self) -> Iterator[tuple[TierName, Pool]]:
        """Yield every tier's name and slots, the host first."""
        yield HOST, self.host
        for tier in self.lower:
            yield tier.name, tier.pool

    def next_transfer(self) -> TransferId:
        """Return an id that no job of this brain had before."""
        self.last_transfer += 1
        return TransferId(self.last_transfer)
