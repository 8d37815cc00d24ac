"""LRU-2: the slot whose second last use is longest ago leaves first; one use counts as never.

O'Neil, O'Neil and Weikum, "The LRU-K Page Replacement Algorithm", SIGMOD 1993, with K = 2. Uses
are numbered instead of timed. The last use of a block that left is remembered until two to
four times as many blocks as the tier has slots have left after it, so that a return within that
span counts as its second use. A longer memory gains nothing on the trace in bench/README.md, one
half as long loses half a point of hit rate.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvstrata.core.ids import SequenceHash, SlotId

__all__ = ["Lru2Policy"]

_SLOT_BITS = 32
_SLOT_MASK = (1 << _SLOT_BITS) - 1


class Lru2Policy:
    """Slots used once in an OrderedDict, the others in a heap by the number of their use before.

    A heap entry is `(second last use << 32) | slot`; it is void unless `_entry[slot]` is it.
    """

    def __init__(self) -> None:
        self._once: OrderedDict[SlotId, None] = OrderedDict()
        self._heap: list[int] = []
        self._often = 0  # held slots that are in the heap
        self._uses = 0
        self._history: dict[SequenceHash | None, int] = {}  # key -> number of its last use
        self._old_history: dict[SequenceHash | None, int] = {}

    def bind(self, capacity: int, keys: Sequence[SequenceHash | None]) -> None:
        """Size the tables."""
        self._capacity, self._keys = capacity, keys
        self._last = [0] * capacity  # number of the last use, 0 for a slot that is not known
        self._before = [0] * capacity  # number of the use before, 0 for none
        self._entry = [0] * capacity

    def admit(self, slots: Iterable[SlotId]) -> None:
        """Number one more use of each of `slots`."""
        last, before, recall = self._last, self._before, self._recall
        uses = self._uses
        for slot in slots:
            uses += 1
            earlier = last[slot] or recall(slot)
            last[slot], before[slot] = uses, earlier
            self._hold(slot)
        self._uses = uses

    def reclaim(self, slots: Iterable[SlotId]) -> None:
        """Hold `slots` no longer; their uses stay known."""
        for slot in slots:
            if self._before[slot]:
                self._entry[slot] = 0
                self._often -= 1
            else:
                del self._once[slot]

    def spare(self, slots: Iterable[SlotId]) -> None:
        """Take `slots` back as used as they were; a victim that stays counts as used now."""
        for slot in slots:
            if not self._last[slot]:
                self._uses += 1
                self._last[slot] = self._recall(slot) or self._uses
                if self._before[slot]:
                    self._before[slot] = self._uses
            self._hold(slot)

    def victims(self, count: int, coming: Sequence[SequenceHash] = ()) -> list[SlotId]:
        """Remove and return the `count` coldest slots, those used once first."""
        del coming
        once = self._once
        if count > len(once) + self._often:
            return []
        chosen = [once.popitem(last=False)[0] for _ in range(min(count, len(once)))]
        while len(chosen) < count:
            entry = heapq.heappop(self._heap)
            slot = SlotId(entry & _SLOT_MASK)
            if self._entry[slot] == entry:
                self._entry[slot] = 0
                self._often -= 1
                chosen.append(slot)
        self._remember(chosen)
        return chosen

    def evict(self, slots: Iterable[SlotId]) -> None:
        """Take held `slots` for victims."""
        gone = list(slots)
        self.reclaim(gone)
        self._remember(gone)

    def forget(self, slots: Iterable[SlotId]) -> None:
        """Drop `slots` and their uses."""
        for slot in slots:
            self._often -= bool(self._entry[slot])
            self._entry[slot] = self._last[slot] = self._before[slot] = 0
            self._once.pop(slot, None)

    def __len__(self) -> int:
        return len(self._once) + self._often

    def _hold(self, slot: SlotId) -> None:
        if not self._before[slot]:
            self._once[slot] = None
            return
        entry = self._entry[slot] = self._before[slot] << _SLOT_BITS | slot
        self._often += 1
        heap = self._heap
        heapq.heappush(heap, entry)
        if len(heap) > 4 * self._capacity + 64:  # most of it is void
            heap[:] = [each for each in self._entry if each]
            heapq.heapify(heap)

    def _recall(self, slot: SlotId) -> int:
        """Return the last use of the block in `slot` before it left the tier, 0 if unknown."""
        key = self._keys[slot]
        return self._history.pop(key, 0) or self._old_history.pop(key, 0)

    def _remember(self, slots: list[SlotId]) -> None:
        last, history, keys = self._last, self._history, self._keys
        for slot in slots:
            history[keys[slot]] = last[slot]
            last[slot] = 0
        if len(history) > 2 * self._capacity:
            self._old_history, self._history = history, {}
