"""Priorities over any policy: blocks of a lower priority leave before blocks of a higher one.

Among blocks of the default priority the policy given decides. Among those of any other the least
recently used leaves first, as in TensorRT-LLM: they are few, and an order of each of up to a
hundred priorities must not cost the memory of a history.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.core.retention import PRIORITY_DEFAULT
from kvstrata.policy.base import EvictionPolicy
from kvstrata.policy.lru import LruPolicy

__all__ = ["RankedPolicy"]


class RankedPolicy:
    """`policy` for the default priority, an LRU order for each other one that occurs."""

    def __init__(self, policy: EvictionPolicy) -> None:
        """Wrap `policy`; until a slot is ranked it is all that there is."""
        self._default = policy
        self._orders: dict[int, EvictionPolicy] = {}  # all of them; empty until the first rank
        self._rank = bytearray()

    def bind(self, capacity: int, keys: Sequence[SequenceHash | None]) -> None:
        """Size the default order."""
        self._capacity, self._keys = capacity, keys
        self._default.bind(capacity, keys)

    @property
    def ranked(self) -> bool:
        """Whether any slot was ever given a priority."""
        return bool(self._orders)

    def priority_of(self, slot: SlotId) -> int:
        """Return the priority last given to `slot`."""
        return self._rank[slot] if self._orders else PRIORITY_DEFAULT

    def rank(self, slots: Iterable[SlotId], priority: int) -> None:
        """Give `slots`, which the caller guarantees are not held, another priority."""
        if not self._orders:
            if priority == PRIORITY_DEFAULT:
                return
            self._orders = {PRIORITY_DEFAULT: self._default}
            self._rank = bytearray([PRIORITY_DEFAULT]) * self._capacity
        if priority not in self._orders:
            order = LruPolicy()
            order.bind(self._capacity, self._keys)
            self._orders = dict(sorted({**self._orders, priority: order}.items()))
        for slot in slots:
            before = self._rank[slot]
            if before != priority:
                self._orders[before].forget((slot,))  # what its history says is of another order
                self._rank[slot] = priority

    def admit(self, slots: Iterable[SlotId]) -> None:
        """Admit each slot to the order of its priority."""
        if not self._orders:
            self._default.admit(slots)
            return
        for order, part in self._parts(slots):
            order.admit(part)

    def reclaim(self, slots: Iterable[SlotId]) -> None:
        """Reclaim each slot from the order of its priority."""
        if not self._orders:
            self._default.reclaim(slots)
            return
        for order, part in self._parts(slots):
            order.reclaim(part)

    def spare(self, slots: Iterable[SlotId]) -> None:
        """Give each slot back to the order of its priority."""
        if not self._orders:
            self._default.spare(slots)
            return
        for order, part in self._parts(slots):
            order.spare(part)

    def victims(self, count: int, coming: Sequence[SequenceHash] = ()) -> list[SlotId]:
        """Take `count` slots, of the lowest priorities first."""
        if not self._orders:
            return self._default.victims(count, coming)
        if count > len(self):
            return []
        chosen: list[SlotId] = []
        for order in self._orders.values():  # lowest priority first
            take = min(count - len(chosen), len(order))
            if take:
                chosen += order.victims(take, coming if order is self._default else ())
        return chosen

    def forget(self, slots: Iterable[SlotId]) -> None:
        """Drop each slot from the order of its priority."""
        if not self._orders:
            self._default.forget(slots)
            return
        for order, part in self._parts(slots):
            order.forget(part)

    def __len__(self) -> int:
        if not self._orders:
            return len(self._default)
        return sum(map(len, self._orders.values()))

    def _parts(self, slots: Iterable[SlotId]) -> Iterator[tuple[EvictionPolicy, list[SlotId]]]:
        """Yield each order concerned and its share of `slots`, in the order given."""
        parts: dict[int, list[SlotId]] = {}
        rank = self._rank
        for slot in slots:
            parts.setdefault(rank[slot], []).append(slot)
        for priority, part in parts.items():
            yield self._orders[priority], part
