"""How often blocks were used of late: what admission by frequency goes by."""

from __future__ import annotations

from collections.abc import Iterable

from kvstrata.core.ids import SequenceHash

__all__ = ["UseCounts"]


class UseCounts:
    """Uses of the last `limit` to twice as many different blocks; older ones are forgotten."""

    def __init__(self, limit: int) -> None:
        """Remember `limit` blocks for certain."""
        self._limit = limit
        self._young: dict[SequenceHash, int] = {}
        self._old: dict[SequenceHash, int] = {}

    def note(self, keys: Iterable[SequenceHash], uses_min: int) -> list[SequenceHash]:
        """Count a use of each of `keys`; return those that now have `uses_min` uses.

        And again at twice as many, four times as many and so on: a block that a small tier loses
        again and again must not be written to it at each use.
        """
        young, old = self._young, self._old
        found = []
        for key in keys:
            uses = (young.get(key) or old.get(key, 0)) + 1
            young[key] = uses
            times, rest = divmod(uses, uses_min)
            if not rest and not times & (times - 1):
                found.append(key)
        if len(young) > self._limit:
            self._old, self._young = young, {}
        return found

    def __len__(self) -> int:
        return len(self._young) + len(self._old)
