"""Belady's bound: evict what is used again last, which only someone who knows the future can do.

Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal
1966. With equal sizes no policy that keeps every new block hits more.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from kvstrata.core.ids import SequenceHash, SlotId

__all__ = ["NEVER", "BeladyPolicy"]

NEVER: Final = 1 << 30
"""Place of a next use that does not come."""
_SLOT_BITS: Final = 32
_ORDER_BITS: Final = 40


class BeladyPolicy:
    """A heap of held slots, farthest next use first; of equals the one admitted first."""

    def __init__(self, next_use: Mapping[SequenceHash | None, int]) -> None:
        """Read each block's next use from `next_use`, which whoever replays keeps up to date."""
        self._next_use = next_use
        self._heap: list[int] = []
        self._admitted = self._held = 0

    def bind(self, capacity: int, keys: Sequence[SequenceHash | None]) -> None:
        """Size the table of entries."""
        self._keys = keys
        self._entry = [0] * capacity  # 0 for a slot that is not held

    def admit(self, slots: Iterable[SlotId]) -> None:
        """Hold `slots` by the next use of their blocks."""
        for slot in slots:
            self._admitted += 1
            ahead = NEVER - self._next_use.get(self._keys[slot], NEVER)
            order = ahead << _ORDER_BITS | self._admitted
            entry = self._entry[slot] = order << _SLOT_BITS | slot
            heapq.heappush(self._heap, entry)
            self._held += 1

    spare = admit

    def reclaim(self, slots: Iterable[SlotId]) -> None:
        """Hold `slots` no longer; their entries become void."""
        for slot in slots:
            self._entry[slot] = 0
            self._held -= 1

    def victims(self, count: int, coming: Sequence[SequenceHash] = ()) -> list[SlotId]:
        """Remove and return the `count` slots that are used again last."""
        del coming
        if count > self._held:
            return []
        chosen: list[SlotId] = []
        while len(chosen) < count:
            entry = heapq.heappop(self._heap)
            slot = SlotId(entry & ((1 << _SLOT_BITS) - 1))
            if self._entry[slot] == entry:
                self._entry[slot] = 0
                chosen.append(slot)
        self._held -= count
        return chosen

    def forget(self, slots: Iterable[SlotId]) -> None:
        """Drop those of `slots` that are held."""
        self.reclaim([slot for slot in slots if self._entry[slot]])

    def __len__(self) -> int:
        return self._held
