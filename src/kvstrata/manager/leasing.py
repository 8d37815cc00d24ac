"""Leases: blocks that a client keeps from eviction until a moment that it may put off.

A lease is the hard kind of pin that a client can have; the soft kind is a high priority. It ends
by itself, so a client that is gone costs its blocks for a bounded time, and all leases together
have at most a share of the host tier, so that there is always room for requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvstrata.core.ids import Holder, SequenceHash, SlotId
from kvstrata.manager.state import BrainState
from kvstrata.pool import Pin

__all__ = ["Leasing"]


@dataclass(frozen=True, slots=True)
class _Lease:
    pin: Pin
    until: float


class Leasing:
    """All leases on blocks of the host, by who took them under which name."""

    def __init__(self, state: BrainState) -> None:
        self._state = state
        self._leases: dict[Holder, _Lease] = {}
        self._slots: Counter[SlotId] = Counter()  # how many leases each leased slot is in
        self._next_end = 0.0  # no lease ends before

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def blocks(self) -> int:
        """Host slots that some lease keeps."""
        return len(self._slots)

    def lease(self, holder: Holder, hashes: Sequence[SequenceHash], seconds: float) -> int:
        """Keep the longest prefix of `hashes` that is in the host and fits; return its length.

        It takes the place of the lease that `holder` had; 0 seconds only end that one. Raises
        ValueError, and changes nothing, for a time that is out of range.
        """
        state, limits = self._state, self._state.limits
        if not 0.0 <= seconds <= limits.lease_s_max:  # NaN is neither
            raise ValueError(f"seconds: {seconds} is outside 0 to {limits.lease_s_max:g}")
        self.end(holder)
        if not seconds:
            return 0
        room = int(limits.lease_share_max * state.host.slots_total) - len(self._slots)
        slots: list[SlotId] = []
        for slot in state.host.match(hashes):
            room -= slot not in self._slots
            if room < 0:
                break
            slots.append(slot)
        state.counters.throttled_lease_blocks += len(state.host.match(hashes)) - len(slots)
        if slots:
            until = state.now + seconds
            self._leases[holder] = _Lease(state.host.pin(slots, used=False), until)
            self._slots.update(slots)
            self._next_end = min(self._next_end, until) if len(self._leases) > 1 else until
        return len(slots)

    def end(self, holder: Holder) -> None:
        """End the lease of `holder`; harmless if there is none."""
        lease = self._leases.pop(holder, None)
        if lease is None:
            return
        for slot in lease.pin.slots:
            self._slots[slot] -= 1
            if not self._slots[slot]:
                del self._slots[slot]
        lease.pin.release()

    def expire(self, now: float) -> None:
        """End the leases whose time is over."""
        if not self._leases or now < self._next_end:
            return
        for holder in [each for each, lease in self._leases.items() if lease.until <= now]:
            self.end(holder)
        self._next_end = min((lease.until for lease in self._leases.values()), default=0.0)

    def discard(self) -> None:
        """End every lease: the tier is being cleared."""
        for holder in list(self._leases):
            self.end(holder)
