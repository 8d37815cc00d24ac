"""Auto: several policies follow every event; shadows say which of them would hit most by now.

Every candidate keeps its own order of the very slots that the tier holds, history included, so a
move to another one takes effect at the next eviction and forgets nothing. Which one decides is
told by a shadow of each candidate (see shadow.py): a decayed count of hits, compared once in a
while, with a margin that keeps noise from moving it back and forth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.policy.arc import ArcPolicy
from kvstrata.policy.base import EvictionPolicy
from kvstrata.policy.lru import LruPolicy
from kvstrata.policy.lru2 import Lru2Policy
from kvstrata.policy.shadow import Shadow, sample_mask

__all__ = ["CANDIDATES", "AutoPolicy", "Follower"]


class Follower(EvictionPolicy, Protocol):
    """A policy that can also follow another one's decisions."""

    def evict(self, slots: Iterable[SlotId]) -> None:
        """Take held `slots` as evicted, exactly as if they had been this policy's victims."""


CANDIDATES: Final[Mapping[str, Callable[[], Follower]]] = {
    "lru": LruPolicy,
    "arc": ArcPolicy,
    "lru2": Lru2Policy,
}
"""Between them they are the best of the shipped ones everywhere that we measured."""

_MARGIN = 1.02  # a candidate must be this much better than the one that decides
_COMPARISONS_PER_CAPACITY = 8
_MEMORY = 0.9  # of the hits counted before, at each comparison


class AutoPolicy:
    """The candidate with the most recent hits decides; all of them follow."""

    def __init__(self, candidates: Mapping[str, Callable[[], Follower]] | None = None) -> None:
        """Start with the first candidate."""
        made = candidates or CANDIDATES
        self._makers = dict(made)
        self._orders = {name: make() for name, make in made.items()}
        self.active = next(iter(made))
        self.moves = 0
        self._scores = dict.fromkeys(made, 0.0)
        self._until_comparison = 0

    def bind(self, capacity: int, keys: Sequence[SequenceHash | None]) -> None:
        """Size every candidate and its shadow."""
        self._keys = keys
        self._mask = sample_mask(capacity)
        sampled = max(1, capacity // (self._mask + 1))
        self._period = self._until_comparison = max(64, sampled // _COMPARISONS_PER_CAPACITY)
        self._shadows = {name: Shadow(make(), sampled) for name, make in self._makers.items()}
        for order in self._orders.values():
            order.bind(capacity, keys)

    def admit(self, slots: Iterable[SlotId]) -> None:
        """Let every candidate admit, and every shadow use what is sampled."""
        given = list(slots)
        for order in self._orders.values():
            order.admit(given)
        names, mask = self._keys, self._mask
        sample = [key for slot in given if (key := names[slot]) is not None and not key[-1] & mask]
        if sample:
            for name, shadow in self._shadows.items():
                self._scores[name] += shadow.use(sample)
            self._until_comparison -= len(sample)
            if self._until_comparison <= 0:
                self._compare()

    def reclaim(self, slots: Iterable[SlotId]) -> None:
        """Let every candidate reclaim."""
        given = list(slots)
        for order in self._orders.values():
            order.reclaim(given)

    def spare(self, slots: Iterable[SlotId]) -> None:
        """Let every candidate spare."""
        given = list(slots)
        for order in self._orders.values():
            order.spare(given)

    def victims(self, count: int, coming: Sequence[SequenceHash] = ()) -> list[SlotId]:
        """Take the victims of the candidate that decides; the others follow."""
        chosen = self._orders[self.active].victims(count, coming)
        for name, order in self._orders.items():
            if name != self.active:
                order.evict(chosen)
        return chosen

    def evict(self, slots: Iterable[SlotId]) -> None:
        """Let every candidate follow."""
        given = list(slots)
        for order in self._orders.values():
            order.evict(given)

    def forget(self, slots: Iterable[SlotId]) -> None:
        """Let every candidate forget."""
        given = list(slots)
        for order in self._orders.values():
            order.forget(given)

    def __len__(self) -> int:
        return len(self._orders[self.active])

    def _compare(self) -> None:
        self._until_comparison = self._period
        scores = self._scores
        best = max(scores, key=scores.__getitem__)
        if scores[best] > _MARGIN * scores[self.active]:
            self.active = best
            self.moves += 1
        for name in scores:
            scores[name] *= _MEMORY
