"""What a pool says of itself, and what it needs from its tier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvstrata.core.ids import SequenceHash, SlotId

__all__ = ["Generations", "PoolStatistics", "Reservation"]


class Generations(Protocol):
    """One counter a slot: a list, or memory that readers in other processes see."""

    def __getitem__(self, slot: int, /) -> int:
        """Return the counter of `slot`."""

    def __setitem__(self, slot: int, value: int, /) -> None:
        """Set the counter of `slot`."""


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """One snapshot; free + filling + staged + idle + in_use + quarantined == total, always."""

    total: int
    """Slots that the tier has."""
    free: int
    """Slots that hold nothing."""
    filling: int
    """Slots being written."""
    staged: int
    """Slots whose bytes are complete and not yet findable."""
    idle: int
    """Findable blocks that nobody pins."""
    in_use: int
    """Findable blocks that somebody pins."""
    quarantined: int
    """Slots that may be neither found nor reused."""
    evictions: int
    """Blocks evicted to make room since the pool was made."""
    duplicates: int
    """Second copies of a key that were dropped at registration."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Slots given out for writing, and the keys that lost theirs for it."""

    slots: list[SlotId]
    """The slots, now `filling`."""
    evicted: list[SequenceHash]
    """Keys that are no longer in this tier."""
