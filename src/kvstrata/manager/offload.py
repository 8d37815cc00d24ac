"""Offloading: copying blocks from each tier to the one below, as that one admits them.

A block waits in a backlog by its key only, unpinned: if the tiers above evict it before its turn,
it is simply not written. Back-pressure is therefore a shorter backlog, never a stalled engine. Two
set-ups hold blocks: a bypassed host keeps each until it is written, for it is no tier to stay in;
and where a tier takes what is evicted above it, the coldest blocks above are given up ahead of
time: they stay findable, are written, and are the first ones whose slots are given out.

All writes start in the host. A block that the host has not is relayed (see relay.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

from kvstrata.core.ids import SequenceHash, SlotId, TransferId
from kvstrata.core.tier import HOST, Admission, TierName
from kvstrata.manager.charging import refused_by_quota, reserve_each
from kvstrata.manager.deleting import Deleting
from kvstrata.manager.lineage import Found
from kvstrata.manager.onboard import Onboarding
from kvstrata.manager.relay import Arrived, Relaying
from kvstrata.manager.retaining import Retaining
from kvstrata.manager.state import BrainState, LowerTier
from kvstrata.policy import UseCounts
from kvstrata.pool import Pin, Pool
from kvstrata.transfer.base import JobDone, WriteJob

__all__ = ["Offloading"]


@dataclass(slots=True)
class _Write:
    job: WriteJob
    edge: _Edge
    end: Callable[[], None]  # gives back what the host slots were held by
    relayed_from: TierName = HOST
    stale: bool = False  # cleared meanwhile: its index line must not stay


@dataclass(slots=True)
class _Edge:
    """The way from one tier to the one below."""

    source: TierName
    above: Pool
    tier: LowerTier
    backlog: OrderedDict[SequenceHash, None] = field(default_factory=OrderedDict)
    writing: set[SequenceHash] = field(default_factory=set)
    kept: dict[SequenceHash, Pin] = field(default_factory=dict)  # above, until they are written

    def let_go(self, keys: Collection[SequenceHash]) -> None:
        """Hold `keys` above no longer: they were written, or will not be."""
        for key in keys:
            pin = self.kept.pop(key, None)
            if pin:
                pin.release()


@dataclass(frozen=True, slots=True)
class _Going:
    """Blocks in host slots, about to be written."""

    keys: list[SequenceHash]
    parents: list[SequenceHash | None]
    slots: list[SlotId]
    owners: list[int]
    end: Callable[[], None]
    relayed_from: TierName = HOST


class Offloading:
    """Blocks on their way down."""

    def __init__(
        self,
        state: BrainState,
        retaining: Retaining,
        onboarding: Onboarding,
        deleting: Deleting,
        *,
        bypass: bool,
    ) -> None:
        """Serve `state.lower`; with `bypass` the host keeps what is not written yet."""
        self._state, self._retaining, self._bypass = state, retaining, bypass
        self._deleting = deleting
        above = [(HOST, state.host), *((tier.name, tier.pool) for tier in state.lower)]
        self._edges = [
            _Edge(name, pool, tier) for (name, pool), tier in zip(above, state.lower, strict=False)
        ]
        self._writes: dict[TransferId, _Write] = {}
        self._relaying = Relaying(state, onboarding)
        slots = sum(pool.slots_total for _, pool in state.pools())
        frequent = any(tier.admission is Admission.FREQUENCY for tier in state.lower)
        self._uses = UseCounts(slots) if frequent else None

    @property
    def pending(self) -> int:
        """Blocks waiting, being relayed or being written."""
        waiting = sum(len(edge.backlog) for edge in self._edges)
        return waiting + self._relaying.blocks + sum(map(self._in_flight, self._edges))

    def registered(self, tier: TierName, hashes: Sequence[SequenceHash]) -> None:
        """Take note that `tier` has `hashes` now: those below it may want them."""
        for edge in self._edges:
            if edge.source == tier and edge.tier.admission is Admission.WRITE_THROUGH:
                self._wish(edge, hashes)

    def used(self, hashes: Sequence[SequenceHash]) -> None:
        """Take note that a request used `hashes`: tiers that admit by frequency may want them."""
        if self._uses is None:
            return
        often = self._uses.note(hashes, self._state.limits.admission_uses_min)
        for edge in self._edges:
            if edge.tier.admission is Admission.FREQUENCY:
                self._wish(edge, often)

    def discard(self, tier: TierName) -> None:
        """Forget what waits to enter `tier` and what was read from it to be relayed.

        What is being written there must not be found afterwards.
        """
        self._relaying.discard(tier)
        for edge in self._edges:
            if edge.tier.name == tier:
                edge.let_go([*edge.backlog])
                edge.backlog.clear()
                edge.writing.clear()  # a block that is stored again must be written again
        for write in self._writes.values():
            if tier in {write.edge.tier.name, write.relayed_from} and not write.stale:
                write.stale = True
                write.edge.writing.difference_update(write.job.keys)

    def discard_some(self, keys: Collection[SequenceHash]) -> None:
        """Forget those of `keys` that wait; jobs that write one must not be found afterwards."""
        self._relaying.discard_some(keys)
        for edge in self._edges:
            for key in keys:
                if key in edge.backlog:
                    del edge.backlog[key]
                    edge.let_go([key])
        for write in self._writes.values():
            if not write.stale and not set(write.job.keys).isdisjoint(keys):
                write.stale = True
                write.edge.writing.difference_update(write.job.keys)

    def parents(self) -> dict[SequenceHash, SequenceHash | None]:
        """Return the parent key of every key on its way; the tiers above may have lost some."""
        found = self._relaying.parents()
        for write in self._writes.values():
            found |= zip(write.job.keys, write.job.parents, strict=True)
        return found

    def owned_by(self, owners: Collection[int]) -> set[SequenceHash]:
        """Return the keys on their way whose slots are charged to `owners`."""
        found = self._relaying.owned_by(owners)
        for write in self._writes.values():
            of = write.edge.tier.pool.owner_of
            pairs = zip(write.job.targets, write.job.keys, strict=True)
            found.update(key for slot, key in pairs if of(slot) in owners)
        return found

    def unknown(self, tier: LowerTier, found: Sequence[Found]) -> list[Found]:
        """Return those of `found` that are not in `tier`, nor on their way into or out of it."""
        writing = {key for edge in self._edges if edge.tier is tier for key in edge.writing}
        known = writing | tier.doomed.keys() | self._deleting.going(tier)
        return [each for each in found if each.key not in tier and each.key not in known]

    def pump(self) -> None:
        """Start as many writes as the limits allow."""
        limits = self._state.limits
        for edge in self._edges:
            if edge.tier.admission is Admission.ON_EVICT:
                self._give_up_ahead(edge)
            while edge.backlog and self._in_flight(edge) < limits.offload_blocks_in_flight_max:
                here, away = self._next_batch(edge)
                if here:
                    self._start_from_host(edge, here)
                if away and (refused := self._relaying.start(edge.tier, away)):
                    edge.writing.difference_update(refused)
                    edge.let_go(refused)

    def finish(self, done: JobDone) -> tuple[LowerTier, list[SlotId]] | None:
        """Take the end of a job; None if it was not one of ours.

        Returns the tier and its slots whose index lines must be blanked; they are quarantined.
        """
        arrived = self._relaying.finish(done)
        if arrived is not None:
            self._go_on(arrived)
            return arrived.target, []
        write = self._writes.pop(done.transfer, None)
        if write is None:
            return None
        edge, job = write.edge, write.job
        write.end()
        if write.stale:
            edge.let_go(job.keys)
            if edge.tier.keyed:
                edge.tier.pool.abort(job.targets)
                unwanted = [key for key in job.keys if key not in edge.writing]
                self._deleting.doom(edge.tier, [key for key in unwanted if key not in edge.tier])
                return edge.tier, []
            edge.tier.pool.quarantine_filling(job.targets)
            return edge.tier, list(job.targets)
        edge.writing.difference_update(job.keys)
        self._register(edge.tier, job, done)
        edge.let_go(job.keys)
        return edge.tier, []

    # -- private -------------------------------------------------------------------------------

    def _in_flight(self, edge: _Edge) -> int:
        return sum(len(each.job.slots) for each in self._writes.values() if each.edge is edge)

    def _wish(self, edge: _Edge, hashes: Sequence[SequenceHash]) -> None:
        counters = self._state.counters
        wanted = [key for key in hashes if key not in edge.tier and key not in edge.writing]
        asked, offloads = len(wanted), self._retaining.offloads
        wanted = [key for key in wanted if offloads(key)]
        if edge is self._edges[0]:
            counters.kept_in_host_blocks += asked - len(wanted)
        room = max(self._state.limits.offload_backlog_blocks_max - len(edge.backlog), 0)
        counters.throttled_write_blocks += max(len(wanted) - room, 0)
        edge.backlog.update(dict.fromkeys(wanted[:room]))
        if self._bypass and edge is self._edges[0]:
            for key, slot in zip(wanted, self._state.host.scan(wanted[:room]), strict=False):
                if slot is not None and key not in edge.kept:
                    edge.kept[key] = self._state.host.pin([slot], used=False)

    def _give_up_ahead(self, edge: _Edge) -> None:
        """Choose the blocks above that leave next, and write those of them that are not below."""
        pool = edge.above
        wanted = max(int(self._state.limits.demote_share * pool.slots_total), 1)
        room = self._state.limits.offload_backlog_blocks_max - len(edge.backlog)
        count = min(wanted - pool.ready_to_go - len(edge.kept), room)
        if count <= 0:
            return
        pins = pool.give_up_ahead(count)
        keys = [key for pin in pins if (key := pool.hash_of(pin.slots[0])) is not None]
        edge.let_go(keys)  # other slots, whose copies of these keys were cleared
        edge.kept.update(zip(keys, pins, strict=True))
        offloads = self._retaining.offloads
        dirty = [key for key in keys if key not in edge.tier and key not in edge.writing]
        kept = [key for key in dirty if not offloads(key)]
        self._state.counters.kept_in_host_blocks += len(kept)
        going = dict.fromkeys(key for key in dirty if key not in set(kept))
        edge.backlog.update(going)
        edge.let_go([key for key in keys if key not in going and key not in edge.writing])

    def _next_batch(self, edge: _Edge) -> tuple[list[SequenceHash], list[SequenceHash]]:
        """Take keys from the backlog: those that the host has, and those to be relayed."""
        state, limit = self._state, self._state.limits.job_blocks_max
        here: list[SequenceHash] = []
        away: list[SequenceHash] = []
        dropped: list[SequenceHash] = []
        while edge.backlog and len(here) < limit and len(away) < limit:
            key = edge.backlog.popitem(last=False)[0]
            if key in edge.tier:
                dropped.append(key)
            elif not self._retaining.offloads(key):  # somebody said so while it waited
                state.counters.kept_in_host_blocks += edge is self._edges[0]
                dropped.append(key)
            elif key in state.host:
                here.append(key)
            elif state.below(key) is not None:
                away.append(key)
            else:
                state.counters.evicted_unwritten_blocks += 1
                dropped.append(key)
        edge.let_go(dropped)
        edge.writing.update(here, away)
        if edge.tier.admission is Admission.ON_EVICT:  # they came deepest first
            return here[::-1], away[::-1]
        return here, away

    def _start_from_host(self, edge: _Edge, keys: list[SequenceHash]) -> None:
        host = self._state.host
        slots = [slot for slot in host.scan(keys) if slot is not None]
        pin = host.pin(slots, used=False)
        parents = [host.parent_of(slot) for slot in slots]
        owners = list(map(host.owner_of, slots))
        self._start(edge, _Going(keys, parents, slots, owners, pin.release))

    def _go_on(self, arrived: Arrived) -> None:
        """Write what was relayed into the host's slots to where it was going."""
        (edge,) = [each for each in self._edges if each.tier is arrived.target]
        edge.writing.difference_update(arrived.lost)
        edge.let_go(arrived.lost)
        if not arrived.keys:
            return
        host, slots = self._state.host, arrived.slots
        owners = list(map(host.owner_of, slots))
        end = partial(host.abort, slots)
        going = _Going(arrived.keys, arrived.parents, slots, owners, end, arrived.source)
        self._start(edge, going)

    def _start(self, edge: _Edge, going: _Going) -> None:
        state, tier = self._state, edge.tier
        targets, evicted = reserve_each(tier.pool, going.keys, going.owners)
        state.evicted(evicted, tier.name)
        if tier.keyed:
            self._deleting.doom(tier, evicted)
            self._deleting.spare(tier, targets)
        left = [place for place, key in enumerate(going.keys) if key not in targets]
        for place in left:
            by_quota = refused_by_quota(tier.pool, 1, going.owners[place])
            state.counters.throttled_quota_blocks += by_quota
            state.counters.throttled_write_blocks += 1 - by_quota
        rest = [going.keys[place] for place in left]
        edge.writing.difference_update(rest)
        if not targets:
            going.end()
        else:
            places = [place for place, key in enumerate(going.keys) if key in targets]
            slots = [going.slots[place] for place in places]
            job = WriteJob(
                transfer=state.next_transfer(),
                tier=tier.name,
                slots=tuple(slots),
                targets=tuple(targets.values()),
                keys=tuple(targets),
                parents=tuple(going.parents[place] for place in places),
                checksums=tuple(state.host_seals[slot] for slot in slots),
                written=tier.written + 1,
                owners=tuple(state.tenants.tag_of(going.owners[place]) for place in places),
            )
            tier.written += len(slots)
            self._writes[job.transfer] = _Write(job, edge, going.end, going.relayed_from)
            if state.costs:
                state.costs.note_write(job.transfer, tier.name, len(slots), state.now)
            state.outbox.append(job)
        edge.let_go(rest)

    def _register(self, tier: LowerTier, job: WriteJob, done: JobDone) -> None:
        counters, pool = self._state.counters, tier.pool
        good = [index for index, ok in enumerate(done.ok) if ok]
        failed = [job.targets[index] for index, ok in enumerate(done.ok) if not ok]
        pool.abort(failed)
        counters.write_failed_blocks += len(failed)
        counters.written_blocks += len(good)
        slots = [job.targets[index] for index in good]
        for index in good:
            tier.seals[job.targets[index]] = job.checksums[index]
        pool.stage(slots)
        keys = [job.keys[index] for index in good]
        pool.register(slots, keys, [job.parents[index] for index in good])
        self._state.arrived(keys, tier.name)
        self._retaining.apply(tier.name, keys)
        self.registered(tier.name, keys)
