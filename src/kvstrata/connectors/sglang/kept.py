"""The pages that the daemon keeps: found, loaded and saved by digest.

A page is loaded only if its slot has the promised generation before and after the copy; the first
that has not ends the load, since SGLang uses a prefix only.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from kvstrata.connectors.sglang.holds import Hold, Holds
from kvstrata.connectors.sglang.hostpages import PageSpace
from kvstrata.connectors.sglang.turns import Mapped, Turns
from kvstrata.core.ids import LineageDigest
from kvstrata.layout import BlockLayout
from kvstrata.runtime import messages as wire
from kvstrata.runtime.session import Session
from kvstrata.tokens import sequence_hashes

__all__ = ["KeptCounters", "KeptPages"]

_POLL_S: Final = 0.001
_NOTHING: Final = wire.Acquired(0, [], [], {})


@dataclass(slots=True)
class KeptCounters:
    """What happened so far, in pages unless said otherwise."""

    asked: int = 0
    """Asked for."""
    found: int = 0
    """Found, ready to be loaded."""
    loaded: int = 0
    """Copied to SGLang."""
    unloaded: int = 0
    """Asked to be loaded and not: gone, torn, too late, or no daemon."""
    torn: int = 0
    """Of these, copied while the slot was given to another block."""
    saved: int = 0
    """Handed to the daemon, those left out that it holds already."""
    unsaved: int = 0
    """Not saved: no slot free, too late, or no daemon."""
    late: int = 0
    """Calls of SGLang's that ended at their time limit."""


