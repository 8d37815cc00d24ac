"""The brain of a node, as one sans-I/O object: messages and `now` in, answers and jobs out.

Owner: one thread; nothing here waits, and nothing calls back. A request of an engine walks

    lookup -> (pending: again) -> acquire -> release          to load what is kept
    reserve -> seal or abort                                  to store what was computed

Repeating a call doubles nothing. A refused call changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from kvstrata.core.config import Limits
from kvstrata.core.ids import Holder, SequenceHash, SessionId, SlotId, TransferId
from kvstrata.core.retention import BlockHint
from kvstrata.core.tier import Tier
from kvstrata.manager.explain import DEPARTURES_MAX, Departures, Gauges
from kvstrata.manager.leasing import Leasing
from kvstrata.manager.mismatch import FAMILIES_MAX, Families, sentence
from kvstrata.manager.offload import Offloading
from kvstrata.manager.onboard import Onboarding
from kvstrata.manager.retaining import Retaining
from kvstrata.manager.state import BrainState, Counters
from kvstrata.manager.storing import Storing
from kvstrata.manager.tenants import Tenants
from kvstrata.pool import Pin, Pool
from kvstrata.storage.base import StoredBlock
from kvstrata.tokens.family import Family
from kvstrata.transfer.base import Job, JobDone

__all__ = ["AcquireAnswer", "LookupAnswer", "Manager", "ReserveAnswer"]


@dataclass(frozen=True, slots=True)
class LookupAnswer:
    """What is kept of a prefix, in blocks."""

    ready: int
    """Leading blocks that are in the host now, held for this request until it goes on."""
    ready_from_disk: int
    """How many of `ready` were staged from disk for this request."""
    pending: int
    """Blocks behind `ready` that are being staged; ask again before `until`."""
    until: float
    """When staging is given up, on the clock of `now`; 0 if nothing is pending."""
    why: str
    """Why the first block behind `ready` is not ready: empty if there is none."""


@dataclass(frozen=True, slots=True)
class AcquireAnswer:
    """Slots to read, root first."""

    slots: list[SlotId]
    """Host slots, pinned until the request is released."""
    generations: list[int]
    """Generation of each slot; a reader that sees another one must not use what it read."""
    from_disk: int
    """How many of them were staged from disk for this request."""


@dataclass(frozen=True, slots=True)
class ReserveAnswer:
    """Slots to fill, for those of the offered blocks that are not held already."""

    indices: list[int]
    """Which of the offered blocks are wanted, rising."""
    slots: list[SlotId]
    """The slot of each."""
    throttled: int
    """Wanted blocks that found no slot: not an error, they are simply not stored."""


@dataclass(slots=True)
class _Hold:
    expires: float
    staging_until: float = 0.0
    acquired: bool = False
    pins: list[Pin] = field(default_factory=list)
    held: set[SlotId] = field(default_factory=set)
    staged: set[SequenceHash] = field(default_factory=set)
    counted: set[SequenceHash] = field(default_factory=set)
    throttled: set[SequenceHash] = field(default_factory=set)


class Manager:
    """Decides over one block layout's tiers."""

    def __init__(
        self,
        host: Pool,
        disk: Pool | None,
        limits: Limits,
        policy: str | None = None,
        tenants: Tenants | None = None,
    ) -> None:
        """Take over empty pools; `disk` is None for a node without one.

        `policy` names what the pools evict by; with it, gauges tell what others would have hit.
        `tenants` has made the pools' policies, if there are guarantees.
        """
        slots = host.slots_total + (disk.slots_total if disk else 0)
        self._state = BrainState(
            departures=Departures(min(max(slots, 1024), DEPARTURES_MAX)),
            host=host,
            disk=disk,
            limits=limits,
            policy=policy or "",
            tenants=tenants or Tenants(),
            host_seals=[b""] * host.slots_total,
            disk_seals=[b""] * (disk.slots_total if disk else 0),
        )
        self._onboarding = Onboarding(self._state)
        self._retaining = Retaining(self._state, self._onboarding.erase)
        self._offloading = Offloading(self._state, self._retaining)
        self._storing = Storing(self._state)
        self._leasing = Leasing(self._state)
        self._state.tenants.watch({"host": host} | ({"disk": disk} if disk else {}))
        self._families = Families(min(max(slots, 1024), FAMILIES_MAX))
        self._holds: dict[Holder, _Hold] = {}
        self._gauges = Gauges(host.slots_total, policy) if policy else None

    def recover(self, blocks: Sequence[StoredBlock], floor: int = 0) -> None:
        """Adopt what the disk store found at start, oldest first; call before anything else.

        New blocks are numbered above these and above `floor`, up to which blocks were cleared.
        """
        disk = self._state.disk
        assert disk is not None
        newest_first = sorted(blocks, key=lambda block: -block.written)
        for block in newest_first:
            self._state.disk_seals[block.slot] = block.checksum
        recall = self._state.tenants.recall
        disk.adopt(
            [block.slot for block in newest_first], [recall(block.owner) for block in newest_first]
        )
        disk.register(
            [block.slot for block in newest_first],
            [block.key for block in newest_first],
            [block.parent for block in newest_first],
        )
        self._offloading.resume_after(max(floor, newest_first[0].written if newest_first else 0))
        self._state.counters.recovered_blocks += len(newest_first)

    # -- loading -------------------------------------------------------------------------------

    def lookup(self, holder: Holder, hashes: Sequence[SequenceHash], now: float) -> LookupAnswer:
        """Return how much of the prefix is ready; start to stage what lies on disk behind it."""
        state, limits = self._state, self._state.limits
        self._pass_time(now)
        hold = self._holds.get(holder)
        if hold is None:
            hold = self._holds[holder] = _Hold(expires=0.0)
            state.counters.lookups += 1
            if self._gauges:
                self._gauges.use(hashes)
        hold.expires = now + limits.hold_timeout_s
        found = state.host.scan(hashes)
        pairs = zip(hashes, found, strict=True)
        self._pin(hold, [(key, slot) for key, slot in pairs if slot is not None])
        ready = found.index(None) if None in found else len(found)
        from_disk = self._staged(hold, hashes[:ready])
        on_disk, coming = self._beyond(hashes, found, ready, holder)
        late = hold.staging_until and now >= hold.staging_until
        if (on_disk or coming) and not late:
            hold.staging_until = hold.staging_until or now + limits.staging_timeout_s
            if on_disk:
                left = self._onboarding.stage(on_disk, holder, hold.staging_until)
                new = set(left) - hold.throttled  # a repeated lookup counts nothing twice
                state.counters.throttled_stage_blocks += len(new)
                hold.throttled |= new
            if coming or self._onboarding.is_waiting(holder):
                pending, until = max(len(on_disk), 1), hold.staging_until
                return LookupAnswer(ready, from_disk, pending, until, "pending")
        why = ""
        if ready < len(hashes):
            why = self._why(hashes[ready], too_late=bool(late and (on_disk or coming)), now=now)
        return LookupAnswer(ready, from_disk, 0, 0.0, why)

    def acquire(self, holder: Holder, hashes: Sequence[SequenceHash], now: float) -> AcquireAnswer:
        """Hold the longest ready prefix of `hashes` for reading until `release`."""
        host = self._state.host
        self._pass_time(now)
        hold = self._holds.setdefault(holder, _Hold(expires=now))
        hold.acquired = True
        slots = host.match(hashes)
        self._pin(hold, list(zip(hashes, slots, strict=False)))
        from_disk = self._staged(hold, hashes[: len(slots)])
        counted = [key for key in hashes[: len(slots)] if key not in hold.counted]
        counted_from_disk = self._staged(hold, counted)
        self._state.counters.hit_blocks_disk += counted_from_disk
        self._state.counters.hit_blocks_host += len(counted) - counted_from_disk
        hold.counted.update(counted)
        return AcquireAnswer(slots, [host.generations[slot] for slot in slots], from_disk)

    def release(self, holder: Holder) -> None:
        """End whatever `holder` holds for reading; harmless if that is nothing."""
        hold = self._holds.pop(holder, None)
        if hold:
            for pin in reversed(hold.pins):  # deepest first: a chain ages from its end
                pin.release()

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
        self._release_all(session)
        return self._storing.quarantine(session)

    def session_dead(self, session: SessionId) -> None:
        """End a session whose process is gone: nobody can write to its slots any more."""
        self._release_all(session)
        self._storing.reclaim(session)

    def clear(self, tiers: Collection[Tier]) -> int:
        """Forget every block in `tiers`, those on their way too; return how many there were."""
        state, count = self._state, 0
        if Tier.HOST in tiers:
            self._storing.discard()
            self._onboarding.discard()
            self._leasing.discard()
            keys = state.host.resident()
            state.left(keys, "cleared", Tier.HOST)
            count += len(state.host.withdraw(keys))
        if Tier.DISK in tiers and state.disk:
            self._offloading.discard()
            self._onboarding.discard()
            keys = state.disk.resident()
            state.left(keys, "cleared", Tier.DISK)
            slots = state.disk.withdraw(keys, quarantine=True)
            self._onboarding.erase(slots)
            count += len(slots)
        return count

    def forget(self, key: SequenceHash) -> int:
        """Forget `key` and every block whose chain leads through it, in every tier.

        Returns how many copies there were, those on their way left out. O(blocks): it looks at
        the parent of each. Blocks whose own parents are gone may have hung on `key`: they go too,
        and nobody can find them anyway until their parents are stored again.
        """
        state = self._state
        doomed = self._below(key)
        self._storing.discard_some(doomed)
        self._onboarding.discard_some(doomed)
        self._offloading.discard_some(doomed)
        disk = state.disk or ()
        return self._withdraw_all(
            [each for each in doomed if each in state.host],
            [each for each in doomed if each in disk],
        )

    def clear_owned(self, owners: Collection[int]) -> int:
        """Forget the blocks that are charged to `owners`, of `tenants`, in every tier.

        Returns how many copies there were, those on their way left out; O(blocks). What others
        stored behind them stays, and is found again once somebody stores the blocks before it.
        """
        state = self._state
        host_keys = state.host.keys_of(owners)
        disk_keys = state.disk.keys_of(owners) if state.disk else []
        self._storing.discard_some(self._storing.owned_by(owners))
        self._onboarding.discard_some(set(disk_keys))
        self._offloading.discard_some(self._offloading.owned_by(owners).union(host_keys))
        return self._withdraw_all(host_keys, disk_keys)

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
        if key in state.host or (state.disk and key in state.disk):
            return ""
        reason = self._why(key, too_late=False, now=state.now)
        if not reason.startswith("never stored"):
            return reason
        found = self._families.find(family, namespace, across_salts=across_salts)
        return sentence(found, namespace, state.tenants.namespace) if found else reason

    # -- time ----------------------------------------------------------------------------------

    def step(self, now: float) -> list[Job]:
        """Let time pass; return the jobs to start. They belong to the caller from here on."""
        expired = [
            holder
            for holder, hold in self._holds.items()
            if not hold.acquired and now >= hold.expires
        ]
        for holder in expired:
            self._state.counters.expired_holds += 1
            self.release(holder)
        self._pass_time(now)
        self._offloading.pump()
        jobs = self._state.outbox[:]
        self._state.outbox.clear()
        return jobs

    def late(self, now: float) -> list[TransferId]:
        """Give up reads past their deadline; return their ids so that the caller cancels them."""
        return self._onboarding.give_up_late(now)

    def complete(self, done: JobDone) -> None:
        """Take the single end of a job."""
        stored = self._storing.finish(done)
        if stored is not None:
            self._retaining.apply(self._state.host, stored)
            self._offloading.wish(stored)
            return
        staged = self._onboarding.finish(done)
        if staged is not None:
            self._retaining.apply(self._state.host, staged.hashes)
            self._hand_over(staged.hashes, staged.waiters)
            return
        to_erase = self._offloading.finish(done)
        assert to_erase is not None, f"{done.transfer=} is not a job of ours"
        self._onboarding.erase(to_erase)

    # -- looking -------------------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """What happened so far; the live object."""
        return self._state.counters

    @property
    def tenants(self) -> Tenants:
        """Who stored what; gives out owners."""
        return self._state.tenants

    @property
    def pending(self) -> int:
        """Blocks and jobs on their way; 0 when the node has nothing left to do."""
        busy = self._onboarding.in_flight + self._storing.in_flight + len(self._state.outbox)
        return busy + self._offloading.pending

    @property
    def storing(self) -> int:
        """Blocks and jobs on their way into the tiers, those on their way out left aside."""
        return self._storing.in_flight + self._offloading.pending

    @property
    def written(self) -> int:
        """Write counter of the block last given out to be written to disk."""
        return self._offloading.written

    @property
    def holds(self) -> int:
        """Requests that hold blocks for reading."""
        return len(self._holds)

    @property
    def leases(self) -> int:
        """Leases that have not ended."""
        return len(self._leasing)

    @property
    def leased(self) -> int:
        """Host blocks that leases keep."""
        return self._leasing.blocks

    def gauges(self) -> dict[str, float]:
        """Return what the host tier would have hit by `policy xSIZE`; empty without gauges."""
        return self._gauges.rates() if self._gauges else {}

    # -- private -------------------------------------------------------------------------------

    def _pass_time(self, now: float) -> None:
        self._state.now = now
        self._leasing.expire(now)
        self._retaining.expire(now)

    def _withdraw_all(
        self, host_keys: Sequence[SequenceHash], disk_keys: Sequence[SequenceHash]
    ) -> int:
        state = self._state
        count = len(state.host.withdraw(host_keys))
        state.left(host_keys, "cleared", Tier.HOST)
        if state.disk:
            slots = state.disk.withdraw(disk_keys, quarantine=True)
            state.left(disk_keys, "cleared", Tier.DISK)
            self._onboarding.erase(slots)
            count += len(slots)
        return count

    def _below(self, key: SequenceHash) -> set[SequenceHash]:
        parents = self._storing.parents() | self._offloading.parents() | self._state.host.parents()
        if self._state.disk:
            parents |= self._state.disk.parents()
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

    def _why(self, key: SequenceHash, *, too_late: bool, now: float) -> str:
        """Return why `key` is not ready, most telling reason first."""
        if too_late:
            return "too slow"
        disk = self._state.disk
        if disk is not None and key in disk:
            return "on disk, no host slot free"
        if self._storing.is_coming(key):
            return "being stored"
        return self._state.departures.why(key, now)

    def _beyond(
        self,
        hashes: Sequence[SequenceHash],
        found: Sequence[SlotId | None],
        ready: int,
        holder: Holder,
    ) -> tuple[list[SequenceHash], bool]:
        """Return the keys to stage behind `ready`, and whether some are on their way already."""
        on_disk: list[SequenceHash] = []
        coming = False
        disk = self._state.disk or ()
        for key, slot in zip(hashes[ready:], found[ready:], strict=True):
            if slot is not None:
                continue
            if self._onboarding.waiting_for(key, holder) or self._storing.is_sealing(key):
                coming = True
            elif key in disk:
                on_disk.append(key)
            else:
                break
        return on_disk, coming

    def _pin(self, hold: _Hold, found: Sequence[tuple[SequenceHash, SlotId]]) -> None:
        # By slot, not by key: a key that was cleared and stored again lives in another slot.
        new = [slot for _, slot in found if slot not in hold.held]
        if new:
            hold.pins.append(self._state.host.pin(new))
            hold.held.update(new)

    def _hand_over(self, hashes: Sequence[SequenceHash], waiters: Collection[Holder]) -> None:
        found = self._state.host.scan(hashes)
        pairs = [(key, slot) for key, slot in zip(hashes, found, strict=True) if slot is not None]
        for holder in waiters:
            hold = self._holds.get(holder)
            if hold:
                self._pin(hold, pairs)
                hold.staged.update(key for key, _ in pairs)

    def _staged(self, hold: _Hold, hashes: Sequence[SequenceHash]) -> int:
        return sum(key in hold.staged for key in hashes) if hold.staged else 0

    def _release_all(self, session: SessionId) -> None:
        for holder in [each for each in self._holds if each.session == session]:
            self.release(holder)
