"""Storing: slots that engines fill, on their way to being sealed and registered in the host.

A slot in the hands of a writer is fenced by the writer's life, never by a clock: until its
process reports or dies, the slot is not given to anyone else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvstrata.core.ids import Holder, SequenceHash, SessionId, SlotId, TransferId
from kvstrata.core.tier import HOST
from kvstrata.manager.charging import refused_by_quota, reserve_most
from kvstrata.manager.state import BrainState
from kvstrata.transfer.base import JobDone, SealJob

__all__ = ["Storing"]


@dataclass(frozen=True, slots=True)
class _Fill:
    holder: Holder
    key: SequenceHash
    parent: SequenceHash | None


@dataclass(slots=True)
class _Seal:
    job: SealJob
    parents: tuple[SequenceHash | None, ...]
    stale: bool = False  # cleared meanwhile: must not be registered


class Storing:
    """Host slots being filled or sealed."""

    def __init__(self, state: BrainState) -> None:
        self._state = state
        self._fills: dict[SlotId, _Fill] = {}
        self._coming: set[SequenceHash] = set()  # keys being filled or sealed, not cleared since
        self._stale: set[SlotId] = set()
        self._seals: dict[TransferId, _Seal] = {}
        self._sealing: set[SequenceHash] = set()
        self._quarantined: dict[SessionId, list[SlotId]] = {}

    @property
    def in_flight(self) -> int:
        """Seal jobs given out and not ended."""
        return len(self._seals)

    def is_sealing(self, key: SequenceHash) -> bool:
        """Return whether `key` is complete and about to be registered."""
        return key in self._sealing

    def is_coming(self, key: SequenceHash) -> bool:
        """Return whether somebody is filling or sealing `key`."""
        return key in self._coming

    def reserve(
        self,
        holder: Holder,
        parent: SequenceHash | None,
        hashes: Sequence[SequenceHash],
        owner: int = 0,
    ) -> tuple[list[int], list[SlotId], int]:
        """Return (indices, slots, throttled); see `Manager.reserve`."""
        host = self._state.host
        found = host.scan(hashes)
        # Keep what the new blocks hang on while room is made for them, and call it recently used.
        chain = [slot for slot in found if slot is not None]
        if parent is not None:
            chain = [slot for slot in host.scan([parent]) if slot is not None] + chain
        with host.pin(chain, used=False):
            wanted = [
                index
                for index, slot in enumerate(found)
                if slot is None and hashes[index] not in self._coming
            ]
            reservation = reserve_most(host, [hashes[index] for index in wanted], owner)
            slots = reservation.slots
            throttled = len(wanted) - len(slots)
            by_quota = refused_by_quota(host, throttled, owner)
        self._state.evicted(reservation.evicted, HOST)
        if throttled:
            refused = [hashes[index] for index in wanted[len(slots) :]]
            reason = "quota" if by_quota else "no slot free"
            self._state.left(refused, f"not stored, {reason}", HOST)
        self._state.counters.throttled_quota_blocks += by_quota
        self._state.counters.throttled_reserve_blocks += throttled - by_quota
        del wanted[len(slots) :]
        for index, slot in zip(wanted, slots, strict=True):
            before = hashes[index - 1] if index else parent
            self._fills[slot] = _Fill(holder, hashes[index], before)
            self._coming.add(hashes[index])
        return wanted, slots, throttled

    def seal(self, holder: Holder, slots: Sequence[SlotId]) -> None:
        """Take filled slots over for sealing; see `Manager.seal`."""
        self._check_owner(holder, slots)
        cleared = [slot for slot in slots if slot in self._stale]
        if cleared:
            self.abort(holder, cleared)
        slots = [slot for slot in slots if slot in self._fills]
        step = self._state.limits.job_blocks_max
        for first in range(0, len(slots), step):
            batch = slots[first : first + step]
            fills = [self._fills.pop(slot) for slot in batch]
            self._state.host.stage(batch)
            job = SealJob(
                self._state.next_transfer(), tuple(batch), tuple(fill.key for fill in fills)
            )
            self._seals[job.transfer] = _Seal(job, tuple(fill.parent for fill in fills))
            self._sealing.update(job.keys)
            self._state.outbox.append(job)

    def abort(self, holder: Holder, slots: Sequence[SlotId]) -> None:
        """Take slots back unfilled; see `Manager.abort`."""
        self._check_owner(holder, slots)
        for slot in slots:
            self._drop(slot)
        self._state.host.abort(slots)

    def quarantine(self, session: SessionId) -> bool:
        """Hold back the slots that a living process of a closed session may still write to.

        Returns whether there are any.
        """
        slots = self._of(session)
        for slot in slots:
            self._drop(slot)
        self._state.host.quarantine_filling(slots)
        if slots:
            self._quarantined.setdefault(session, []).extend(slots)
        return bool(self._quarantined.get(session))

    def reclaim(self, session: SessionId) -> None:
        """Free the slots of a session whose process is gone."""
        slots = self._of(session)
        for slot in slots:
            self._drop(slot)
        self._state.host.abort(slots)
        self._state.host.end_quarantine(self._quarantined.pop(session, []))

    def discard(self) -> None:
        """What is being filled or sealed must not be registered."""
        self._stale.update(self._fills)
        self._coming.clear()
        self._sealing.clear()
        for seal in self._seals.values():
            seal.stale = True

    def parents(self) -> dict[SequenceHash, SequenceHash | None]:
        """Return the parent key of every key that is being filled or sealed."""
        found = {fill.key: fill.parent for fill in self._fills.values()}
        for seal in self._seals.values():
            found |= zip(seal.job.keys, seal.parents, strict=True)
        return found

    def discard_some(self, keys: Collection[SequenceHash]) -> None:
        """Of what is being filled or sealed, `keys` must not be registered.

        Blocks that are sealed in one job with such a one are not either.
        """
        doomed = {slot: fill.key for slot, fill in self._fills.items() if fill.key in keys}
        self._coming.difference_update(
            key for slot, key in doomed.items() if slot not in self._stale
        )
        self._stale.update(doomed)
        for seal in self._seals.values():
            if not seal.stale and not set(seal.job.keys).isdisjoint(keys):
                seal.stale = True
                self._coming.difference_update(seal.job.keys)
                self._sealing.difference_update(seal.job.keys)

    def owned_by(self, owners: Collection[int]) -> set[SequenceHash]:
        """Return the keys being filled or sealed whose slots are charged to `owners`."""
        of = self._state.host.owner_of
        found = {fill.key for slot, fill in self._fills.items() if of(slot) in owners}
        for seal in self._seals.values():
            pairs = zip(seal.job.slots, seal.job.keys, strict=True)
            found.update(key for slot, key in pairs if of(slot) in owners)
        return found

    def finish(self, done: JobDone) -> list[SequenceHash] | None:
        """Take the end of a job; None if not ours, else the keys now registered."""
        seal = self._seals.pop(done.transfer, None)
        if seal is None:
            return None
        state, host, job = self._state, self._state.host, seal.job
        if seal.stale:  # its keys may be coming again from someone else
            host.abort(job.slots)
            return []
        self._sealing.difference_update(job.keys)
        self._coming.difference_update(job.keys)
        good = [index for index, ok in enumerate(done.ok) if ok]
        failed = [job.slots[index] for index, ok in enumerate(done.ok) if not ok]
        host.abort(failed)
        state.counters.seal_failed_blocks += len(failed)
        bad = [key for key, ok in zip(job.keys, done.ok, strict=True) if not ok]
        if bad:
            state.left(bad, "seal failed", HOST)
        for index in good:
            state.host_seals[job.slots[index]] = done.checksums[index]
        slots = [job.slots[index] for index in good]
        keys = [job.keys[index] for index in good]
        stored = host.register(slots, keys, [seal.parents[index] for index in good])
        state.arrived(keys, HOST)
        state.counters.stored_blocks += len(stored)
        state.counters.duplicate_blocks += len(slots) - len(stored)
        return keys

    def _of(self, session: SessionId) -> list[SlotId]:
        return [slot for slot, fill in self._fills.items() if fill.holder.session == session]

    def _drop(self, slot: SlotId) -> None:
        fill = self._fills.pop(slot)
        if slot in self._stale:
            self._stale.discard(slot)  # its key may be coming again from someone else
        else:
            self._coming.discard(fill.key)

    def _check_owner(self, holder: Holder, slots: Sequence[SlotId]) -> None:
        if len(set(slots)) != len(slots):
            raise ValueError("slots: the same slot is named twice")
        for slot in slots:
            fill = self._fills.get(slot)
            if fill is None or fill.holder != holder:
                raise ValueError(f"slots: slot {slot} is not being filled by {holder.request!r}")
