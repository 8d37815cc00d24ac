"""The thread between vLLM's CPU tier and the daemon: it asks, copies, and reports.

Owner of the session, and the only one that touches rows of vLLM's tier: thread `kvstrata-tier`.
vLLM's scheduler hands it work and takes results; neither waits for the other, except to drain.
Queues: `_questions`, `_loads`, `_stores`, each bounded; what finds no room is answered at once, as
a miss. `_moves` has what was heard in two turns at most: a turn is taken only when it was emptied.
One lock, held for the queues only, never for a call or a copy.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Final, TypeAlias

from kvstrata.connectors.following import INTERVAL_S, Follower, Moved
from kvstrata.connectors.vllm.tiering.events import RowName
from kvstrata.connectors.vllm.tiering.mapping import DaemonSide, Epoch, Rows
from kvstrata.connectors.vllm.tiering.work import (
    Answered,
    Ended,
    KeeperCounters,
    Load,
    Question,
    Store,
)
from kvstrata.core.ids import LineageDigest, SequenceHash
from kvstrata.runtime import messages as wire
from kvstrata.runtime.session import Session

__all__ = ["Keeper"]

log = logging.getLogger("kvstrata.vllm")

_POLL_S: Final = 0.002
_LATE_S: Final = 1.0
"""A question that waited so long past its time is answered without a call."""
_WORK_MAX: Final = 4096
"""Items in each queue."""
_EVENTS_MAX: Final = 65536


_Work: TypeAlias = Question | Load | Store


class Keeper:
    """Serves one tier of one engine."""

    def __init__(self, session: Session, rows: Rows, *, follow: bool = False) -> None:
        """Serve from `session`, which nobody else uses; `follow` what its tiers hold if asked."""
        self.counters = KeeperCounters()
        self._daemon = DaemonSide(session)
        self._rows = rows
        self._names = map(str, itertools.count(1))
        self._lock = threading.Condition()
        self._questions: deque[Question] = deque()
        self._loads: deque[Load] = deque()
        self._stores: deque[Store] = deque()
        self._releases: list[str] = []
        self._forgets: list[tuple[str, LineageDigest]] = []
        self._at_hand: deque[_Work] = deque()  # taken from the queues, not ended
        self._asks_again = False  # some question was put back in this round
        self._busy = 0  # loads and stores handed in and not ended
        self._answers: deque[Answered] = deque(maxlen=_EVENTS_MAX)
        self._ended: deque[Ended] = deque()  # as many as vLLM has jobs
        self._closing = False
        self._cancelling = False  # what is at hand ends at its next block
        self._follower = Follower[RowName](self._count, interval_s=0.0) if follow else None
        self._moves: deque[Moved[RowName]] = deque()
        self._must_follow = False
        self._follow_at = 0.0
        self._thread = threading.Thread(target=self._run, name="kvstrata-tier", daemon=True)

    # -- the scheduler's side ------------------------------------------------------------------

    def start(self) -> None:
        """Begin to work; the session is the thread's from now on."""
        if self._follower:
            self._follower.take(self._daemon.session)  # from before the first store on
        self._thread.start()

    def ask(self, question: Question) -> None:
        """Have a question answered; see `take_answers`."""
        self.counters.asked += len(question.digests)
        with self._lock:
            if len(self._questions) < _WORK_MAX and not self._closing:
                self._questions.append(question)
                self._lock.notify_all()
                return
        self.counters.refused += 1
        self._answers.append(Answered(question, 0))

    def load(self, load: Load) -> None:
        """Have blocks loaded; see `take_ended`."""
        if not self._hand(load, self._loads):
            self._end(load, 0, 0.0)

    def store(self, store: Store) -> None:
        """Have blocks stored; see `take_ended`."""
        if not self._hand(store, self._stores):
            self._end(store, 0, 0.0)

    def release(self, names: Sequence[str]) -> None:
        """Let go of what was found for questions."""
        with self._lock:
            self._releases.extend(names)
            self._lock.notify_all()

    def forget(self, mark: str, digest: LineageDigest) -> None:
        """Have one block forgotten, as far as the daemon can be told."""
        with self._lock:
            self._forgets.append((mark, digest))
            self._lock.notify_all()

    def forget_rows(self) -> None:
        """Let go of vLLM's memory; only once closed."""
        self._rows = self._rows[:0].copy()

    def take_answers(self) -> list[Answered]:
        """Return what was answered since the last call."""
        return [self._answers.popleft() for _ in range(len(self._answers))]

    def take_ended(self) -> list[Ended]:
        """Return the loads and stores that ended since the last call."""
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def take_moves(self) -> list[Moved[RowName]]:
        """Return what was heard of the tiers since the last call; have it asked again in time."""
        now = time.monotonic()
        if now >= self._follow_at:
            self._follow_at = now + INTERVAL_S
            with self._lock:
                self._must_follow = self._follower is not None
                self._lock.notify_all()
        return [self._moves.popleft() for _ in range(len(self._moves))]

    @property
    def serves(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    def drain(self) -> None:
        """Wait until no row is touched any more: each piece of work has its time limit."""
        with self._lock:
            self._lock.wait_for(lambda: not self._busy)

    def cancel(self) -> None:
        """End every load and store, those at hand at their next block, and wait until they have."""
        with self._lock:
            self._cancelling = True
            left: list[Load | Store] = [*self._loads, *self._stores]
            self._loads.clear()
            self._stores.clear()
        for work in left:
            self.counters.cancelled += len(work.rows)
            self._end(work, 0, 0.0, handed=True)
        self.drain()
        self._cancelling = False

    def statistics(self) -> dict[str, int]:
        """Return the counters, by name."""
        return asdict(self.counters)

    def close(self, timeout_s: float) -> bool:
        """End the work at hand, then the thread and the session; False if it could not in time."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
        self._daemon.close()
        return True

    def _hand(self, work: Load | Store, queue: deque[Load] | deque[Store]) -> bool:
        with self._lock:
            if len(queue) >= _WORK_MAX or self._closing:
                self.counters.refused += 1
                return False
            self._busy += 1
            queue.append(work)  # type: ignore[arg-type]  # each its own
            self._lock.notify_all()
            return True

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:
            log.exception("kvstrata's tier has failed: vLLM goes on without it")
        finally:
            self._give_up()

    def _give_up(self) -> None:
        """Answer and end whatever is left, as misses: vLLM must not wait for it."""
        with self._lock:
            self._closing = True
            left = [*self._at_hand, *self._questions, *self._loads, *self._stores]
            for queue in (self._at_hand, self._questions, self._loads, self._stores):
                queue.clear()
        for work in left:
            if isinstance(work, Question):
                self._answers.append(Answered(work, 0))
            else:
                self._end(work, 0, 0.0, handed=True)

    def _serve(self) -> None:
        while True:
            work, releases, forgets, follow = self._next()
            epoch = self._daemon.epoch() if releases or forgets else None
            if releases and epoch:  # a daemon that is gone holds nothing
                self._daemon.call(wire.Release(releases), wire.Done)
            for mark, digest in forgets:
                if epoch is None:
                    break
                (key,) = epoch.hashes(mark, [digest])
                self._daemon.call(wire.Forget(key), wire.Cleared)
            self._at_hand.extend(work)
            while self._at_hand:
                self._do(self._at_hand[0])
                self._at_hand.popleft()
            if follow:
                self._follow()
            self._rest()
            if not (work or releases or forgets or follow):
                return

    def _next(self) -> tuple[list[_Work], list[str], list[tuple[str, LineageDigest]], bool]:
        """Return what is to be done now: every question, one load, and a store if none waits.

        Nothing at all means the end.
        """
        with self._lock:
            while True:
                work: list[_Work] = list(self._questions)
                self._questions.clear()
                if self._loads:
                    work.append(self._loads.popleft())
                elif self._stores:
                    work.append(self._stores.popleft())
                releases, self._releases = self._releases, []
                forgets, self._forgets = self._forgets, []
                follow, self._must_follow = self._must_follow, False
                if work or releases or forgets or follow or self._closing:
                    return work, releases, forgets, follow
                self._lock.wait()

    def _rest(self) -> None:
        """Wait a little if all that is left are questions that wait for the daemon's disk."""
        with self._lock:
            if self._asks_again and not (self._loads or self._stores or self._closing):
                self._lock.wait(_POLL_S)
        self._asks_again = False

    def _do(self, work: _Work) -> None:
        began = time.monotonic()
        match work:
            case Question():
                ready = self._ready(work)
                if ready is not None:
                    self.counters.found += ready
                    self._answers.append(Answered(work, ready))
            case Load():
                good = self._load(work)
                self.counters.loaded += good
                self.counters.unloaded += len(work.rows) - good
                self._end(work, good, time.monotonic() - began, handed=True)
            case Store():
                good = self._store(work)
                self.counters.stored += good
                self.counters.unstored += len(work.rows) - good
                self._end(work, good, time.monotonic() - began, handed=True)

    def _end(self, work: Load | Store, good: int, took_s: float, *, handed: bool = False) -> None:
        with self._lock:
            self._busy -= handed
            self._ended.append(Ended(work.job, good, len(work.rows), took_s))
            self._lock.notify_all()

    def _ready(self, question: Question) -> int | None:
        """Return how many leading blocks are in the host, None if more of them are on their way."""
        epoch = self._daemon.epoch()
        if epoch is None:
            return 0
        if time.monotonic() >= question.until + _LATE_S:  # others had their turn before it
            self.counters.late += 1
            return 0
        hashes = wire.join_hashes(self._named(epoch, question))
        found = self._daemon.call(wire.Lookup(question.name, hashes), wire.Found)
        if found is None:
            return 0
        if not found.pending or self._closing:
            return found.ready
        if time.monotonic() >= question.until:
            self.counters.late += 1
            return found.ready
        with self._lock:
            self._questions.append(question)
        self._asks_again = True
        return None

    def _named(self, epoch: Epoch, work: Question | Store) -> list[SequenceHash]:
        """Return the daemon's keys of some work's blocks; remember them if they are followed."""
        hashes = epoch.hashes(work.mark, work.digests)
        if self._follower:
            for key, name in zip(hashes, work.keys, strict=False):  # the canary's have no name
                self._follower.know(key, RowName(work.mark, name))
        return hashes

    def _follow(self) -> None:
        assert self._follower is not None, "nobody else asks for it"
        self._daemon.epoch()  # finds out whether the daemon is gone or back
        self._moves.extend(self._follower.take(self._daemon.session))

    def _count(self, name: str, number: int) -> None:
        if name == "untold_blocks":
            self.counters.untold_blocks += number
        else:
            self.counters.missed_changes += number

    def _must_end(self, work: Load | Store) -> bool:
        if time.monotonic() >= work.until:
            self.counters.late += 1
            return True
        return self._cancelling

    def _load(self, load: Load) -> int:
        """Return how many leading rows have their bytes; of the others nobody may use any."""
        epoch = self._daemon.epoch()
        if epoch is None:
            return 0
        if self._must_end(load):
            return 0
        name = f"load {next(self._names)}"
        hashes = wire.join_hashes(epoch.hashes(load.mark, load.digests))
        try:
            if self._daemon.call(wire.Lookup(name, hashes), wire.Found) is None:
                return 0
            acquired = self._daemon.call(wire.Acquire(name, hashes), wire.Acquired)
            return self._copy_in(epoch, acquired, load) if acquired else 0
        finally:
            self._daemon.call(wire.Release([name]), wire.Done)

    def _copy_in(self, epoch: Epoch, acquired: wire.Acquired, load: Load) -> int:
        pairs = zip(acquired.slots, acquired.generations, load.rows, strict=False)
        for good, (slot, generation, row) in enumerate(pairs):
            if self._must_end(load):
                return good
            if epoch.host.generations[slot] == generation:
                self._rows[row] = epoch.host.blocks[slot]
            if epoch.host.generations[slot] != generation:
                self.counters.torn += 1
                return good
        return min(len(acquired.slots), len(load.rows))

    def _store(self, store: Store) -> int:
        """Return how many leading blocks the daemon has now, or is about to have."""
        epoch = self._daemon.epoch()
        if epoch is None:
            return 0
        if self._must_end(store):
            return 0
        name = f"store {next(self._names)}"
        parent = epoch.hashes(store.mark, [store.parent] if store.parent else [])
        hashes = wire.join_hashes(self._named(epoch, store))
        call = wire.Reserve(name, b"".join(parent), hashes, store.hints, store.tenant)
        reserved = self._daemon.call(call, wire.Reserved)
        if reserved is None:
            return 0
        filled = 0
        for index, slot in zip(reserved.indices, reserved.slots, strict=True):
            if self._must_end(store):
                break
            epoch.host.blocks[slot] = self._rows[store.rows[index]]
            filled += 1
        slots, left = reserved.slots[:filled], reserved.slots[filled:]
        if left:
            self._daemon.call(wire.Abort(name, left), wire.Done)
        if slots and self._daemon.call(wire.Seal(name, slots), wire.Done) is None:
            return 0
        if filled == len(reserved.slots) and not reserved.throttled:
            return len(store.rows)
        return reserved.indices[filled - 1] + 1 if filled else 0
