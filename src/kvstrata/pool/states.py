"""The life of a slot. Every legal move is in this table; any other is a bug and asserts.

    free -> filling -> staged -> registered -> free
              |          |           |
              +----------+-----------+--> quarantined -> free

free         holds nothing
filling      bytes are being written by someone who was given the slot
staged       bytes are complete, their checksum is being computed; not findable
registered   findable; *idle* while nobody pins it, *in use* while somebody does
quarantined  not findable and not reusable: a late write may still land, or a reader still reads
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

__all__ = ["LEGAL_MOVES", "SlotState"]


class SlotState(IntEnum):
    """State of one slot; an int so that a pool of a million slots is one bytearray."""

    FREE = 0
    FILLING = 1
    STAGED = 2
    REGISTERED = 3
    QUARANTINED = 4


LEGAL_MOVES: Final = frozenset(
    {
        (SlotState.FREE, SlotState.FILLING),
        (SlotState.FILLING, SlotState.STAGED),
        (SlotState.FILLING, SlotState.FREE),  # aborted by its writer
        (SlotState.FILLING, SlotState.QUARANTINED),  # its writer may still be writing
        (SlotState.STAGED, SlotState.REGISTERED),
        (SlotState.STAGED, SlotState.FREE),  # a second copy of a key, or a failed seal
        (SlotState.REGISTERED, SlotState.FREE),  # evicted, cleared
        (SlotState.REGISTERED, SlotState.QUARANTINED),  # withdrawn while in use, or found corrupt
        (SlotState.QUARANTINED, SlotState.FREE),
    }
)
"""Every (from, to) that a slot may make."""
