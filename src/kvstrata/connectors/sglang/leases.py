"""Pages that a request is about to load: found in the host without a wait, and leased.

A request is told only of pages that lie in the host tier now. What lies below is staged behind its
back, for the next one that asks. From the answer to the end of the copy the daemon holds the pages,
so their slots are given to nobody else; the generations tell if they were all the same, as when a
daemon that hung takes its client for gone.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstrata.connectors.sglang.hostpages import PageSpace
from kvstrata.connectors.sglang.turns import Mapped, Turns
from kvstrata.core.ids import LineageDigest
from kvstrata.runtime import messages as wire
from kvstrata.tokens import sequence_hashes

__all__ = ["Lease", "LeaseCounters", "Leases"]

_ASKED_MAX: Final = 64
_FRESH_S: Final = 0.1
"""SGLang asks for every request that waits, in every step: so long the last answer will do."""


@dataclass(slots=True)
class LeaseCounters:
    """What happened so far, in pages unless said otherwise."""

    looked_up: int = 0
    """Asked for by requests, each chain once."""
    leased: int = 0
    """Promised to be loaded."""
    left_below: int = 0
    """Questions that found pages below the host, which count as missed."""
    refused: int = 0
    """Loads refused before they began: pages were gone, or no answer in time."""
    given_up: int = 0
    """Leased, and not loaded since another rank could not have its part."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Slots that the daemon gives to nobody else until `Leases.end`."""

    name: str
    """The name under which it holds them."""
    mapped: Mapped
    """The epoch that they are of; its memory stays mapped as long as this."""
    slots: list[int]
    """The slots, in the order of the pages."""
    generations: NDArray[np.uint64]
    """The generation of each slot when it was leased."""
    pages: list[int]
    """The page of the device that each slot is for."""

    def intact(self) -> bool:
        """Return whether no slot was given to another block since it was leased."""
        return bool((self.mapped.generations[self.slots] == self.generations).all())

    def copy(self, target: PageSpace) -> None:
        """Copy every slot into its page, all layers of it."""
        for slot, page in zip(self.slots, self.pages, strict=True):
            self.mapped.load(slot, target, page)


@dataclass(frozen=True, slots=True)
class _Asked:
    name: str
    digests: list[LineageDigest]
    epoch: int
    ready: int
    held: bool  # by the daemon, under the name
    at: float


class Leases:
    """The questions and leases of one engine. One thread asks and takes, any may end.

    No call takes longer than two answers of the daemon: the one under way, and its own.
    """

    def __init__(self, turns: Turns, *, wait_s: float) -> None:
        """Share `turns` with what saves; wait no longer than `wait_s` for ours."""
        self._turns = turns
        self._wait_s = wait_s
        self._asked: OrderedDict[str, _Asked] = OrderedDict()
        self._names = (f"link-{number}" for number in itertools.count(1))
        self._open: dict[str, Lease] = {}  # every step on it is atomic under the interpreter's lock
        self.counters = LeaseCounters()

    def ready(self, request: str, digests: Sequence[LineageDigest]) -> int:
        """Return how many leading pages lie in the host; they are held for a while.

        Those behind them that lie below are on their way up when this returns. A request that asks
        the same again within a moment hears the same: the load is what decides.
        """
        if not digests:
            return 0
        asked = self._asked.get(request)
        again = asked is not None and asked.digests == digests
        if asked and again and time.monotonic() - asked.at < _FRESH_S:
            return asked.ready
        if asked and not again:
            self.drop(request)
        name = asked.name if asked and again else next(self._names)
        with self._turns.turn(self._until()) as mapped:
            found = self._look_up(name, mapped, digests) if mapped else None
        self.counters.looked_up += 0 if again else len(digests)
        if mapped is None or found is None:
            return 0
        if found.pending:
            self.counters.left_below += 0 if again else 1
        # Without a hold, staging would have no one to stage for.
        held = bool(found.ready or found.pending)
        now = time.monotonic()
        self._remember(request, _Asked(name, list(digests), mapped.epoch, found.ready, held, now))
        return found.ready

    def take(
        self, request: str, digests: Sequence[LineageDigest], pages: Sequence[int]
    ) -> Lease | None:
        """Lease all of these pages for a load into `pages`; None if one of them is not there."""
        asked = self._asked.pop(request, None)
        name = asked.name if asked else next(self._names)
        lease = None
        with self._turns.turn(self._until()) as mapped:
            if mapped and digests:
                joined = wire.join_hashes(sequence_hashes(mapped.key, digests))
                found = self._turns.call(wire.Acquire(name, joined), wire.Acquired)
                if found and len(found.slots) == len(digests) == len(pages):
                    generations = np.array(found.generations, np.uint64)
                    lease = Lease(name, mapped, found.slots, generations, list(pages))
        if lease and lease.intact():
            self._open[lease.name] = lease
            self.counters.leased += len(digests)
            return lease
        if mapped:
            self._release([(name, mapped.epoch)])
        self.counters.refused += len(digests)
        return None

    def end(self, leases: Sequence[Lease]) -> None:
        """Give slots back: their copy has ended, or will not begin; twice is harmless."""
        ended = [each for each in leases if self._open.pop(each.name, None)]
        self._release([(each.name, each.mapped.epoch) for each in ended])

    def give_up(self, lease: Lease) -> None:
        """Give a lease back that is of no use: another rank has none."""
        self.counters.given_up += len(lease.pages)
        self.end([lease])

    def drop(self, request: str) -> None:
        """Give up what was found for a request and not leased."""
        asked = self._asked.pop(request, None)
        if asked and asked.held:
            self._release([(asked.name, asked.epoch)])

    def end_all(self) -> None:
        """Give up everything that was found or leased. Nobody may copy any more."""
        asked, leased = list(self._asked.values()), list(self._open.values())
        self._asked.clear()
        self._open.clear()
        names = [(each.name, each.epoch) for each in asked if each.held]
        self._release(names + [(each.name, each.mapped.epoch) for each in leased])

    def statistics(self) -> dict[str, int]:
        """Return the counters by name."""
        return asdict(self.counters)

    # -- private -------------------------------------------------------------------------------

    def _until(self) -> float:
        return time.monotonic() + self._wait_s

    def _look_up(
        self, name: str, mapped: Mapped, digests: Sequence[LineageDigest]
    ) -> wire.Found | None:
        """Ask in our turn; what holds nothing and waits for nothing is released at once."""
        joined = wire.join_hashes(sequence_hashes(mapped.key, digests))
        found = self._turns.call(wire.Lookup(name, joined), wire.Found)
        if found and not found.ready and not found.pending:
            self._turns.call(wire.Release([name]), wire.Done)
        return found

    def _remember(self, request: str, asked: _Asked) -> None:
        self._asked[request] = asked
        self._asked.move_to_end(request)
        if len(self._asked) > _ASKED_MAX:  # its request is gone, or has asked long ago
            self.drop(next(iter(self._asked)))

    def _release(self, held: Sequence[tuple[str, int]]) -> None:
        """Release names, each with its epoch: one message for each epoch."""
        for epoch in sorted({epoch for _, epoch in held}):
            names = [name for name, its in held if its == epoch]
            self._turns.tell(epoch, wire.Release(names), self._until())
