"""2Q: newcomers pass through a short queue; only those that return after it are kept long.

Johnson and Shasha, "2Q: A Low Overhead High Performance Buffer Management Replacement Algorithm",
VLDB 1994, the full version. A use inside the queue says nothing, since it follows the first one
closely; the queue may take a quarter of the tier and is remembered for half of its size, the
fractions that the paper recommends.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvstrata.core.ids import SequenceHash, SlotId

__all__ = ["TwoQPolicy"]

_QUEUE_SHARE = 0.25
_GHOST_SHARE = 0.5
_NONE, _QUEUED, _KEPT = 0, 1, 2


class TwoQPolicy:
    """The queue keeps the place of slots in use; the list of kept ones is plain LRU."""

    def __init__(self) -> None:
        self._queue: OrderedDict[SlotId, None] = OrderedDict()
        self._kept: OrderedDict[SlotId, None] = OrderedDict()
        self._ghosts: OrderedDict[SequenceHash | None, None] = OrderedDict()
        self._returning: dict[SequenceHash | None, None] = {}  # ghosts that room was made for
        self._queued_idle = 0

    def bind(self, capacity: int, keys: Sequence[SequenceHash | None]) -> None:
        """Size queue and ghosts."""
        self._keys = keys
        self._list = bytearray(capacity)
        self._idle = bytearray(capacity)
        self._queue_max = max(1, int(capacity * _QUEUE_SHARE))
        self._ghosts_max = max(1, int(capacity * _GHOST_SHARE))

    def admit(self, slots: Iterable[SlotId]) -> None:
        """New blocks queue up, unless a ghost remembers them; kept ones become the hottest."""
        lists, idle, queue, kept, ghosts = (
            self._list, self._idle, self._queue, self._kept, self._ghosts,
        )  # fmt: skip
        returning = self._returning
        for slot in slots:
            place = lists[slot]
            idle[slot] = 1
            if place == _KEPT:
                kept[slot] = None
            elif place == _QUEUED:
                self._queued_idle += 1
            elif self._keys[slot] in returning or self._keys[slot] in ghosts:
                ghosts.pop(self._keys[slot], None)
                returning.pop(self._keys[slot], None)
                lists[slot] = _KEPT
                kept[slot] = None
            else:
                lists[slot] = _QUEUED
                queue[slot] = None
                self._queued_idle += 1

    def reclaim(self, slots: Iterable[SlotId]) -> None:
        """Hold `slots` no longer; the queue keeps their places."""
        for slot in slots:
            self._idle[slot] = 0
            if self._list[slot] == _KEPT:
                del self._kept[slot]
            else:
                self._queued_idle -= 1

    def spare(self, slots: Iterable[SlotId]) -> None:
        """Take `slots` back; victims join the hot end of where they were."""
        for slot in slots:
            self._idle[slot] = 1
            if self._list[slot] == _NONE:
                queued = self._keys[slot] in self._ghosts
                self._ghosts.pop(self._keys[slot], None)
                self._list[slot] = _QUEUED if queued else _KEPT
                if queued:
                    self._queue[slot] = None
            if self._list[slot] == _KEPT:
                self._kept[slot] = None
            else:
                self._queued_idle += 1

    def victims(self, count: int, coming: Sequence[SequenceHash] = ()) -> list[SlotId]:
        """Remove and return `count` slots: from the queue while it is too long, else kept ones."""
        if count > len(self):
            return []
        chosen: list[SlotId] = []
        queued = len(self._queue)  # as it will be while the blocks of `coming` arrive
        ahead = len(coming) - count
        for place in range(count):
            key = coming[ahead + place] if ahead + place >= 0 else None
            returns = key in self._ghosts
            if returns:
                del self._ghosts[key]
                self._returning[key] = None
            from_queue = queued > self._queue_max or not self._kept
            slot = self._pop_queue() if from_queue and self._queued_idle else self._pop_kept()
            queued -= self._list[slot] == _QUEUED
            chosen.append(slot)
            self._leave(slot)
            queued += not returns
        if len(self._returning) > self._ghosts_max:  # promised and never stored
            self._returning.clear()
        return chosen

    def evict(self, slots: Iterable[SlotId]) -> None:
        """Take held `slots` for victims."""
        for slot in slots:
            if self._list[slot] == _QUEUED:
                del self._queue[slot]
                self._queued_idle -= 1
            else:
                del self._kept[slot]
            self._leave(slot)

    def forget(self, slots: Iterable[SlotId]) -> None:
        """Drop `slots`, without a ghost."""
        for slot in slots:
            place, self._list[slot] = self._list[slot], _NONE
            self._queue.pop(slot, None)
            self._kept.pop(slot, None)
            self._queued_idle -= place == _QUEUED and self._idle[slot]
            self._idle[slot] = 0

    def __len__(self) -> int:
        return self._queued_idle + len(self._kept)

    def _pop_queue(self) -> SlotId:
        """Take the first idle slot of the queue; those in use before it go to its end."""
        queue, idle = self._queue, self._idle
        while True:
            slot = next(iter(queue))
            if idle[slot]:
                del queue[slot]
                self._queued_idle -= 1
                return slot
            queue.move_to_end(slot)

    def _pop_kept(self) -> SlotId:
        return self._kept.popitem(last=False)[0]

    def _leave(self, slot: SlotId) -> None:
        place, self._list[slot], self._idle[slot] = self._list[slot], _NONE, 0
        if place == _KEPT:
            return
        self._ghosts[self._keys[slot]] = None
        if len(self._ghosts) > self._ghosts_max:
            self._ghosts.popitem(last=False)
