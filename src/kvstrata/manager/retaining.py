"""Retention: what clients ask about how long their blocks should be kept, and carrying it out.

Terms belong to a key, so they hold in each tier, survive a move between tiers, and are the same for
everyone who stores the block; the last one who says something wins. A block is kept at least as
long as those that hang on it: terms of a child raise its ancestors, or else leaf-first eviction
would meet low parents of high children again and again.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from math import inf
from typing import Final

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.core.retention import PRIORITY_DEFAULT, BlockHint
from kvstrata.core.tier import HOST, TierName
from kvstrata.manager.state import BrainState, LowerTier
from kvstrata.pool import Pool

__all__ = ["Retaining"]

_SLACK: Final = 1024  # terms and dates beyond what there are blocks, before the useless ones go


@dataclass(slots=True, eq=False)
class _Term:
    priority: int = PRIORITY_DEFAULT
    until: float = inf  # when the priority is the default again
    expires: float = inf  # when the block is not found any more
    offload: bool = True

    @property
    def due(self) -> float:
        return min(self.until, self.expires)


class Retaining:
    """The terms of all blocks that somebody said something about."""

    def __init__(
        self, state: BrainState, remove: Callable[[LowerTier, Sequence[SequenceHash]], list[SlotId]]
    ) -> None:
        """Keep none yet; `remove` makes keys of a lower tier unfindable for good."""
        self._state, self._remove = state, remove
        self._terms: dict[SequenceHash, _Term] = {}
        self._dates: list[tuple[float, int, SequenceHash, _Term]] = []  # a heap
        self._serial = count()

    def __len__(self) -> int:
        return len(self._terms)

    def offloads(self, key: SequenceHash) -> bool:
        """Return whether `key` may be written below the host."""
        term = self._terms.get(key)
        if term is not None:
            return term.offload
        return self._state.limits.offload_priority_min <= PRIORITY_DEFAULT

    def agree(
        self,
        parent: SequenceHash | None,
        hashes: Sequence[SequenceHash],
        new: Iterable[SequenceHash],
        hints: Sequence[BlockHint],
    ) -> None:
        """Take the terms of a chain that is offered; `new` are those of it that get a slot now.

        What earlier copies of `new` were kept for does not count for these.
        """
        if not hints and not self._terms:
            return
        coming = set(new)
        for key in coming:
            if self._state.below(key) is None:
                self._terms.pop(key, None)
        asked: dict[SequenceHash, BlockHint] = {}
        for hint in hints:
            asked.update(dict.fromkeys(hashes[hint.first : hint.first + hint.count], hint))
        for key, hint in asked.items():
            self._enter(key, hint)
        self._raise_coming(hashes, coming)
        self._stop_offloads(parent, hashes)
        for name, _ in self._state.pools():
            self.apply(name, asked)
        self._tidy(hashes)

    def apply(self, tier: TierName, keys: Iterable[SequenceHash]) -> None:
        """Carry out the terms of those of `keys` that are in `tier`, root first."""
        pool = self._state.host if tier == HOST else self._state.tier(tier).pool
        if not self._terms and not pool.ranked:
            return
        names = list(keys)
        ranked: list[tuple[SlotId, _Term]] = []
        pairs = list(zip(names, pool.scan(names), strict=True))
        for key, slot in reversed(pairs):  # deepest first: a chain ages from its end
            if slot is None:
                continue
            term = self._terms.get(key) or _Term()
            away = tier != HOST and term.expires < inf
            if away or term.expires <= self._state.now:
                self._withdraw(tier, key, term)
                continue
            pool.rank([slot], term.priority)
            ranked.append((slot, term))
        for slot, term in ranked:  # now that no slot has the priority of a block before
            self._raise_above(pool, pool.parent_of(slot), term)

    def expire(self, now: float) -> None:
        """End priorities and lives whose time has come."""
        dates = self._dates
        while dates and dates[0][0] <= now:
            _, _, key, term = heapq.heappop(dates)
            if self._terms.get(key) is not term:
                continue
            if term.expires <= now:
                for name, _ in self._state.pools():
                    self._withdraw(name, key, term)
                continue  # the term stays for a copy that is still on its way, until `agree`
            if term.until <= now:
                term.priority, term.until = PRIORITY_DEFAULT, inf
                for name, _ in self._state.pools():
                    self.apply(name, [key])
            self._note_date(key, term)

    # -- private -------------------------------------------------------------------------------

    def _pools(self) -> list[Pool]:
        return [pool for _, pool in self._state.pools()]

    def _enter(self, key: SequenceHash, hint: BlockHint) -> None:
        now = self._state.now
        term = _Term(hint.priority)
        if hint.duration_s is not None:
            term.until = now + hint.duration_s
        if hint.ttl_s is not None:
            term.expires = now + hint.ttl_s
        self._terms[key] = term
        self._note_date(key, term)

    def _note_date(self, key: SequenceHash, term: _Term) -> None:
        if term.due < inf:
            heapq.heappush(self._dates, (term.due, next(self._serial), key, term))

    def _stop_offloads(self, parent: SequenceHash | None, hashes: Sequence[SequenceHash]) -> None:
        """Of a chain, the blocks from the first one on that is not worth it stay in the host."""
        floor = self._state.limits.offload_priority_min
        stopped = parent is not None and not self.offloads(parent)
        for key in hashes:
            term = self._terms.get(key)
            priority = term.priority if term else PRIORITY_DEFAULT
            stopped = stopped or priority < floor or (term is not None and term.expires < inf)
            if stopped and term is None and floor <= PRIORITY_DEFAULT:
                term = self._terms[key] = _Term()
            if term is not None:
                term.offload = not stopped

    def _raise_coming(self, hashes: Sequence[SequenceHash], coming: set[SequenceHash]) -> None:
        """Raise blocks that come back to what orphans behind them, still here, are kept for."""
        behind = False  # whether a block that is here hangs on this one
        for parent, child in zip(hashes[-2::-1], hashes[:0:-1], strict=True):
            behind = behind if child in coming else any(child in pool for pool in self._pools())
            if behind and parent in coming:
                term = self._terms.get(parent)
                held = term.priority if term else PRIORITY_DEFAULT
                behind = self._raise(parent, held, self._terms.get(child) or _Term())

    def _raise_above(self, pool: Pool, key: SequenceHash | None, child: _Term) -> None:
        while key is not None:
            slot = pool.scan([key])[0]
            if slot is None or not self._raise(key, pool.priority_of(slot), child):
                return
            pool.rank([slot], self._terms[key].priority)
            key = pool.parent_of(slot)

    def _raise(self, key: SequenceHash, held: int, child: _Term) -> bool:
        """Keep `key`, which has the priority `held`, like `child`; say if that changed it."""
        term = self._terms.get(key)
        lasts = child.priority <= PRIORITY_DEFAULT or (term and term.until >= child.until)
        if held >= child.priority and lasts:  # what it falls to is enough for the child, too
            return False
        if term is None:
            term = self._terms[key] = _Term(offload=self.offloads(key))
        above_default = held > PRIORITY_DEFAULT
        term.until = max(term.until, child.until) if above_default else child.until
        term.priority = max(held, child.priority)
        self._note_date(key, term)
        return True

    def _withdraw(self, tier: TierName, key: SequenceHash, term: _Term) -> None:
        state = self._state
        if tier == HOST:
            gone = state.host.withdraw([key])
        else:
            lower = state.tier(tier)
            gone = self._remove(lower, [key]) if key in lower else []
        if gone and term.expires <= state.now:
            state.counters.expired_blocks += 1
            state.left([key], "time to live ended", tier)
        elif gone:
            state.changes.note(tier, [key], stored=False)

    def _tidy(self, coming: Sequence[SequenceHash]) -> None:
        """Forget the terms of blocks that are nowhere, once they are as many as there are slots."""
        pools = self._pools()
        if len(self._terms) > 2 * sum(pool.slots_total for pool in pools) + _SLACK:
            known = set(coming)
            self._terms = {
                key: term
                for key, term in self._terms.items()
                if key in known or any(key in pool for pool in pools)
            }
        if len(self._dates) > 2 * len(self._terms) + _SLACK:
            self._dates = [date for date in self._dates if self._terms.get(date[2]) is date[3]]
            heapq.heapify(self._dates)
