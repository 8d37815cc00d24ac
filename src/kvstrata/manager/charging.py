"""Reserving as much as can be had, each slot charged to its block's owner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.pool import Pool, Reservation

__all__ = ["refused_by_quota", "reserve_each", "reserve_most", "reserve_prefix"]


def reserve_most(pool: Pool, keys: Sequence[SequenceHash], owner: int = 0) -> Reservation:
    """Return slots for as many of `keys` as there is room for `owner`, the first ones first."""
    count = min(len(keys), pool.available_to(owner))
    # Leaf-first eviction may refuse what `available_to` promises: take what it gives.
    while count:
        found = pool.reserve(count, keys[:count], owner)
        if found:
            return found
        count //= 2
    return Reservation([], [])


def reserve_prefix(
    pool: Pool, keys: Sequence[SequenceHash], owners: Sequence[int]
) -> tuple[list[SlotId], list[SequenceHash]]:
    """Return slots for the first of `keys`, up to one whose owner finds no room, and who left."""
    slots: list[SlotId] = []
    evicted: list[SequenceHash] = []
    for owner, wanted in _runs(keys, owners):
        found = reserve_most(pool, wanted, owner)
        slots += found.slots
        evicted += found.evicted
        if len(found.slots) < len(wanted):
            break
    return slots, evicted


def reserve_each(
    pool: Pool, keys: Sequence[SequenceHash], owners: Sequence[int]
) -> tuple[dict[SequenceHash, SlotId], list[SequenceHash]]:
    """Return slots for those of `keys` whose owners find room, and who left for them."""
    slots: dict[SequenceHash, SlotId] = {}
    evicted: list[SequenceHash] = []
    for owner, wanted in _runs(keys, owners):
        found = reserve_most(pool, wanted, owner)
        slots |= zip(wanted, found.slots, strict=False)
        evicted += found.evicted
    return slots, evicted


def refused_by_quota(pool: Pool, refused: int, owner: int) -> int:
    """Return how many of `refused` slots are held back for tenants with a guarantee."""
    return min(refused, pool.available - pool.available_to(owner)) if refused else 0


def _runs(
    keys: Sequence[SequenceHash], owners: Sequence[int]
) -> Iterator[tuple[int, list[SequenceHash]]]:
    for owner, run in groupby(zip(keys, owners, strict=True), key=lambda pair: pair[1]):
        yield owner, [key for key, _ in run]
