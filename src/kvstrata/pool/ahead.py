"""Blocks given up ahead of eviction: findable, first to leave, and back in favour once used.

Where the tier below takes what is evicted, the coldest blocks are written there before their slots
are needed. To the policy, and in the counts of their parents' children, they are gone; a use brings
them back, and what they hang on with them, as blocks that return. They leave in the order in which
they were given up, which is leaf first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice

from kvstrata.core.ids import SlotId

__all__ = ["Ahead"]


class Ahead:
    """The slots given up, and those that came back and that the policy does not hold yet."""

    def __init__(self, pins: Sequence[int]) -> None:
        """Watch the pins of a pool."""
        self._pins = pins
        self._order: OrderedDict[SlotId, None] = OrderedDict()
        self._back: set[SlotId] = set()
        self.idle = 0
        """Slots given up that nobody pins."""

    def __len__(self) -> int:
        return len(self._order) + len(self._back)

    def __contains__(self, slot: object) -> bool:
        return slot in self._order

    def give_up(self, slots: Iterable[SlotId]) -> None:
        """Take pinned `slots`, leaves first."""
        for slot in slots:
            self._order[slot] = None

    def pinned(self, idle: Sequence[SlotId]) -> list[SlotId]:
        """Take note that `idle` slots have got a pin; return those that the policy holds."""
        held = [slot for slot in idle if slot not in self._order]
        self.idle -= len(idle) - len(held)
        return held

    def unpinned(self, idle: Iterable[SlotId]) -> tuple[list[SlotId], list[SlotId]]:
        """Take note that slots have lost their last pin.

        Returns those that came back, which are new to the policy, and those that it only lent.
        """
        back, lent = [], []
        for slot in idle:
            if slot in self._order:
                self.idle += 1
            elif slot in self._back:
                self._back.discard(slot)
                back.append(slot)
            else:
                lent.append(slot)
        return back, lent

    def take_back(self, slot: SlotId) -> bool:
        """Bring back `slot`, which was given up; return whether nobody pins it.

        Then it is the policy's at once, else when its last pin is released.
        """
        del self._order[slot]
        if self._pins[slot]:
            self._back.add(slot)
            return False
        self.idle -= 1
        return True

    def first(self, count: int) -> list[SlotId]:
        """Return up to `count` slots that leave next."""
        pins = self._pins
        return list(islice((slot for slot in self._order if not pins[slot]), count))

    def remove(self, slot: SlotId) -> bool:
        """Forget `slot`; return whether it was given up."""
        self._back.discard(slot)
        if slot not in self._order:
            return False
        del self._order[slot]
        self.idle -= not self._pins[slot]
        return True
