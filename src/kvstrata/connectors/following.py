"""What the tiers hold of the blocks that a connector has a name for, as far as the daemon tells it.

The daemon speaks of keys; what a key stands for only its connector knows, and only of prompts that
its engine has served. So each block is told of once while it is there, and unknown ones never.
What cannot be followed any more (too many blocks, a daemon that is gone, something missed) is told
of as gone: who knows too little loses time, who believes too much loses more.
Owner: one thread. Every call to the daemon is bounded, and none is made before the interval has
passed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from kvstrata.core.errors import DaemonError
from kvstrata.core.ids import SequenceHash
from kvstrata.core.tier import TierKind
from kvstrata.runtime.messages import split_hashes
from kvstrata.runtime.session import Session

__all__ = ["INTERVAL_S", "KNOWN_MAX", "Follower", "Moved", "is_local"]

NameT = TypeVar("NameT")

INTERVAL_S: Final = 0.1
"""Between two questions, unless an answer said that there is more."""
_ANSWERS_MAX: Final = 4
"""Questions in one turn; a longer record is read in the next ones."""
KNOWN_MAX: Final = 1 << 15
"""Keys that are remembered without having been told of, and as many that were."""


@dataclass(frozen=True, slots=True)
class Moved(Generic[NameT]):
    """Blocks that can be found in a tier from now on, or not any more."""

    tier: str
    """Name of the tier."""
    stored: bool
    """False: they are gone, or nobody can say any more."""
    names: list[NameT]
    """The connector's names of the blocks; not empty."""


@dataclass(slots=True)
class _Known(Generic[NameT]):
    name: NameT
    tiers: set[str] = field(default_factory=set)  # where it was told to be


def is_local(tier: str) -> bool:
    """Return whether a tier, by its name, is this node's own."""
    return not TierKind(tier.rstrip("0123456789")).keyed


class Follower(Generic[NameT]):
    """Turns the daemon's changes of keys into moves of named blocks."""

    def __init__(
        self,
        count: Callable[[str, int], None],
        *,
        interval_s: float = INTERVAL_S,
        known_max: int = KNOWN_MAX,
    ) -> None:
        """Follow from the first `take` on; `count` is told of what is missed, by name."""
        self._count = count
        self._interval_s = interval_s
        self._known_max = known_max
        self._waiting: dict[SequenceHash, _Known[NameT]] = {}  # oldest first, as below
        self._told: dict[SequenceHash, _Known[NameT]] = {}
        self._void = False
        self._epoch = self._cursor = 0
        self._ask_at = 0.0

    def knows(self, key: SequenceHash) -> bool:
        """Return whether a key has a name."""
        return key in self._told or key in self._waiting

    def know(self, key: SequenceHash, name: NameT) -> None:
        """Remember what a key stands for; a name that it has stays."""
        if self.knows(key):
            return
        self._waiting[key] = _Known(name)
        if len(self._waiting) > self._known_max:
            del self._waiting[next(iter(self._waiting))]

    def forget(self) -> None:
        """Tell next time that everything is gone, whatever the daemon holds."""
        self._void = True

    def take(self, session: Session) -> list[Moved[NameT]]:
        """Return what happened since the last time; empty while it is too early to ask again."""
        now = time.monotonic()
        up = session.welcome is not None
        if self._void or (self._told and not up) or (up and session.epoch != self._epoch):
            moves = list(self._remove_all())
            self._void, self._cursor, self._ask_at = False, 0, 0.0
            self._epoch = session.epoch
            if moves or not up:
                return moves
        if not up or now < self._ask_at:
            return []
        self._ask_at = now + self._interval_s
        return list(self._ask(session))

    # -- private -------------------------------------------------------------------------------

    def _ask(self, session: Session) -> Iterator[Moved[NameT]]:
        for _ in range(_ANSWERS_MAX):
            try:
                changed = session.changes(self._cursor)
            except DaemonError:  # a lost session has said so itself
                return
            self._cursor = changed.cursor
            if changed.lost:
                self._count("missed_changes", 1)
                yield from self._remove_all()
            for tier, stored, joined in changed.changes:
                keys = split_hashes(joined)
                yield from self._stored(tier, keys) if stored else self._removed(tier, keys)
            if not changed.more:
                return
        self._ask_at = 0.0

    def _stored(self, tier: str, keys: Sequence[SequenceHash]) -> Iterator[Moved[NameT]]:
        untold = 0
        came = []
        for key in keys:
            known = self._told.get(key)
            if known is None:
                known = self._waiting.pop(key, None)
                if known is None:
                    untold += 1
                    continue
                self._told[key] = known
            if tier not in known.tiers:
                known.tiers.add(tier)
                came.append(known.name)
        if came:
            yield Moved(tier, stored=True, names=came)
        while len(self._told) > self._known_max:
            untold += 1
            oldest = self._told.pop(next(iter(self._told)))
            for each in oldest.tiers:
                yield Moved(each, stored=False, names=[oldest.name])
        self._count("untold_blocks", untold)

    def _removed(self, tier: str, keys: Sequence[SequenceHash]) -> Iterator[Moved[NameT]]:
        left = []
        for key in keys:
            known = self._told.get(key)
            if known is None or tier not in known.tiers:
                continue
            left.append(known.name)
            known.tiers.discard(tier)
            if not known.tiers:  # a request that is still running may have it stored again
                self._waiting[key] = self._told.pop(key)
        if left:
            yield Moved(tier, stored=False, names=left)

    def _remove_all(self) -> Iterator[Moved[NameT]]:
        by_tier: dict[str, list[NameT]] = {}
        for known in self._told.values():
            for tier in known.tiers:
                by_tier.setdefault(tier, []).append(known.name)
            known.tiers = set()
        self._waiting |= self._told  # they may come again
        self._told.clear()
        for tier, names in by_tier.items():
            yield Moved(tier, stored=False, names=names)
