"""The seam for eviction policies. Laws and tests: docs/contracts/eviction-policy.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from kvstrata.core.ids import SequenceHash, SlotId

__all__ = ["EvictionPolicy"]


class EvictionPolicy(Protocol):
    """Orders idle slots; the pool alone decides which slots are idle.

    A policy holds no lock, reads no clock and never sees a pinned slot. Calls take whole
    sequences because they sit on the hot path. Between `admit` and the moment it leaves (as a
    victim or forgotten) a slot holds one block, which `keys` names.
    """

    def bind(self, capacity: int, keys: Sequence[SequenceHash | None]) -> None:
        """Learn the tier's size and the live view slot -> key; called once, before all else."""

    def admit(self, slots: Iterable[SlotId]) -> None:
        """Record that `slots` became idle, coldest first: new ones, and ones that were used.

        The caller guarantees that none was held.
        """

    def reclaim(self, slots: Iterable[SlotId]) -> None:
        """Hold `slots` no longer: they are in use. The caller guarantees all were held."""

    def spare(self, slots: Iterable[SlotId]) -> None:
        """Take back `slots`, coldest first, that are idle again and were not used.

        Either reclaimed slots, or victims of the last call that were not evicted after all.
        """

    def victims(self, count: int, coming: Sequence[SequenceHash] = ()) -> list[SlotId]:
        """Remove and return exactly `count` slots, coldest first, or none at all.

        `coming` are the keys that room is made for, as far as known, in the order in which they
        will be admitted.
        """

    def forget(self, slots: Iterable[SlotId]) -> None:
        """Drop all memory of `slots`, held or in use: their blocks are withdrawn, not evicted."""

    def __len__(self) -> int:
        """Return how many slots are held."""
