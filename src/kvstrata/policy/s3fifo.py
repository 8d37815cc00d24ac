"""S3-FIFO: a small queue filters what is used once; a main queue gives used blocks more rounds.

Yang et al., "FIFO Queues are All You Need for Cache Eviction", SOSP 2023: the small queue takes a
tenth of the tier, ghosts are as many as the main queue's slots, uses are counted up to three. A
block used more than once in the small queue moves to the main one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvstrata.core.ids import SequenceHash, SlotId

__all__ = ["S3FifoPolicy"]

_SMALL_SHARE = 0.1
_USES_MAX = 3
_SMALL, _MAIN = 1, 2  # 0 for a slot that is not known


class S3FifoPolicy:
    """Both queues keep the places of slots in use."""

    def __init__(self) -> None:
        self._small: OrderedDict[SlotId, None] = OrderedDict()
        self._main: OrderedDict[SlotId, None] = OrderedDict()
        self._ghosts: OrderedDict[SequenceHash | None, None] = OrderedDict()
        self._main_idle = self._small_idle = 0

    def bind(self, capacity: int, keys: Sequence[SequenceHash | None]) -> None:
        """Size queues and ghosts."""
        self._keys = keys
        self._list = bytearray(capacity)
        self._idle = bytearray(capacity)
        self._used = bytearray(capacity)
        self._small_max = max(1, int(capacity * _SMALL_SHARE))
        self._ghosts_max = max(1, capacity - self._small_max)

    def admit(self, slots: Iterable[SlotId]) -> None:
        """New blocks go to the small queue, or to the main one if a ghost remembers them."""
        lists, idle, used = self._list, self._idle, self._used
        for slot in slots:
            if lists[slot]:
                used[slot] = min(used[slot] + 1, _USES_MAX)
            else:
                used[slot] = 0
                self._enter(slot, returns=self._keys[slot] in self._ghosts)
            idle[slot] = 1
            self._count(slot, 1)

    def reclaim(self, slots: Iterable[SlotId]) -> None:
        """Hold `slots` no longer; the queues keep their places."""
        for slot in slots:
            self._idle[slot] = 0
            self._count(slot, -1)

    def spare(self, slots: Iterable[SlotId]) -> None:
        """Take `slots` back where they were; victims join the end of their queue."""
        for slot in slots:
            if not self._list[slot]:
                self._enter(slot, returns=self._keys[slot] not in self._ghosts)
            self._idle[slot] = 1
            self._count(slot, 1)

    def victims(self, count: int, coming: Sequence[SequenceHash] = ()) -> list[SlotId]:
        """Remove and return `count` slots, from the small queue while it is too long."""
        if count > len(self):
            return []
        chosen: list[SlotId] = []
        arriving = 0
        ahead = len(coming) - count
        while len(chosen) < count:
            from_small = len(self._small) + arriving >= self._small_max or not self._main_idle
            slot = self._pop_small() if from_small and self._small else self._pop_main()
            if slot is not None:
                place = ahead + len(chosen)
                arriving += place < 0 or coming[place] not in self._ghosts
                chosen.append(slot)
        return chosen

    def evict(self, slots: Iterable[SlotId]) -> None:
        """Take held `slots` for victims."""
        for slot in slots:
            queued = self._list[slot] == _SMALL
            del (self._small if queued else self._main)[slot]
            self._leave(slot, remember=queued)

    def forget(self, slots: Iterable[SlotId]) -> None:
        """Drop `slots`, without a ghost."""
        for slot in slots:
            self._small.pop(slot, None)
            self._main.pop(slot, None)
            self._count(slot, -self._idle[slot])
            self._list[slot] = self._idle[slot] = 0

    def __len__(self) -> int:
        return self._main_idle + self._small_idle

    def _count(self, slot: SlotId, change: int) -> None:
        """Count `slot` among the idle ones of its queue, or no longer."""
        if self._list[slot] == _MAIN:
            self._main_idle += change
        elif self._list[slot] == _SMALL:
            self._small_idle += change

    def _enter(self, slot: SlotId, *, returns: bool) -> None:
        self._ghosts.pop(self._keys[slot], None)
        self._list[slot] = _MAIN if returns else _SMALL
        (self._main if returns else self._small)[slot] = None

    def _pop_small(self) -> SlotId | None:
        """Look at one slot: it leaves, or moves to the main queue if it is of use."""
        slot = self._small.popitem(last=False)[0]
        if self._used[slot] > 1 or not self._idle[slot]:
            self._used[slot] = 0
            self._count(slot, -self._idle[slot])
            self._list[slot] = _MAIN
            self._count(slot, self._idle[slot])
            self._main[slot] = None
            return None
        self._leave(slot, remember=True)
        return slot

    def _pop_main(self) -> SlotId | None:
        """Look at one slot: it leaves, or has one round more for each use."""
        slot = next(iter(self._main))
        if self._used[slot] or not self._idle[slot]:
            self._used[slot] -= bool(self._used[slot])
            self._main.move_to_end(slot)
            return None
        del self._main[slot]
        self._leave(slot, remember=False)
        return slot

    def _leave(self, slot: SlotId, *, remember: bool) -> None:
        self._count(slot, -1)
        self._list[slot] = self._idle[slot] = 0
        if remember:
            self._ghosts[self._keys[slot]] = None
            if len(self._ghosts) > self._ghosts_max:
                self._ghosts.popitem(last=False)
