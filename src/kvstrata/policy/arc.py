"""Adaptive replacement: two LRU lists, and ghosts of what left each of them set their balance.

Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003. Names: `once`
is T1 (used once of late), `often` is T2, their ghosts B1 and B2, `target` is p, the share of the
tier that `once` may take. Room is made for whole requests: the walk below decides victim by
victim, as the paper does for single pages, knowing which key each place is made for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvstrata.core.ids import SequenceHash, SlotId

__all__ = ["ArcPolicy"]

_NONE, _ONCE, _OFTEN = 0, 1, 2


class ArcPolicy:
    """ARC over slots; a slot in use counts for its list but is not in it."""

    def __init__(self) -> None:
        self._once: OrderedDict[SlotId, None] = OrderedDict()
        self._often: OrderedDict[SlotId, None] = OrderedDict()
        self._once_ghosts: OrderedDict[SequenceHash | None, None] = OrderedDict()
        self._often_ghosts: OrderedDict[SequenceHash | None, None] = OrderedDict()
        self._returning: dict[SequenceHash | None, None] = {}  # ghosts that room was made for
        self._strangers: list[SequenceHash | None] = []  # no ghost of them, as victims found last
        self._target = 0.0
        self._once_total = self._often_total = 0  # in use included

    def bind(self, capacity: int, keys: Sequence[SequenceHash | None]) -> None:
        """Size the lists."""
        self._capacity, self._keys = capacity, keys
        self._list = bytearray(capacity)

    def admit(self, slots: Iterable[SlotId]) -> None:
        """New blocks go to `once`; used ones, and those a ghost remembers, to `often`."""
        slots = list(slots)
        if self._admit_strangers(slots):
            return
        lists, once, often, keys = self._list, self._once, self._often, self._keys
        once_ghosts, often_ghosts, returning = (
            self._once_ghosts, self._often_ghosts, self._returning,
        )  # fmt: skip
        for slot in slots:
            place = lists[slot]
            if place:
                if place == _ONCE:
                    lists[slot] = _OFTEN
                    self._once_total -= 1
                    self._often_total += 1
                often[slot] = None
                continue
            key = keys[slot]
            if key in once_ghosts or key in often_ghosts or key in returning:
                self._known(key)
                lists[slot] = _OFTEN
                often[slot] = None
                self._often_total += 1
            else:
                lists[slot] = _ONCE
                once[slot] = None
                self._once_total += 1
        self._trim()

    def _admit_strangers(self, slots: list[SlotId]) -> bool:
        """Admit blocks that nobody remembers, as those of a new conversation are; else do nothing.

        As the walk in `admit` does, with its lookups in C, or none where `victims` made them.
        """
        lists, once = self._list, self._once
        if any(map(lists.__getitem__, slots)):
            return False
        names = list(map(self._keys.__getitem__, slots))
        if names != self._strangers and not self._strange(names):
            return False
        for slot in slots:
            lists[slot] = _ONCE
            once[slot] = None
        self._once_total += len(slots)
        self._trim()
        return True

    def reclaim(self, slots: Iterable[SlotId]) -> None:
        """Take `slots` out of their lists; the lists remember them."""
        lists, once, often = self._list, self._once, self._often
        for slot in slots:
            if lists[slot] == _OFTEN:
                del often[slot]
            else:
                del once[slot]

    def spare(self, slots: Iterable[SlotId]) -> None:
        """Put `slots` back at the hot end of the list that each was in."""
        for slot in slots:
            if self._list[slot] == _NONE:  # a victim, remembered as a ghost for the moment
                key = self._keys[slot]
                was_often = key in self._often_ghosts
                (self._often_ghosts if was_often else self._once_ghosts).pop(key, None)
                self._list[slot] = _OFTEN if was_often else _ONCE
                self._often_total += was_often
                self._once_total += not was_often
            (self._often if self._list[slot] == _OFTEN else self._once)[slot] = None

    def victims(self, count: int, coming: Sequence[SequenceHash] = ()) -> list[SlotId]:
        """Remove and return `count` slots, from the list that exceeds its share each time."""
        once, often = self._once, self._often
        if count > len(once) + len(often):
            return []
        self._strangers = []
        if self._strange(coming):
            chosen = self._victims_for_strangers(count, announced=len(coming) >= count)
            self._strangers = list(coming)  # room was made for them, so they are looked up once
            return chosen
        chosen = []
        once_total = self._once_total  # as it will be while the blocks of `coming` arrive
        ahead = len(coming) - count
        for place in range(count):
            key = coming[ahead + place] if place + ahead >= 0 else None
            was_often = key in self._often_ghosts
            returns = self._known(key)
            if returns:
                self._returning[key] = None
            tie = was_often and once_total == self._target
            over = once_total > self._target or tie
            source = once if (over and once) or not often else often
            slot = source.popitem(last=False)[0]
            chosen.append(slot)
            self._remember(slot, _ONCE if source is once else _OFTEN)
            once_total += (not returns) - (source is once)
        self._trim()
        return chosen

    def evict(self, slots: Iterable[SlotId]) -> None:
        """Take held `slots` for victims."""
        self._strangers = []
        for slot in slots:
            place = self._list[slot]
            del (self._once if place == _ONCE else self._often)[slot]
            self._remember(slot, place)
        self._trim()

    def forget(self, slots: Iterable[SlotId]) -> None:
        """Drop `slots` from their lists, without a ghost."""
        for slot in slots:
            place, self._list[slot] = self._list[slot], _NONE
            self._once.pop(slot, None)
            self._often.pop(slot, None)
            self._once_total -= place == _ONCE
            self._often_total -= place == _OFTEN

    def __len__(self) -> int:
        return len(self._once) + len(self._often)

    def _strange(self, coming: Sequence[SequenceHash | None]) -> bool:
        """Return whether no ghost remembers any of `coming`, as is so for a new conversation."""
        return (
            not self._returning
            and self._once_ghosts.keys().isdisjoint(coming)
            and self._often_ghosts.keys().isdisjoint(coming)
        )

    def _victims_for_strangers(self, count: int, *, announced: bool) -> list[SlotId]:
        """Choose as the walk in `victims` does where each arrival makes `once` one longer."""
        once, often = self._once, self._often
        short = max(0, int(self._target) + 1 - self._once_total)  # steps that `often` pays for
        first = min(count, short, len(often))
        from_once = min(count - first, len(once))
        rest = count - first - from_once  # `once` has no more to give
        # A ghost that goes once the arrivals are there is not made: where `once` has the whole tier
        # the paper remembers nothing of what leaves it.
        arriving = self._once_total - from_once + count
        remembered = max(self._capacity - arriving, 0) if announced else from_once
        lists, keys = self._list, self._keys
        chosen: list[SlotId] = []
        for order, ghosts, number, skipped in (
            (often, self._often_ghosts, first, 0),
            (once, self._once_ghosts, from_once, max(from_once - remembered, 0)),
            (often, self._often_ghosts, rest, 0),
        ):
            gone = [order.popitem(last=False)[0] for _ in range(number)]
            for slot in gone:
                lists[slot] = _NONE
            for slot in gone[skipped:]:
                ghosts[keys[slot]] = None
            chosen += gone
        self._often_total -= first + rest
        self._once_total -= from_once
        self._trim()
        return chosen

    def _known(self, key: SequenceHash | None) -> bool:
        """Return whether a ghost remembers `key`; if so it is used up and moves the target."""
        if key in self._returning:
            del self._returning[key]
            return True
        once, often = len(self._once_ghosts), len(self._often_ghosts)
        if key in self._once_ghosts:
            self._target = min(self._capacity, self._target + max(1.0, often / once))
            del self._once_ghosts[key]
            return True
        if key in self._often_ghosts:
            self._target = max(0.0, self._target - max(1.0, once / often))
            del self._often_ghosts[key]
            return True
        return False

    def _remember(self, slot: SlotId, place: int) -> None:
        self._list[slot] = _NONE
        if place == _ONCE:
            self._once_ghosts[self._keys[slot]] = None
            self._once_total -= 1
        else:
            self._often_ghosts[self._keys[slot]] = None
            self._often_total -= 1

    def _trim(self) -> None:
        """Keep what is known to one capacity for `once`, two in all, as the paper does."""
        once_ghosts, often_ghosts, limit = self._once_ghosts, self._often_ghosts, self._capacity
        over = self._once_total + len(once_ghosts) - limit
        for _ in range(min(over, len(once_ghosts))):
            once_ghosts.popitem(last=False)
        known = self._once_total + self._often_total + len(once_ghosts)
        for _ in range(min(known + len(often_ghosts) - 2 * limit, len(often_ghosts))):
            often_ghosts.popitem(last=False)
        if len(self._returning) > limit:  # promised and never stored
            self._returning.clear()
