"""The tiers a block can live in: their names, what they are made of, what enters them."""

from __future__ import annotations

from enum import Enum
from typing import Final, NewType

__all__ = ["DISK", "HOST", "Admission", "TierKind", "TierName"]

TierName = NewType("TierName", str)
"""A tier of one node, such as `host`, `disk`, `disk2`: the word of configuration and output."""

HOST: Final = TierName("host")
"""The tier that engines read and write; every node has one."""
DISK: Final = TierName("disk")
"""The first tier on a disk."""


class TierKind(Enum):
    """What keeps a tier's bytes. The value is the word used in configuration."""

    HOST = "host"
    """Shared memory."""
    DISK = "disk"
    """Preallocated files in directories, or whole block devices."""
    SHARED = "shared"
    """A directory of files, one a block, that several daemons may share."""
    OBJECT = "object"
    """A bucket of objects, one a block, that several daemons may share."""
    STORE = "store"
    """A store that another package brings, found by name; several daemons may share it."""

    @property
    def keyed(self) -> bool:
        """Whether blocks lie under names made from their keys, and not in slots."""
        return self in {TierKind.SHARED, TierKind.OBJECT, TierKind.STORE}


class Admission(Enum):
    """Which blocks of the tier above enter a tier, and when. The value is the configured word."""

    WRITE_THROUGH = "write-through"
    """Every block, as soon as the tier above has it."""
    ON_EVICT = "on-evict"
    """Blocks that the tier above is about to evict."""
    FREQUENCY = "frequency"
    """Blocks that were used as often as `Limits.admission_uses_min`: spares a disk's writes."""
