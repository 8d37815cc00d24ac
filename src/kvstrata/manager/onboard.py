"""Staging: bringing blocks from lower tiers into the host for requests that wait for them.

One read serves every request that wants the block. A read that outlives its deadline is given
up: its host slots are quarantined until the backend says that it will write no more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from kvstrata.core.ids import Holder, SequenceHash, SlotId, TransferId
from kvstrata.core.tier import HOST, TierName
from kvstrata.manager.charging import reserve_prefix
from kvstrata.manager.deleting import Deleting
from kvstrata.manager.lineage import learn
from kvstrata.manager.state import BrainState, LowerTier
from kvstrata.pool import Pin
from kvstrata.transfer.base import EraseJob, JobDone, ReadJob

__all__ = ["Onboarding", "Staged"]


@dataclass(frozen=True, slots=True)
class Staged:
    """Blocks that arrived in the host, and the requests that waited for them."""

    hashes: list[SequenceHash]
    """Keys, now registered in the host."""
    tier: TierName
    """Where they came from."""
    waiters: set[Holder]
    """Who asked for them."""


@dataclass(slots=True)
class _Read:
    job: ReadJob
    tier: LowerTier
    source_pin: Pin
    deadline: float
    waiters: set[Holder] = field(default_factory=set)
    given_up: bool = False
    stale: bool = False  # cleared meanwhile: what arrives must not be registered


class Onboarding:
    """Reads in flight from lower tiers to the host."""

    def __init__(self, state: BrainState, deleting: Deleting) -> None:
        self._state, self._deleting = state, deleting
        self._reads: dict[TransferId, _Read] = {}
        self._reading: dict[SequenceHash, TransferId] = {}
        self._erasing: dict[TransferId, EraseJob] = {}

    @property
    def in_flight(self) -> int:
        """Jobs given out and not ended."""
        return len(self._reads) + len(self._erasing)

    def is_reading(self, key: SequenceHash) -> bool:
        """Return whether `key` is being read."""
        return key in self._reading

    def waiting_for(self, key: SequenceHash, holder: Holder) -> bool:
        """Return whether `key` is being read; if so `holder` is told when it arrives."""
        transfer = self._reading.get(key)
        if transfer is None:
            return False
        self._reads[transfer].waiters.add(holder)
        return True

    def is_waiting(self, holder: Holder) -> bool:
        """Return whether some read for `holder` has not ended."""
        return any(holder in read.waiters and not read.given_up for read in self._reads.values())

    def stage(
        self, hashes: Sequence[SequenceHash], holder: Holder | None, deadline: float
    ) -> Sequence[SequenceHash]:
        """Start reads for `hashes`, which lie below the host, not in it, and are not being read.

        As many of them as the host has slots for, the first ones first; returns the others. Each is
        read from the nearest tier that has it. Without a `holder` nobody waits for them.
        """
        state = self._state
        reserved, evicted = reserve_prefix(state.host, hashes, list(map(self.owner_of, hashes)))
        state.evicted(evicted, HOST)
        first = 0
        for tier, keys in self.batches(hashes[: len(reserved)]):
            slots = reserved[first : first + len(keys)]
            first += len(keys)
            found = tier.slots_of(keys)
            job = ReadJob(state.next_transfer(), tier.name, tuple(found), tuple(slots), tuple(keys))
            pin = tier.pool.pin(found)
            waiters = set() if holder is None else {holder}
            self._reads[job.transfer] = _Read(job, tier, pin, deadline, waiters)
            if state.costs:
                state.costs.note_read(job.transfer, tier.name, len(keys), state.now)
            self._reading.update(dict.fromkeys(job.keys, job.transfer))
            state.outbox.append(job)
        return hashes[len(reserved) :]

    def owner_of(self, key: SequenceHash) -> int:
        """Return who is charged for `key`, which lies below the host, where it is read from."""
        tier = self._state.below(key)
        assert tier is not None, "a block to stage is nowhere"
        (slot,) = tier.slots_of([key])
        return tier.pool.owner_of(slot)

    def batches(
        self, hashes: Sequence[SequenceHash]
    ) -> Iterator[tuple[LowerTier, list[SequenceHash]]]:
        """Yield runs of `hashes`, which lie below the host, that one job each can read."""
        limit = self._state.limits.job_blocks_max
        run: list[SequenceHash] = []
        source: LowerTier | None = None
        for key in hashes:
            tier = self._state.below(key)
            assert tier is not None, "a block to stage is nowhere"
            if source is not None and (tier is not source or len(run) == limit):
                yield source, run
                run = []
            source = tier
            run.append(key)
        if source is not None:
            yield source, run

    def give_up_late(self, now: float) -> list[TransferId]:
        """Stop waiting for reads past their deadline; return their ids, to be cancelled."""
        late = []
        for transfer, read in self._reads.items():
            if read.given_up or now < read.deadline:
                continue
            self._give_up(read)
            self._state.counters.staging_timeout_blocks += len(read.job.slots)
            self._rest(read.tier)
            if self._state.costs:
                self._state.costs.note_given_up(transfer, now)
            late.append(transfer)
        return late

    def discard(self) -> None:
        """What is being read must not be registered when it arrives."""
        for read in self._reads.values():
            read.stale = True

    def discard_some(self, keys: Collection[SequenceHash]) -> None:
        """Of what is being read, jobs that have one of `keys` must not be registered."""
        for read in self._reads.values():
            if not set(read.job.keys).isdisjoint(keys):
                read.stale = True

    def finish(self, done: JobDone) -> Staged | None:
        """Take the end of a job; None if it was not one of ours."""
        if erase := self._erasing.pop(done.transfer, None):
            self._state.tier(erase.tier).pool.end_quarantine(erase.targets)
            return Staged([], erase.tier, set())
        read = self._reads.pop(done.transfer, None)
        if read is None:
            return None
        read.source_pin.release()
        if read.given_up:
            self._state.host.end_quarantine(read.job.slots)
            return Staged([], read.tier.name, set())
        for key in read.job.keys:
            del self._reading[key]
        return Staged(self._register(read, done), read.tier.name, read.waiters)

    def erase(self, tier: LowerTier, slots: Sequence[SlotId]) -> None:
        """Blank the index lines of quarantined `slots` of `tier`, then free them."""
        step = self._state.limits.job_blocks_max * 64  # index lines are small
        for first in range(0, len(slots), step):
            part = tuple(slots[first : first + step])
            job = EraseJob(self._state.next_transfer(), tier.name, part)
            self._erasing[job.transfer] = job
            self._state.outbox.append(job)

    def withdraw(self, tier: LowerTier, keys: Sequence[SequenceHash], what: str) -> int:
        """Make `keys` unfindable in `tier` for the reason `what`; return how many there were."""
        there = [key for key in keys if key in tier.pool]
        self._state.left(there, what, tier.name)
        self.remove(tier, there)
        return len(there)

    def remove(self, tier: LowerTier, keys: Sequence[SequenceHash]) -> list[SlotId]:
        """Make `keys` unfindable in `tier`, for a restart too; return the slots they had."""
        if tier.keyed:
            self._deleting.doom(tier, keys)
            return tier.pool.withdraw(keys)
        slots = tier.pool.withdraw(keys, quarantine=True)
        self.erase(tier, slots)
        return slots

    def check(self, tier: LowerTier, job: ReadJob, done: JobDone, *, stale: bool) -> list[int]:
        """Return which blocks of a read are whole and wanted; withdraw those that are damaged."""
        pool, counters = tier.pool, self._state.counters
        good: list[int] = []
        corrupt: list[SequenceHash] = []
        unread: list[SequenceHash] = []
        for index, (source, key) in enumerate(zip(job.sources, job.keys, strict=True)):
            if pool.hash_of(source) != key:
                continue  # it left the tier meanwhile
            if index in done.damaged:
                corrupt.append(key)
            elif not done.ok[index]:
                unread.append(key)
            elif tier.keyed:  # what arrived was compared with its own header's seal
                good += [] if stale else [index]
            elif done.checksums[index] != tier.seals[source]:
                corrupt.append(key)
            elif not stale:
                good.append(index)
        if tier.keyed:
            self._note_keyed(tier, job, done, unread, corrupt)
            return good
        counters.read_failed_blocks += self.withdraw(tier, unread, "read failed")
        counters.corrupt_blocks += self.withdraw(tier, corrupt, "corrupt")
        return good

    def _note_keyed(
        self,
        tier: LowerTier,
        job: ReadJob,
        done: JobDone,
        unread: Sequence[SequenceHash],
        corrupt: Sequence[SequenceHash],
    ) -> None:
        """Forget what is not there or not ours, without deleting it; what may be there stays."""
        state, pool = self._state, tier.pool
        state.counters.read_failed_blocks += len(unread)
        state.counters.corrupt_blocks += len(corrupt)
        lost = {job.keys[index] for index in done.lost}
        gone = [key for key in unread if key in lost]
        for keys, what in ((gone, "read failed"), (corrupt, "corrupt")):
            state.left(keys, what, tier.name)
            pool.withdraw(keys)
        if len(gone) < len(unread):
            self._rest(tier)
        learn(state, tier, job.keys, done.lineage)

    def _rest(self, tier: LowerTier) -> None:
        """Ask a keyed tier for nothing for a while: each request would wait for it in vain."""
        if tier.keyed:
            tier.rests_until = self._state.now + self._state.limits.rest_s

    def _give_up(self, read: _Read) -> None:
        read.given_up = True
        self._state.host.quarantine_filling(read.job.slots)
        for key in read.job.keys:
            del self._reading[key]

    def _register(self, read: _Read, done: JobDone) -> list[SequenceHash]:
        state, host, job, pool = self._state, self._state.host, read.job, read.tier.pool
        parents = [
            said.parent if said else pool.parent_of(source)
            for source, said in zip(
                job.sources, done.lineage or [None] * len(job.sources), strict=True
            )
        ]
        good = self.check(read.tier, job, done, stale=read.stale)
        host.abort([slot for place, slot in enumerate(job.slots) if place not in set(good)])
        slots = [job.slots[index] for index in good]
        keys = [job.keys[index] for index in good]
        for index in good:
            state.host_seals[job.slots[index]] = done.checksums[index]
        host.stage(slots)
        host.register(slots, keys, [parents[index] for index in good])
        state.arrived(keys, HOST)
        return keys
