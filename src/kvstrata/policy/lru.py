"""Least recently used: slots leave in the order in which they became idle."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvstrata.core.ids import SequenceHash, SlotId

__all__ = ["LruPolicy"]


class LruPolicy:
    """An OrderedDict used as an ordered set: every operation is one C call per slot."""

    def __init__(self) -> None:
        self._order: OrderedDict[SlotId, None] = OrderedDict()

    def bind(self, capacity: int, keys: Sequence[SequenceHash | None]) -> None:
        """Need neither."""

    def admit(self, slots: Iterable[SlotId]) -> None:
        """Append `slots`, coldest first, behind everything already held."""
        order = self._order
        for slot in slots:  # a third of the time of OrderedDict.update, which is not fast C
            order[slot] = None

    spare = admit

    def reclaim(self, slots: Iterable[SlotId]) -> None:
        """Remove `slots`, which must be held."""
        order = self._order
        for slot in slots:
            del order[slot]

    evict = reclaim

    def victims(self, count: int, coming: Sequence[SequenceHash] = ()) -> list[SlotId]:
        """Remove and return the `count` coldest slots, or none if fewer are held."""
        del coming
        order = self._order
        if count > len(order):
            return []
        take = order.popitem
        return [take(last=False)[0] for _ in range(count)]

    def forget(self, slots: Iterable[SlotId]) -> None:
        """Remove those of `slots` that are held."""
        for slot in slots:
            self._order.pop(slot, None)

    def __len__(self) -> int:
        return len(self._order)
