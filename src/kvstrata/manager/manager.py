"""The brain of a node, as one sans-I/O object: messages and `now` in, answers and jobs out.

Owner: one thread; nothing here waits, and nothing calls back. A request of an engine walks

    lookup -> (pending: again) -> acquire -> release          to load what is kept
    reserve -> seal or abort                                  to store what was computed

Repeating a call doubles nothing. A refused call changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvstrata.core.config import Limits
from kvstrata.core.ids import Holder, SequenceHash, SessionId, SlotId, TransferId
from kvstrata.core.retention import BlockHint
from kvstrata.core.tier import DISK, HOST, TierName
from kvstrata.manager.changes import ChangesAnswer
from kvstrata.manager.costs import Costs
from kvstrata.manager.deleting import Deleting
from kvstrata.manager.explain import DEPARTURES_MAX, Departures, Gauges
from kvstrata.manager.groups import WHOLE, split
from kvstrata.manager.leasing import Leasing
from kvstrata.manager.lineage import Found, adopt
from kvstrata.manager.loading import (
    UNKNOWN,
    AcquireAnswer,
    EngineSpeed,
    Loading,
    LookupAnswer,
)
from kvstrata.manager.mismatch import FAMILIES_MAX, Families, sentence
from kvstrata.manager.offload import Offloading
from kvstrata.manager.onboard import Onboarding
from kvstrata.manager.probing import Probing
from kvstrata.manager.retaining import Retaining
from kvstrata.manager.state import BrainState, Counters, LowerTier
from kvstrata.manager.storing import Storing
from kvstrata.manager.tenants import Tenants
from kvstrata.pool import Pool
from kvstrata.storage.base import StoredBlock
from kvstrata.tokens.family import Family
from kvstrata.transfer.base import Job, JobDone

__all__ = ["AcquireAnswer", "LookupAnswer", "Manager", "ReserveAnswer"]


@dataclass(frozen=True, slots=True)
class ReserveAnswer:
    """Slots to fill, for those of the offered blocks that are not held already."""

    indices: list[int]
    """Which of the offered blocks are wanted, rising."""
    slots: list[SlotId]
    """The slot of each."""
    throttled: int
    """Wanted blocks that found no slot: not an error, they are simply not stored."""


class Manager:
    """Decides over one block layout's tiers."""

    def __init__(
        self,
        host: Pool,
        lower: Sequence[LowerTier],
        limits: Limits,
        policy: str | None = None,
        tenants: Tenants | None = None,
        costs: Costs | None = None,
        *,
        bypass: bool = False,
    ) -> None:
        """Take over empty pools; `lower` are the tiers below the host, nearest first.

        `policy` names what the pools evict by; with it, gauges tell what others would have hit.
        `tenants` has made the pools' policies, if there are guarantees. With `costs` a hit is
        loaded only as far as that is faster than computing it. With `bypass` the host keeps each
        block from eviction until the tier below has it.
        """
        slots = host.slots_total + sum(tier.pool.slots_total for tier in lower)
        self._state = BrainState(
            departures=Departures(min(max(slots, 1024), DEPARTURES_MAX)),
            host=host,
            lower=tuple(lower),
            limits=limits,
            policy=policy or "",
            tenants=tenants or Tenants(),
            costs=costs,
            host_seals=[b""] * host.slots_total,
        )
        self._deleting = Deleting(self._state)
        self._onboarding = Onboarding(self._state, self._deleting)
        self._retaining = Retaining(self._state, self._onboarding.remove)
        self._offloading = Offloading(
            self._state, self._retaining, self._onboarding, self._deleting, bypass=bypass
        )
        self._storing = Storing(self._state)
        self._leasing = Leasing(self._state)
        self._state.tenants.watch(dict(self._state.pools()))
        self._families = Families(min(max(slots, 1024), FAMILIES_MAX))
        self._gauges = Gauges(host.slots_total, policy) if policy else None
        self._probing = Probing(self._state)
        self._loading = Loading(
            self._state,
            self._onboarding,
            self._storing,
            self._probing,
            self._gauges,
            costs.block_tokens if costs else 0,
        )

    def recover(self, blocks: Sequence[StoredBlock], floor: int = 0, tier: TierName = DISK) -> None:
        """Adopt what a lower tier's store found at start, oldest first; call before all else.

        New blocks are numbered above these and above `floor`, up to which blocks were cleared.
        """
        lower = self._state.tier(tier)
        newest_first = sorted(blocks, key=lambda block: -block.written)
        for block in newest_first:
            lower.seals[block.slot] = block.checksum
        recall = self._state.tenants.recall
        lower.pool.adopt(
            [block.slot for block in newest_first], [recall(block.owner) for block in newest_first]
        )
        lower.pool.register(
            [block.slot for block in newest_first],
            [block.key for block in newest_first],
            [block.parent for block in newest_first],
        )
        lower.written = max(floor, newest_first[0].written if newest_first else 0)
        self._state.counters.recovered_blocks += len(newest_first)

    # -- loading -------------------------------------------------------------------------------

    def lookup(
        self,
        holder: Holder,
        hashes: Sequence[SequenceHash],
        now: float,
        windows: Sequence[int] = WHOLE,
        engine: EngineSpeed = UNKNOWN,
    ) -> LookupAnswer:
        """Return how much of the prefix is ready; start to stage what lies below the host.

        A model with several groups of layers has a window for each (see groups.py); `hashes` are
        then the keys of all its blocks in the first group, then in the next. `engine` is what it
        says of its speed. Raises ValueError, and changes nothing, if `hashes` do not come out even.
        """
        chains = split(hashes, windows)
        self._pass_time(now)
        return self._loading.lookup(holder, chains, engine)

    def acquire(
        self,
        holder: Holder,
        hashes: Sequence[SequenceHash],
        now: float,
        windows: Sequence[int] = WHOLE,
    ) -> AcquireAnswer:
        """Hold the longest ready prefix of `hashes` for reading until `release`; see `lookup`."""
        chains = split(hashes, windows)
        self._pass_time(now)
        answer, new = self._loading.acquire(holder, chains)
        self._offloading.used(new)
        return answer

    def release(self, holder: Holder) -> None:
        """End whatever `holder` holds for reading; harmless if that is nothing."""
        self._loading.release(holder)

    def lease(
        self, holder: Holder, hashes: Sequence[SequenceHash], seconds: float, now: float
    ) -> int:
        """Keep the longest prefix that is in the host from eviction for so long, as far as allowed.

        Returns its blocks. A lease takes the place of the one that `holder` had, which is how to
        renew it, and outlives its session; 0 seconds end it. Raises ValueError, and changes
        nothing, for a time that is out of range.
        """
        self._pass_time(now)
        return self._leasing.lease(holder, hashes, seconds)

    # -- storing -------------------------------------------------------------------------------

    def reserve(
        self,
        holder: Holder,
        parent: SequenceHash | None,
        hashes: Sequence[SequenceHash],
        hints: Sequence[BlockHint] = (),
        now: float = 0.0,
        owner: int = 0,
    ) -> ReserveAnswer:
        """Give out slots for the blocks of a chain that the host does not hold.

        `parent` is the key before `hashes[0]`, None at the root. `owner`, one of `tenants`, is
        charged for the slots, and takes none from a tenant that has no more than its guarantee.
        `hints` say how long blocks of the chain are to be kept, those that the tiers hold already
        too. Raises ValueError, and changes nothing, for a hint that reaches beyond the chain.
        """
        if any(hint.first + hint.count > len(hashes) for hint in hints):
            raise ValueError(f"hints: one reaches beyond the {len(hashes)} blocks offered")
        self._pass_time(max(now, self._state.now))
        indices, slots, throttled = self._storing.reserve(holder, parent, hashes, owner)
        self._retaining.agree(parent, hashes, [hashes[index] for index in indices], hints)
        return ReserveAnswer(indices, slots, throttled)

    def seal(self, holder: Holder, slots: Sequence[SlotId]) -> None:
        """Take filled slots; they become findable once their seal is computed.

        Raises ValueError, and changes nothing, for a slot that is not `holder`'s to seal.
        """
        self._storing.seal(holder, slots)

    def abort(self, holder: Holder, slots: Sequence[SlotId]) -> None:
        """Take slots back that were not filled and will not be written to; errors as `seal`."""
        self._storing.abort(holder, slots)

    # -- sessions, clearing --------------------------------------------------------------------

    def session_closed(self, session: SessionId) -> bool:
        """End a session whose process lives: what it was filling is quarantined until it dies.

        Returns whether there is anything in quarantine, so that `session_dead` must follow.
        """
        self._end_loading(session)
        return self._storing.quarantine(session)

    def session_dead(self, session: SessionId) -> None:
        """End a session whose process is gone: nobody can write to its slots any more."""
        self._end_loading(session)
        self._storing.reclaim(session)

    def clear(self, tiers: Collection[TierName]) -> int:
        """Forget every block in `tiers`, those on their way too; return how many there were."""
        state, count = self._state, 0
        if HOST in tiers:
            self._storing.discard()
            self._onboarding.discard()
            self._leasing.discard()
            keys = state.host.resident()
            state.left(keys, "cleared", HOST)
            count += len(state.host.withdraw(keys))
        for tier in state.lower:
            if tier.name in tiers:
                self._offloading.discard(tier.name)
                self._onboarding.discard()
                count += self._onboarding.withdraw(tier, tier.pool.resident(), "cleared")
        return count

    def forget(self, key: SequenceHash) -> int:
        """Forget `key` and every block whose chain leads through it, in every tier.

        Returns how many copies there were, those on their way left out. O(blocks): it looks at
        the parent of each. Blocks whose own parents are gone may have hung on `key`: they go too,
        and nobody can find them anyway until their parents are stored again.
        """
        state = self._state
        doomed = self._behind(key)
        self._storing.discard_some(doomed)
        self._onboarding.discard_some(doomed)
        self._offloading.discard_some(doomed)
        keys = [each for each in doomed if each in state.host]
        return self._withdraw_all(keys, {tier.name: list(doomed) for tier in state.lower})

    def clear_owned(self, owners: Collection[int]) -> int:
        """Forget the blocks that are charged to `owners`, of `tenants`, in every tier.

        Returns how many copies there were, those on their way left out; O(blocks). What others
        stored behind them stays, and is found again once somebody stores the blocks before it.
        """
        state = self._state
        host_keys = state.host.keys_of(owners)
        below = {tier.name: tier.pool.keys_of(owners) for tier in state.lower}
        everywhere = {key for keys in (host_keys, *below.values()) for key in keys}
        self._storing.discard_some(self._storing.owned_by(owners))
        self._onboarding.discard_some(everywhere)
        self._offloading.discard_some(self._offloading.owned_by(owners) | everywhere)
        return self._withdraw_all(host_keys, below)

    def lose(self, tier: TierName, slots: Sequence[SlotId]) -> None:
        """Withdraw what lies in `slots` of a lower tier: their device can neither read nor write.

        No index line is blanked, for the same reason; a start that can read them again may find
        the blocks again.
        """
        lower = self._state.tier(tier)
        keys = [key for key in map(lower.pool.hash_of, slots) if key is not None]
        self._state.left(keys, "lost", tier)
        self._state.counters.lost_blocks += len(lower.pool.withdraw(keys))

    def changes(self, cursor: int) -> ChangesAnswer:
        """Return what came to be in the tiers and left them since `cursor`; 0 asks from now on."""
        return self._state.changes.since(cursor)

    # -- why -----------------------------------------------------------------------------------

    def note_family(self, family: Family, namespace: bytes) -> None:
        """Take note that the first block of a prompt was stored in a namespace, given by tag."""
        self._families.note(family, namespace)

    def why_not_root(
        self, key: SequenceHash, family: Family, namespace: bytes, *, across_salts: bool = False
    ) -> str:
        """Return why `key`, the first block of a prompt, is not kept; empty if it is.

        It may be stored under another namespace, or, if that may be told, under another salt.
        """
        state = self._state
        if key in state.host or state.below(key) is not None:
            return ""
        reason = self._loading.why(key)
        if not reason.startswith("never stored"):
            return reason
        found = self._families.find(family, namespace, across_salts=across_salts)
        return sentence(found, namespace, state.tenants.namespace) if found else reason

    # -- time ----------------------------------------------------------------------------------

    def step(self, now: float) -> list[Job]:
        """Let time pass; return the jobs to start. They belong to the caller from here on."""
        self._pass_time(now)
        self._loading.expire()
        self._offloading.pump()
        self._deleting.pump()
        jobs = self._state.outbox[:]
        self._state.outbox.clear()
        return jobs

    def late(self, now: float) -> list[TransferId]:
        """Give up reads and questions past their deadline; return their ids, to be cancelled.

        Jobs that are completed after it ended at `now`.
        """
        self._state.now = now
        return self._onboarding.give_up_late(now) + self._probing.give_up_late(now)

    def complete(self, done: JobDone) -> None:
        """Take the single end of a job."""
        if self._deleting.finish(done):
            return
        if (probed := self._probing.finish(done)) is not None:
            self.adopt(*probed, evict=True)
            return
        state = self._state
        if state.costs and all(done.ok):
            state.costs.note_done(done.transfer, state.now)
        elif state.costs:
            state.costs.note_failed(done.transfer, state.now)
        stored = self._storing.finish(done)
        if stored is not None:
            self._retaining.apply(HOST, stored)
            self._offloading.registered(HOST, stored)
            self._offloading.used(stored)
            return
        staged = self._onboarding.finish(done)
        if staged is not None:
            self._retaining.apply(HOST, staged.hashes)
            if staged.hashes and state.tier(staged.tier).keyed:
                self._retaining.apply(staged.tier, staged.hashes)  # it may have learnt of them
            self._offloading.registered(HOST, staged.hashes)
            self._loading.hand_over(staged.hashes, staged.tier, staged.waiters)
            return
        written = self._offloading.finish(done)
        assert written is not None, f"{done.transfer=} is not a job of ours"
        self._onboarding.erase(*written)

    # -- looking -------------------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """What happened so far; the live object."""
        return self._state.counters

    @property
    def pending(self) -> int:
        """Blocks and jobs on their way; 0 when the node has nothing left to do."""
        busy = self._onboarding.in_flight + self._storing.in_flight + len(self._state.outbox)
        busy += self._probing.in_flight
        return busy + self._offloading.pending + self._deleting.pending

    @property
    def storing(self) -> int:
        """Blocks and jobs on their way into the tiers, those on their way out left aside."""
        return self._storing.in_flight + self._offloading.pending

    @property
    def deleting(self) -> int:
        """Jobs and keys of keyed tiers that are still to be deleted."""
        return self._deleting.pending

    def adopt(
        self, tier: TierName, found: Sequence[Found], *, cleared: bool = False, evict: bool = False
    ) -> None:
        """Take over blocks that were found in a keyed tier; with `cleared` delete them instead.

        Nothing of them is believed but that they may be there: a read verifies all of it. With
        `evict` others make room for them.
        """
        lower = self._state.tier(tier)
        new = self._offloading.unknown(lower, found)
        if cleared:
            self._deleting.doom(lower, [each.key for each in new])
        else:
            evicted = adopt(self._state, lower, new, evict=evict)
            self._state.evicted(evicted, tier)
            self._deleting.doom(lower, evicted)

    def written(self, tier: TierName) -> int:
        """Return the write counter of the block last given out to be written to a lower `tier`."""
        return self._state.tier(tier).written

    @property
    def holds(self) -> int:
        """Requests that hold blocks for reading."""
        return len(self._loading)

    @property
    def tenants(self) -> Tenants:
        """Who stored what; gives out owners."""
        return self._state.tenants

    @property
    def forgotten_changes(self) -> int:
        """Blocks whose coming or going was forgotten to make room, asked for or not."""
        return self._state.changes.lost_blocks

    @property
    def leases(self) -> int:
        """Leases that have not ended."""
        return len(self._leasing)

    @property
    def leased(self) -> int:
        """Host blocks that leases keep."""
        return self._leasing.blocks

    def costs(self) -> dict[str, Any]:
        """Return what is believed of tiers and engines; empty without a cost model."""
        return self._state.costs.statistics(self._state.now) if self._state.costs else {}

    def gauges(self) -> dict[str, float]:
        """Return what the host tier would have hit by `policy xSIZE`; empty without gauges."""
        return self._gauges.rates() if self._gauges else {}

    # -- private -------------------------------------------------------------------------------

    def _pass_time(self, now: float) -> None:
        self._state.now = now
        self._leasing.expire(now)
        self._retaining.expire(now)

    def _withdraw_all(
        self, host_keys: Sequence[SequenceHash], below: Mapping[TierName, Sequence[SequenceHash]]
    ) -> int:
        state = self._state
        count = len(state.host.withdraw(host_keys))
        state.left(host_keys, "cleared", HOST)
        for tier in state.lower:
            count += self._onboarding.withdraw(tier, below[tier.name], "cleared")
        return count

    def _end_loading(self, session: SessionId) -> None:
        self._loading.release_all(session)
        if self._state.costs:
            self._state.costs.session_ended(session)

    def _behind(self, key: SequenceHash) -> set[SequenceHash]:
        parents = self._storing.parents() | self._offloading.parents()
        for _, pool in self._state.pools():
            parents |= pool.parents()
        children: dict[SequenceHash, list[SequenceHash]] = {}
        for each, parent in parents.items():
            if parent is not None:
                children.setdefault(parent, []).append(each)
        ahead = [key, *(parent for parent in children if parent not in parents)]
        found = {key}
        while ahead:
            new = children.pop(ahead.pop(), [])
            found.update(new)
            ahead += new
        return found
