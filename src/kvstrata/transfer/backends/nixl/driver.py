"""The thread of the NIXL backend: gives requests to NIXL and watches them to their end.

Each peer, each file, and all memory of this process are a lane with a window of its own, so that
a peer that does not answer keeps nobody else waiting. Posting may take as long as the copy.
"""

from __future__ import annotations

import logging
import queue
import signal
from collections import deque
from collections.abc import Callable
from typing import Final

from kvstrata.core.errors import TransferError
from kvstrata.core.ids import TransferId
from kvstrata.storage.base import FileRegion, MemoryRegion
from kvstrata.transfer.backends.nixl.agent import NixlAgent
from kvstrata.transfer.backends.nixl.invitation import PeerMemory
from kvstrata.transfer.backends.nixl.registrations import region_address
from kvstrata.transfer.backends.nixl.requests import FILE, MEMORY, Request, RequestState
from kvstrata.transfer.backends.nixl.work import Batch, Work
from kvstrata.transfer.base import Completion, Outcome

__all__ = ["Driver"]

log = logging.getLogger("kvstrata.nixl")

_WINDOW: Final = {FILE: 64, MEMORY: 2}  # requests; files one op each, memory is copied at once
_PEER_WINDOW: Final = 2
_PAUSE_MIN_S: Final = 20e-6
_PAUSE_MAX_S: Final = 500e-6
_OVERDUE_PAUSE_S: Final = 20e-3


