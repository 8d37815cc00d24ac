"""Write-through: copying blocks that the host has registered to disk, oldest wish first.

A block waits in the backlog by its key only, unpinned: if the host evicts it before its turn, it
is simply not written. Back-pressure is therefore a shorter backlog, never a stalled engine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvstrata.core.ids import SequenceHash, SlotId, TransferId
from kvstrata.core.tier import Tier
from kvstrata.manager.charging import refused_by_quota, reserve_each
from kvstrata.manager.retaining import Retaining
from kvstrata.manager.state import BrainState
from kvstrata.pool import Pin
from kvstrata.transfer.base import JobDone, WriteJob

__all__ = ["Offloading"]


@dataclass(slots=True)
class _Write:
    job: WriteJob
    host_pin: Pin
    stale: bool = False  # cleared meanwhile: its index line must not stay


class Offloading:
    """Blocks on their way from host to disk."""

    def __init__(self, state: BrainState, retaining: Retaining) -> None:
        self._state, self._retaining = state, retaining
        self._backlog: OrderedDict[SequenceHash, None] = OrderedDict()
        self._writes: dict[TransferId, _Write] = {}
        self._writing: set[SequenceHash] = set()
        self.written = 0

    @property
    def pending(self) -> int:
        """Blocks waiting or being written."""
        return len(self._backlog) + self._in_flight

    @property
    def _in_flight(self) -> int:
        return sum(len(write.job.slots) for write in self._writes.values())

    def resume_after(self, written: int) -> None:
        """Continue the write counter of an earlier life of the store."""
        self.written = max(self.written, written)

    def wish(self, hashes: Sequence[SequenceHash]) -> None:
        """Ask for `hashes` to be written when their turn comes."""
        disk = self._state.disk
        if disk is None:
            return
        room = self._state.limits.offload_backlog_blocks_max - len(self._backlog)
        wanted = [key for key in hashes if key not in disk and key not in self._writing]
        asked, offloads = len(wanted), self._retaining.offloads
        wanted = [key for key in wanted if offloads(key)]
        self._state.counters.kept_off_disk_blocks += asked - len(wanted)
        self._backlog.update(dict.fromkeys(wanted[: max(room, 0)]))
        self._state.counters.throttled_write_blocks += max(len(wanted) - max(room, 0), 0)

    def discard(self) -> None:
        """Forget what waits; what is being written must not be found afterwards."""
        self._backlog.clear()
        self._writing.clear()  # a block that is stored again must be written again
        for write in self._writes.values():
            write.stale = True

    def parents(self) -> dict[SequenceHash, SequenceHash | None]:
        """Return the parent key of every key that is being written; the host may have lost some."""
        found: dict[SequenceHash, SequenceHash | None] = {}
        for write in self._writes.values():
            found |= zip(write.job.keys, write.job.parents, strict=True)
        return found

    def discard_some(self, keys: Collection[SequenceHash]) -> None:
        """Forget those of `keys` that wait; jobs that write one must not be found afterwards."""
        for key in keys:
            self._backlog.pop(key, None)
        for write in self._writes.values():
            if not write.stale and not set(write.job.keys).isdisjoint(keys):
                write.stale = True
                self._writing.difference_update(write.job.keys)

    def owned_by(self, owners: Collection[int]) -> set[SequenceHash]:
        """Return the keys being written whose disk slots are charged to `owners`."""
        disk = self._state.disk
        found: set[SequenceHash] = set()
        for job in (write.job for write in self._writes.values() if disk):
            assert disk is not None
            pairs = zip(job.targets, job.keys, strict=True)
            found.update(key for slot, key in pairs if disk.owner_of(slot) in owners)
        return found

    def pump(self) -> None:
        """Start as many writes as the limits allow."""
        limits = self._state.limits
        while self._backlog and self._in_flight < limits.offload_blocks_in_flight_max:
            batch: list[SequenceHash] = []
            while self._backlog and len(batch) < limits.job_blocks_max:
                key = self._backlog.popitem(last=False)[0]
                if key not in self._state.host:
                    self._state.counters.evicted_unwritten_blocks += 1
                elif self._retaining.offloads(key):
                    batch.append(key)
                else:  # somebody said so while it waited
                    self._state.counters.kept_off_disk_blocks += 1
            if batch:
                self._start(batch)

    def finish(self, done: JobDone) -> list[SlotId] | None:
        """Take the end of a job; None if it was not one of ours.

        Returns the disk slots whose index lines must be blanked; they are quarantined.
        """
        write = self._writes.pop(done.transfer, None)
        if write is None:
            return None
        state, disk, job = self._state, self._state.disk, write.job
        assert disk is not None
        write.host_pin.release()
        if write.stale:
            disk.quarantine_filling(job.targets)
            return list(job.targets)
        self._writing.difference_update(job.keys)
        good = [index for index, ok in enumerate(done.ok) if ok]
        failed = [job.targets[index] for index, ok in enumerate(done.ok) if not ok]
        disk.abort(failed)
        state.counters.write_failed_blocks += len(failed)
        state.counters.written_blocks += len(good)
        slots = [job.targets[index] for index in good]
        for index in good:
            state.disk_seals[job.targets[index]] = job.checksums[index]
        disk.stage(slots)
        keys = [job.keys[index] for index in good]
        disk.register(slots, keys, [job.parents[index] for index in good])
        self._retaining.apply(disk, keys)
        return []

    def _start(self, keys: list[SequenceHash]) -> None:
        state, host, disk = self._state, self._state.host, self._state.disk
        assert disk is not None
        owners = [host.owner_of(slot) for slot in host.match(keys)]
        targets, evicted = reserve_each(disk, keys, owners)
        if evicted:
            state.left(evicted, "evicted", Tier.DISK, state.policy)
        for key, owner in zip(keys, owners, strict=True):
            if key not in targets:
                by_quota = refused_by_quota(disk, 1, owner)
                state.counters.throttled_quota_blocks += by_quota
                state.counters.throttled_write_blocks += 1 - by_quota
        if not targets:
            return
        keys = list(targets)
        slots = host.match(keys)
        job = WriteJob(
            transfer=state.next_transfer(),
            slots=tuple(slots),
            targets=tuple(targets.values()),
            keys=tuple(keys),
            parents=tuple(host.parent_of(slot) for slot in slots),
            checksums=tuple(state.host_seals[slot] for slot in slots),
            written=self.written + 1,
            owners=tuple(state.tenants.tag_of(host.owner_of(slot)) for slot in slots),
        )
        self.written += len(keys)
        self._writes[job.transfer] = _Write(job, host.pin(slots, used=False))
        self._writing.update(keys)
        state.outbox.append(job)
