"""What came to be in the tiers and what left them, in order, for clients who want to follow.

The memory of it is bounded: who asks too seldom is told that something is missing. Nothing is
noted before somebody has asked once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Final

from kvstrata.core.ids import SequenceHash
from kvstrata.core.tier import TierName

__all__ = ["CHANGES_MAX", "Change", "Changes", "ChangesAnswer"]

CHANGES_MAX: Final = 1 << 16
"""Most blocks that are remembered."""
_BLOCKS_MAX: Final = 256
"""In one change."""
_ANSWER_MAX: Final = 64
"""Changes in one answer."""


@dataclass(frozen=True, slots=True)
class Change:
    """Blocks that can be found in a tier from now on, or not any more."""

    tier: TierName
    """Which tier."""
    stored: bool
    """False: they left, or did not come to be there."""
    keys: list[SequenceHash]
    """The blocks."""


@dataclass(frozen=True, slots=True)
class ChangesAnswer:
    """What happened since a cursor, as far as one answer goes."""

    cursor: int
    """For the next question."""
    lost: bool
    """Whether something in between is forgotten."""
    more: bool
    """Whether there is more to ask for at once."""
    changes: list[Change]
    """What happened, in order."""


class Changes:
    """A bounded record; cursors count its changes."""

    def __init__(self, limit: int = CHANGES_MAX) -> None:
        """Remember `limit` blocks."""
        self._limit = limit
        self._wanted = False
        self._record: deque[Change] = deque()
        self._blocks = 0
        self._next = 1
        self.lost_blocks = 0

    def note(self, tier: TierName, keys: Iterable[SequenceHash], *, stored: bool) -> None:
        """Take note that `keys` can be found in `tier`, or not any more."""
        if not self._wanted:
            return
        every = list(keys)
        for start in range(0, len(every), _BLOCKS_MAX):
            change = Change(tier, stored, every[start : start + _BLOCKS_MAX])
            self._record.append(change)
            self._blocks += len(change.keys)
            self._next += 1
        while self._blocks > self._limit:
            gone = len(self._record.popleft().keys)
            self._blocks -= gone
            self.lost_blocks += gone

    def since(self, cursor: int) -> ChangesAnswer:
        """Return what happened since the answer that gave `cursor`; 0 asks from now on."""
        self._wanted = True
        first = self._next - len(self._record)
        if not cursor:
            return ChangesAnswer(self._next, lost=False, more=False, changes=[])
        if not first <= cursor <= self._next:
            return ChangesAnswer(self._next, lost=True, more=False, changes=[])
        start = cursor - first
        found = list(islice(self._record, start, start + _ANSWER_MAX))
        behind = cursor + len(found)
        return ChangesAnswer(behind, lost=False, more=behind < self._next, changes=found)