class Driver:
    """What the thread owns; others only put into `inbox` and `cancelled`."""

    def __init__(
        self,
        agent: NixlAgent,
        tell: Callable[[Completion], None],
        *,
        timeout_s: float,
        close_timeout_s: float,
    ) -> None:
        """Drive requests through `agent`; `tell` gets each completion, from the thread."""
        self._agent, self._tell = agent, tell
        self._timeout_s, self._close_timeout_s = timeout_s, close_timeout_s
        self.inbox: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self.cancelled: set[TransferId] = set()
        self.stopped = False
        self._lanes: dict[str, deque[Work]] = {}
        self._working: dict[str, int] = {}  # requests within their time, by lane
        self._overdue: dict[str, int] = {}  # and those past it
        self._requests: dict[Request, tuple[Work, Batch]] = {}

    def run(self) -> None:
        """Work until None is received, then let what runs end. This is the thread."""
        # A signal taken by this thread would not wake the owner's poll, which has to act on it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            self._work()
        except Exception:  # who waits for a dead thread waits for ever: end in good order
            log.exception("the nixl backend stops: this is a bug")
            self.stopped = True
        self._drain()

    def _work(self) -> None:
        pause = 0.0
        while True:
            still_open, came = self._receive(self._pause(pause))
            if not still_open:
                return
            moved = self._post() + self._check()
            pause = 0.0 if came or moved else min(max(2 * pause, _PAUSE_MIN_S), _PAUSE_MAX_S)

    def _pause(self, pause: float) -> float | None:
        """How long to wait for new work: for ever if nothing is under way."""
        if self._working or self._lanes:
            return pause
        return _OVERDUE_PAUSE_S if self._requests else None

    def _receive(self, pause: float | None) -> tuple[bool, int]:
        """Take what was submitted; return whether we stay open and how much came."""
        came = 0
        try:
            work = self.inbox.get(timeout=pause)
            while True:
                if work is None:
                    return False, came
                came += 1
                if work.ended:
                    self._finish(work)
                else:
                    self._enqueue(work)
                work = self.inbox.get_nowait()
        except queue.Empty:
            return True, came

    def _enqueue(self, work: Work) -> None:
        work.queued = True
        self._lanes.setdefault(work.lane, deque()).append(work)

    def _post(self) -> int:
        posted = 0
        for lane in list(self._lanes):
            waiting = self._lanes[lane]
            while waiting:
                work = waiting[0]
                if work.transfer in self.cancelled:
                    work.cancel()
                if work.batches and not self._has_room(work, work.batches[0]):
                    break
                if work.batches:
                    self._try(work, work.batches.popleft())
                    posted += 1
                if not work.batches:
                    waiting.popleft()
                    work.queued = False
                    if work.ended:
                        self._finish(work)
            if not waiting:
                del self._lanes[lane]
        return posted

    def _has_room(self, work: Work, batch: Batch) -> bool:
        window = _WINDOW.get(work.far_name, _PEER_WINDOW)
        return self._working.get(work.lane, 0) < window and self._agent.room() >= len(batch.ops)

    def _try(self, work: Work, batch: Batch) -> None:
        """Post one batch; what cannot be posted fails, one op at a time if there are several."""
        if overdue := self._overdue.get(work.lane):
            work.fail(batch.ops, f"{work.lane} is stalled: {overdue} requests are overdue")
            work.drop(f"{work.lane} is stalled: {overdue} requests are overdue")
            return
        try:
            self._hold(work)
            request = self._agent.post(
                work.rows(batch), work.far_name, read=work.read, timeout_s=self._timeout_s
            )
        except (TransferError, BufferError, ValueError) as error:
            if isinstance(error, TransferError) and error.retryable:
                work.fail(batch.ops, str(error))
                work.drop(str(error))  # the peer, not the op: the rest would meet the same
            else:
                self._split(work, batch, str(error))
            return
        except Exception as error:  # a dead thread would never complete: say so and go on
            log.exception("nixl backend failed unexpectedly")
            work.fail(batch.ops, f"{type(error).__name__}: {error}")
            return
        work.live += 1
        self._requests[request] = (work, batch)
        self._working[work.lane] = self._working.get(work.lane, 0) + 1

    def _hold(self, work: Work) -> None:
        """Register both sides, once for all batches."""
        if work.holds:
            return
        local, far = work.local, work.far
        assert local is not None
        work.holds.append(self._agent.hold(local))
        address = region_address(local)
        match far:
            case FileRegion(descriptor=descriptor):
                file = self._agent.hold_file(descriptor)
                work.holds.append(file)
                work.sides = (address, 0, file.descriptor)
            case MemoryRegion():
                work.holds.append(self._agent.hold(far))
                work.sides = (address, region_address(far), 0)
            case PeerMemory(address=there):
                work.sides = (address, there, 0)
            case None:
                raise AssertionError("planned without a far side")

    def _split(self, work: Work, batch: Batch, reason: str) -> None:
        """One of several ops is wrong: ask NIXL for each alone, next."""
        if len(batch.ops) == 1:
            work.fail(batch.ops, reason)
            return
        work.batches.extendleft(Batch((index,)) for index in reversed(batch.ops))

    def _check(self) -> int:
        """Look at every request; return how many ended."""
        ended = 0
        for request in list(self._requests):
            was_overdue = request.overdue
            state = self._agent.check(request)
            work, batch = self._requests[request]
            lane = work.lane
            if request.overdue and not was_overdue:
                self._working[lane] -= 1
                self._overdue[lane] = self._overdue.get(lane, 0) + 1
                work.drop(f"{lane} did not answer within {self._timeout_s} s")
            if state is RequestState.RUNNING:
                continue
            ended += 1
            del self._requests[request]
            work.live -= 1
            counts = self._overdue if request.overdue else self._working
            counts[lane] -= 1
            if not counts[lane]:
                del counts[lane]
            if state is not RequestState.DONE:
                self._failed(work, batch, state, request.reason)
            if work.ended and not work.queued:
                self._finish(work)
        return ended

    def _failed(self, work: Work, batch: Batch, state: RequestState, reason: str) -> None:
        again = len(batch.ops) > 1 and state is RequestState.FAILED
        if not again or work.cancelled or self.stopped:
            work.fail(batch.ops, reason)
            return
        self._split(work, batch, reason)
        if not work.queued:
            self._enqueue(work)

    def _finish(self, work: Work) -> None:
        for hold in work.holds:
            self._agent.let_go(hold)
        self._tell(work.completion())

    def _drain(self) -> None:
        """Closing: nothing new is posted; what runs may end, what does not is given up."""
        self.stopped = True
        while not self.inbox.empty():
            work = self.inbox.get()
            if work is not None:
                self._enqueue(work)
        for waiting in self._lanes.values():
            for work in waiting:
                work.queued = False
                work.cancel()
                if work.ended:
                    self._finish(work)
        self._lanes.clear()
        self._agent.settle(list(self._requests), self._close_timeout_s)
        self._check()
        for work in dict.fromkeys(work for work, _ in self._requests.values()):
            every = tuple(range(len(work.ops)))
            reason = "closed while in flight; its memory is kept until the process ends"
            self._tell(Completion(work.transfer, Outcome.CANCELLED, every, reason))
