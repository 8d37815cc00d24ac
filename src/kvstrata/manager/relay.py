"""Relaying: blocks of one lower tier brought into host slots to be written to another one.

They are verified like any block that arrives, and are not registered in the host: nobody asked for
them. As many host slots as `Limits.relay_blocks_max` are used so; what finds none is counted and
not carried.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvstrata.core.ids import SequenceHash, SlotId, TransferId
from kvstrata.core.tier import HOST, TierName
from kvstrata.manager.charging import reserve_prefix
from kvstrata.manager.onboard import Onboarding
from kvstrata.manager.state import BrainState, LowerTier
from kvstrata.pool import Pin
from kvstrata.transfer.base import JobDone, ReadJob

__all__ = ["Arrived", "Relaying"]


@dataclass(frozen=True, slots=True)
class Arrived:
    """Blocks that a relay brought into the host, staged there; whoever takes them frees them."""

    source: TierName
    """Where they came from."""
    target: LowerTier
    """Where they are going."""
    keys: list[SequenceHash]
    """Their keys."""
    parents: list[SequenceHash | None]
    """The parent key of each."""
    slots: list[SlotId]
    """The host slot of each."""
    lost: list[SequenceHash]
    """Keys that did not arrive, or are not wanted any more."""


@dataclass(slots=True)
class _Relay:
    job: ReadJob
    source: LowerTier
    target: LowerTier
    parents: tuple[SequenceHash | None, ...]
    pin: Pin
    stale: bool = False  # cleared meanwhile: must not go on


class Relaying:
    """Reads in flight for nobody but another tier."""

    def __init__(self, state: BrainState, onboarding: Onboarding) -> None:
        self._state, self._onboarding = state, onboarding
        self._relays: dict[TransferId, _Relay] = {}

    @property
    def blocks(self) -> int:
        """Blocks being read."""
        return sum(len(relay.job.slots) for relay in self._relays.values())

    def start(self, target: LowerTier, keys: Sequence[SequenceHash]) -> list[SequenceHash]:
        """Read `keys`, each of which some lower tier has, for `target`; return those refused."""
        state, host = self._state, self._state.host
        wanted = keys[: max(state.limits.relay_blocks_max - self.blocks, 0)]
        owners = list(map(self._onboarding.owner_of, wanted))
        reserved, evicted = reserve_prefix(host, wanted, owners)
        state.evicted(evicted, HOST)
        first = 0
        for source, run in self._onboarding.batches(keys[: len(reserved)]):
            slots = reserved[first : first + len(run)]
            first += len(run)
            found = source.slots_of(run)
            job = ReadJob(
                state.next_transfer(), source.name, tuple(found), tuple(slots), tuple(run)
            )
            parents = tuple(source.pool.parent_of(slot) for slot in found)
            pin = source.pool.pin(found, used=False)
            if state.costs:
                state.costs.note_read(job.transfer, source.name, len(run), state.now)
            self._relays[job.transfer] = _Relay(job, source, target, parents, pin)
            state.outbox.append(job)
        state.counters.throttled_relay_blocks += len(keys) - len(reserved)
        return list(keys[len(reserved) :])

    def finish(self, done: JobDone) -> Arrived | None:
        """Take the end of a job; None if it was not one of ours."""
        relay = self._relays.pop(done.transfer, None)
        if relay is None:
            return None
        state, host, job = self._state, self._state.host, relay.job
        relay.pin.release()
        parents = [
            said.parent if said else parent
            for parent, said in zip(
                relay.parents, done.lineage or [None] * len(relay.parents), strict=True
            )
        ]
        good = self._onboarding.check(relay.source, job, done, stale=relay.stale)
        places = set(good)
        host.abort([slot for place, slot in enumerate(job.slots) if place not in places])
        slots = [job.slots[index] for index in good]
        host.stage(slots)
        for index in good:
            state.host_seals[job.slots[index]] = done.checksums[index]
        state.counters.relayed_blocks += len(good)
        return Arrived(
            relay.source.name,
            relay.target,
            [job.keys[index] for index in good],
            [parents[index] for index in good],
            slots,
            [key for place, key in enumerate(job.keys) if place not in places],
        )

    def discard(self, tier: TierName) -> None:
        """What is being read from `tier`, or for it, must not go on."""
        for relay in self._relays.values():
            if tier in {relay.source.name, relay.target.name}:
                relay.stale = True

    def discard_some(self, keys: Collection[SequenceHash]) -> None:
        """Jobs that read one of `keys` must not go on."""
        for relay in self._relays.values():
            if not set(relay.job.keys).isdisjoint(keys):
                relay.stale = True

    def owned_by(self, owners: Collection[int]) -> set[SequenceHash]:
        """Return the keys being read whose host slots are charged to `owners`."""
        of = self._state.host.owner_of
        jobs = [relay.job for relay in self._relays.values()]
        pairs = [pair for job in jobs for pair in zip(job.slots, job.keys, strict=True)]
        return {key for slot, key in pairs if of(slot) in owners}

    def parents(self) -> dict[SequenceHash, SequenceHash | None]:
        """Return the parent key of every key that is being read."""
        found: dict[SequenceHash, SequenceHash | None] = {}
        for relay in self._relays.values():
            found |= zip(relay.job.keys, relay.parents, strict=True)
        return found