class KeptPages:
    """What the daemon keeps. Any thread may call; no call takes longer than its limit.

    The limit of each call is `batch_timeout_s`, and on top at most one copy of a page and the
    answers under way (`call_timeout_s` each) when it is reached.
    """

    def __init__(self, session: Session, *, batch_timeout_s: float, tenant: str = "") -> None:
        """Serve from `session`, which nobody else uses, in the name of `tenant`."""
        self._turns = Turns(session, tenant)
        self._batch_timeout_s = batch_timeout_s
        self._tenant = tenant
        self._holds = Holds()
        self._names = map(str, itertools.count(1))
        self.counters = KeptCounters()

    def open(self) -> None:
        """Reach or start the daemon; raises ConfigError or DaemonError as `Session.open`."""
        self._turns.session.open()

    @property
    def turns(self) -> Turns:
        """Whose turn with the daemon it is, for those who share the session."""
        return self._turns

    @property
    def daemon_pid(self) -> int:
        """The daemon's process, 0 while there is none."""
        return self._turns.session.daemon_pid

    @property
    def held_layout(self) -> BlockLayout | None:
        """The layout that the daemon holds, None while there is none."""
        welcome = self._turns.session.welcome
        return welcome.layout if welcome else None

    @property
    def daemon_address(self) -> str:
        """Where the daemon listens, empty while there is none."""
        return self._turns.session.daemon_address

    def statistics(self) -> dict[str, int]:
        """Return the counters of this object and of its turns, by name."""
        turns = {"late_turns": self._turns.late, "owed_dropped": self._turns.owed_dropped}
        return asdict(self.counters) | turns

    def find(self, digests: Sequence[LineageDigest]) -> int:
        """Return how many leading pages can be loaded now; they are held for a while."""
        self.counters.asked += len(digests)
        if not digests:
            return 0
        name, until = next(self._names), self._until()
        ready, epoch = self._wait_ready(name, digests, until)
        if ready:
            old = self._holds.add(Hold(name, epoch, frozenset(digests[:ready])))
            self._release([each.name for each in old if each.epoch == epoch], epoch, until)
        elif epoch:
            self._release([name], epoch, until)
        self.counters.found += ready
        return ready

    def load(
        self, digests: Sequence[LineageDigest], target: PageSpace, pages: Sequence[int]
    ) -> int:
        """Copy kept pages into `pages` of `target`; return how many leading ones are right."""
        # Under the name of the question, so that the daemon knows what was staged for it.
        hold = self._holds.take(digests[0]) if digests else None
        name, until = hold.name if hold else next(self._names), self._until()
        loaded = 0
        mapped, acquired = self._acquire(name, digests, until)
        if mapped and len(acquired.slots) < len(digests):  # not held, or held in another epoch
            self._wait_ready(name, digests, until)
            mapped, acquired = self._acquire(name, digests, until)
        if mapped:
            try:
                loaded = self._copy_in(mapped, acquired, target, pages, until)
            finally:
                self._release([name], mapped.epoch, until)
        self.counters.loaded += loaded
        self.counters.unloaded += len(pages) - loaded
        return loaded

    def save(
        self,
        digests: Sequence[LineageDigest],
        parent: LineageDigest | None,
        source: PageSpace,
        pages: Sequence[int],
    ) -> list[bool]:
        """Hand pages to the daemon; return of each whether it is kept, or about to be.

        `parent` is the page before the first, None if that is the root or not known.
        """
        name, until = next(self._names), self._until()
        kept = [False] * len(digests)
        with self._turns.turn(until) as mapped:
            reserved = self._reserve(name, mapped, digests, parent) if mapped else None
        if mapped and reserved:
            pairs = list(zip(reserved.indices, reserved.slots, strict=True))
            filled = 0
            try:
                filled = self._copy_out(mapped, pairs, source, pages, until)
            finally:
                if filled < len(pairs):
                    self._turns.tell(mapped.epoch, wire.Abort(name, reserved.slots[filled:]), until)
            slots = reserved.slots[:filled]
            if not slots or self._turns.tell(mapped.epoch, wire.Seal(name, slots), until):
                whole = filled == len(pairs) and not reserved.throttled
                # What is wanted and has no slot lies behind what has one.
                end = reserved.indices[filled - 1] + 1 if filled else 0
                end = len(digests) if whole else end
                kept[:end] = [True] * end
                self.counters.saved += filled
        self.counters.unsaved += kept.count(False)
        return kept

    def forget(self, digest: LineageDigest) -> None:
        """Forget one page, as far as the daemon can be told."""
        with self._turns.turn(self._until()) as mapped:
            if mapped:
                (key,) = sequence_hashes(mapped.key, [digest])
                self._turns.call(wire.Forget(key), wire.Cleared)

    def clear(self) -> bool:
        """Forget every page of this model; False if the daemon could not be told yet.

        Until it has forgotten them nothing is asked of it.
        """
        self._turns.owe_clear()
        self._holds.drop_all()
        with self._turns.turn(self._until()) as mapped:
            return mapped is not None

    def close(self) -> None:
        """Leave the daemon, or end it if it is ours; twice is harmless."""
        self._turns.close(self._batch_timeout_s)

    # -- private -------------------------------------------------------------------------------

    def _until(self) -> float:
        return time.monotonic() + self._batch_timeout_s

    def _release(self, names: Sequence[str], epoch: int, until: float) -> None:
        if names:
            self._turns.tell(epoch, wire.Release(list(names)), until)

    def _wait_ready(
        self, name: str, digests: Sequence[LineageDigest], until: float
    ) -> tuple[int, int]:
        """Return how many leading pages are in the host, and in which epoch (0 for no daemon)."""
        while True:
            with self._turns.turn(until) as mapped:
                if mapped is None:
                    return 0, 0
                joined = wire.join_hashes(sequence_hashes(mapped.key, digests))
                found = self._turns.call(wire.Lookup(name, joined), wire.Found)
            if found is None:
                return 0, 0
            if not found.pending:
                return found.ready, mapped.epoch
            if time.monotonic() >= until:
                self.counters.late += 1
                return found.ready, mapped.epoch
            time.sleep(_POLL_S)

    def _acquire(
        self, name: str, digests: Sequence[LineageDigest], until: float
    ) -> tuple[Mapped | None, wire.Acquired]:
        """Return the slots to read and the epoch that they are of, None for no daemon."""
        with self._turns.turn(until) as mapped:
            if mapped is None or not digests:
                return None, _NOTHING
            hashes = sequence_hashes(mapped.key, digests)
            call = wire.Acquire(name, wire.join_hashes(hashes))
            return mapped, self._turns.call(call, wire.Acquired) or _NOTHING

    def _reserve(
        self,
        name: str,
        mapped: Mapped,
        digests: Sequence[LineageDigest],
        parent: LineageDigest | None,
    ) -> wire.Reserved | None:
        if not digests:
            return None
        before = sequence_hashes(mapped.key, [parent] if parent else [])
        hashes = sequence_hashes(mapped.key, digests)
        family = b"" if before else b"".join(mapped.family(digests[0]))
        call = wire.Reserve(
            name,
            b"".join(before),
            wire.join_hashes(hashes),
            tenant=self._tenant,
            family=family,
        )
        return self._turns.call(call, wire.Reserved)

    def _copy_in(
        self,
        mapped: Mapped,
        acquired: wire.Acquired,
        target: PageSpace,
        pages: Sequence[int],
        until: float,
    ) -> int:
        """Copy slots into pages; a page counts only if its slot was the same before and after."""
        slots = zip(acquired.slots, acquired.generations, pages, strict=False)
        for loaded, (slot, generation, page) in enumerate(slots):
            if time.monotonic() >= until:
                self.counters.late += 1
                return loaded
            if mapped.generations[slot] != generation:
                self.counters.torn += 1
                return loaded
            mapped.load(slot, target, page)
            if mapped.generations[slot] != generation:
                self.counters.torn += 1
                return loaded
        return min(len(acquired.slots), len(pages))

    def _copy_out(
        self,
        mapped: Mapped,
        pairs: Sequence[tuple[int, int]],
        source: PageSpace,
        pages: Sequence[int],
        until: float,
    ) -> int:
        """Copy pages into slots, `(index of the page, slot)`; return how many were."""
        for filled, (index, slot) in enumerate(pairs):
            if time.monotonic() >= until:
                self.counters.late += 1
                return filled
            mapped.save(source, pages[index], slot)
        return len(pairs)
