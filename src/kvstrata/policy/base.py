"""The seam for eviction policies. Laws and tests: docs/contracts/eviction-policy.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from kvstrata.core.ids import SlotId

__all__ = ["EvictionPolicy"]


class EvictionPolicy(Protocol):
    """Orders idle slots; the pool alone decides which slots are idle.

    A policy holds no lock, reads no clock and never sees a pinned slot. Calls take whole
    sequences because they sit on the hot path.
    """

    def admit(self, slots: Iterable[SlotId]) -> None:
        """Record that `slots` became idle, coldest first. The caller guarantees none was held."""

    def reclaim(self, slots: Iterable[SlotId]) -> None:
        """Forget `slots`, which are no longer idle. The caller guarantees all were held."""

    def victims(self, count: int) -> list[SlotId]:
        """Remove and return exactly `count` slots, coldest first, or none at all."""

    def __len__(self) -> int:
        """Return how many slots are held."""
