"""Staging: bringing blocks from disk into the host for requests that wait for them.

One read serves every request that wants the block. A read that outlives its deadline is given
up: its host slots are quarantined until the backend says that it will write no more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from kvstrata.core.ids import Holder, SequenceHash, SlotId, TransferId
from kvstrata.core.tier import Tier
from kvstrata.manager.charging import reserve_prefix
from kvstrata.manager.state import BrainState
from kvstrata.pool import Pin
from kvstrata.transfer.base import EraseJob, JobDone, ReadJob

__all__ = ["Onboarding", "Staged"]


@dataclass(frozen=True, slots=True)
class Staged:
    """Blocks that arrived in the host, and the requests that waited for them."""

    hashes: list[SequenceHash]
    """Keys, now registered in the host."""
    waiters: set[Holder]
    """Who asked for them."""


@dataclass(slots=True)
class _Read:
    job: ReadJob
    disk_pin: Pin
    deadline: float
    waiters: set[Holder] = field(default_factory=set)
    given_up: bool = False
    stale: bool = False  # cleared meanwhile: what arrives must not be registered


class Onboarding:
    """Reads in flight from disk to host."""

    def __init__(self, state: BrainState) -> None:
        self._state = state
        self._reads: dict[TransferId, _Read] = {}
        self._reading: dict[SequenceHash, TransferId] = {}
        self._erasing: dict[TransferId, tuple[SlotId, ...]] = {}

    @property
    def in_flight(self) -> int:
        """Jobs given out and not ended."""
        return len(self._reads) + len(self._erasing)

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
        self, hashes: Sequence[SequenceHash], holder: Holder, deadline: float
    ) -> Sequence[SequenceHash]:
        """Start reads for `hashes`, which are on disk, not in the host and not being read.

        As many of them as the host has slots for, the first ones first; returns the others.
        """
        state, disk = self._state, self._state.disk
        assert disk is not None
        sources = disk.scan(hashes)
        owners = [disk.owner_of(slot) for slot in sources if slot is not None]
        slots, evicted = reserve_prefix(state.host, hashes, owners)
        count = len(slots)
        if evicted:
            state.left(evicted, "evicted", Tier.HOST, state.policy)
        step = state.limits.job_blocks_max
        for first in range(0, count, step):
            last = min(first + step, count)
            found = [slot for slot in sources[first:last] if slot is not None]
            assert len(found) == last - first, "a block to stage is not on disk"
            job = ReadJob(
                state.next_transfer(),
                tuple(found),
                tuple(slots[first:last]),
                tuple(hashes[first:last]),
            )
            self._reads[job.transfer] = _Read(job, disk.pin(found), deadline, {holder})
            self._reading.update(dict.fromkeys(job.keys, job.transfer))
            state.outbox.append(job)
        return hashes[count:]

    def give_up_late(self, now: float) -> list[TransferId]:
        """Stop waiting for reads past their deadline; return their ids, to be cancelled."""
        late = []
        for transfer, read in self._reads.items():
            if read.given_up or now < read.deadline:
                continue
            self._give_up(read)
            self._state.counters.staging_timeout_blocks += len(read.job.slots)
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
        if slots := self._erasing.pop(done.transfer, None):
            assert self._state.disk is not None
            self._state.disk.end_quarantine(slots)
            return Staged([], set())
        read = self._reads.pop(done.transfer, None)
        if read is None:
            return None
        read.disk_pin.release()
        if read.given_up:
            self._state.host.end_quarantine(read.job.slots)
            return Staged([], set())
        for key in read.job.keys:
            del self._reading[key]
        return Staged(self._register(read, done), read.waiters)

    def erase(self, slots: Sequence[SlotId]) -> None:
        """Blank the index lines of quarantined disk `slots`, then free them."""
        step = self._state.limits.job_blocks_max * 64  # index lines are small
        for first in range(0, len(slots), step):
            job = EraseJob(self._state.next_transfer(), tuple(slots[first : first + step]))
            self._erasing[job.transfer] = job.targets
            self._state.outbox.append(job)

    def _give_up(self, read: _Read) -> None:
        read.given_up = True
        self._state.host.quarantine_filling(read.job.slots)
        for key in read.job.keys:
            del self._reading[key]

    def _register(self, read: _Read, done: JobDone) -> list[SequenceHash]:
        state, host, disk = self._state, self._state.host, self._state.disk
        assert disk is not None
        good: list[SlotId] = []
        keys: list[SequenceHash] = []
        parents: list[SequenceHash | None] = []
        bad: list[SequenceHash] = []
        job = read.job
        for index, (source, slot, key) in enumerate(
            zip(job.sources, job.slots, job.keys, strict=True)
        ):
            arrived = done.ok[index]
            whole = arrived and done.checksums[index] == state.disk_seals[source]
            if not whole or read.stale or disk.hash_of(source) != key:
                host.abort([slot])
                if not whole and disk.hash_of(source) == key:
                    bad.append(key)
                    state.left([key], "corrupt" if arrived else "read failed", Tier.DISK)
                    state.counters.corrupt_blocks += arrived
                    state.counters.read_failed_blocks += not arrived
                continue
            good.append(slot)
            keys.append(key)
            parents.append(disk.parent_of(source))
            state.host_seals[slot] = done.checksums[index]
        host.stage(good)
        host.register(good, keys, parents)
        if bad:
            self.erase(disk.withdraw(bad, quarantine=True))
        return keys
