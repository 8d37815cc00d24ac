"""The NIXL mover: memory and files of this process, and the memory of peers.

Concurrency: one thread, `kvstrata-nixl-0`, posts and watches every request; posting may take as
long as the copy. Each peer, all files together, and all memory together are a lane with a window
of its own, so that a peer that does not answer keeps nobody else waiting. The owner submits and
polls; at most `queue_transfers_max` transfers are accepted and not yet polled. `close` joins the
thread.

A transfer completes when NIXL says that its requests have ended, never before: until then bytes
may arrive. One that is past `timeout_s` gives up what NIXL has not been given, its peer gets no
new work, and its memory stays held; its completion comes late, or at `close`.
"""

from __future__ import annotations

import logging
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from kvstrata.core.errors import TransferError
from kvstrata.core.ids import TransferId
from kvstrata.storage.base import FileRegion, MemoryRegion
from kvstrata.transfer.backends.nixl.agent import NixlAgent
from kvstrata.transfer.backends.nixl.invitation import PeerMemory
from kvstrata.transfer.backends.nixl.registrations import region_address
from kvstrata.transfer.backends.nixl.requests import FILE, MEMORY, Request, RequestState
from kvstrata.transfer.backends.nixl.work import Batch, Work, plan_work
from kvstrata.transfer.base import Completion, CopyOp, Outcome

__all__ = ["NixlBackend"]

log = logging.getLogger("kvstrata.nixl")

_WINDOW: Final = {FILE: 64, MEMORY: 2}  # requests; files one op each, memory is copied at once
_PEER_WINDOW: Final = 4
_PAUSE_MIN_S: Final = 20e-6
_PAUSE_MAX_S: Final = 500e-6
_OVERDUE_PAUSE_S: Final = 20e-3


class NixlBackend:
    """A `TransferBackend` over one agent, which it owns and closes."""

    name = "nixl"

    def __init__(
        self,
        agent: NixlAgent | None = None,
        *,
        timeout_s: float = 5.0,
        close_timeout_s: float = 2.0,
        queue_transfers_max: int = 1024,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the thread. `notify` is called from it after each completion.

        Raises ConfigError if there is no agent and NIXL cannot be used.
        """
        self.agent = agent or NixlAgent()
        self._timeout_s, self._close_timeout_s = timeout_s, close_timeout_s
        self._queue_max = queue_transfers_max
        self._notify = notify
        self._inbox: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self._accepted: set[TransferId] = set()  # the owner's, and not yet polled
        self._cancelled: set[TransferId] = set()
        self._lanes: dict[str, deque[Work]] = {}  # the thread's, as all that follows
        self._working: dict[str, int] = {}  # requests within their time, by lane
        self._overdue: dict[str, int] = {}  # and those past it
        self._requests: dict[Request, tuple[Work, Batch]] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvstrata-nixl-0", daemon=True)
        self._thread.start()

    def submit(self, transfer: TransferId, ops: Sequence[CopyOp], source: Any, target: Any) -> bool:
        """Queue the transfer, or return False if the queue is full or we are closed."""
        if self._closed or len(self._accepted) >= self._queue_max:
            return False
        assert transfer not in self._accepted, f"{transfer=} is already under way"
        self._accepted.add(transfer)
        self._inbox.put(plan_work(transfer, ops, source, target))
        return True

    def poll(self) -> list[Completion]:
        """Return what completed since the last call."""
        completions = []
        while not self._done.empty():
            completion = self._done.get()
            self._accepted.discard(completion.transfer)
            self._cancelled.discard(completion.transfer)
            completions.append(completion)
        return completions

    def cancel(self, transfer: TransferId) -> None:
        """Skip what NIXL has not been given of `transfer`."""
        if transfer in self._accepted:
            self._cancelled.add(transfer)

    def capabilities(self) -> frozenset[tuple[str, str]]:
        """Memory, peers and files, as far as the plug-ins that started serve them."""
        pairs: set[tuple[str, str]] = set()
        if "UCX" in self.agent.plugins:
            pairs |= {("memory", "memory"), ("memory", "peer"), ("peer", "memory")}
        if self.agent.plugins.keys() - {"UCX"}:
            pairs |= {("memory", "file"), ("file", "memory")}
        return frozenset(pairs)

    def close(self) -> None:
        """Cancel what waits, give what runs `close_timeout_s`, stop the thread and the agent."""
        if self._closed:
            return
        self._closed = True
        self._inbox.put(None)
        self._thread.join()
        self.agent.close(timeout_s=0)

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        # A signal taken by this thread would not wake the owner's poll, which has to act on it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        pause = 0.0
        while True:
            still_open, came = self._receive(self._pause(pause))
            if not still_open:
                break
            moved = self._post() + self._check()
            pause = 0.0 if came or moved else min(max(2 * pause, _PAUSE_MIN_S), _PAUSE_MAX_S)
        self._drain()

    def _pause(self, pause: float) -> float | None:
        """How long to wait for new work: for ever if nothing is under way."""
        if self._working or self._lanes:
            return pause
        return _OVERDUE_PAUSE_S if self._requests else None

    def _receive(self, pause: float | None) -> tuple[bool, int]:
        """Take what was submitted; return whether we stay open and how much came."""
        came = 0
        try:
            work = self._inbox.get(timeout=pause)
            while True:
                if work is None:
                    return False, came
                came += 1
                if work.ended:
                    self._finish(work)
                else:
                    self._lanes.setdefault(work.lane, deque()).append(work)
                work = self._inbox.get_nowait()
        except queue.Empty:
            return True, came

    def _post(self) -> int:
        posted = 0
        for lane in list(self._lanes):
            waiting = self._lanes[lane]
            while waiting:
                work = waiting[0]
                if work.transfer in self._cancelled:
                    work.cancel()
                if work.batches and not self._has_room(work, work.batches[0]):
                    break
                if work.batches:
                    self._try(work, work.batches.popleft())
                    posted += 1
                if not work.batches:
                    waiting.popleft()
                    if work.ended:
                        self._finish(work)
            if not waiting:
                del self._lanes[lane]
        return posted

    def _has_room(self, work: Work, batch: Batch) -> bool:
        window = _WINDOW.get(work.far_name, _PEER_WINDOW)
        return self._working.get(work.lane, 0) < window and self.agent.room() >= len(batch.ops)

    def _try(self, work: Work, batch: Batch) -> None:
        """Post one batch; what cannot be posted fails, one op at a time if there are several."""
        if overdue := self._overdue.get(work.lane):
            work.fail(batch.ops, f"{work.lane} is stalled: {overdue} requests are overdue")
            work.drop(f"{work.lane} is stalled: {overdue} requests are overdue")
            return
        try:
            self._hold(work)
            request = self.agent.post(
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
        work.holds.append(self.agent.hold(local))
        address = region_address(local)
        match far:
            case FileRegion(descriptor=descriptor):
                file = self.agent.hold_file(descriptor)
                work.holds.append(file)
                work.sides = (address, 0, file.descriptor)
            case MemoryRegion():
                work.holds.append(self.agent.hold(far))
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
            state = self.agent.check(request)
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
            if work.ended and work not in self._lanes.get(lane, ()):
                self._finish(work)
        return ended

    def _failed(self, work: Work, batch: Batch, state: RequestState, reason: str) -> None:
        again = len(batch.ops) > 1 and state is RequestState.FAILED
        if not again or work.cancelled or self._closed:
            work.fail(batch.ops, reason)
            return
        self._split(work, batch, reason)
        lane = self._lanes.setdefault(work.lane, deque())
        if work not in lane:
            lane.append(work)

    def _finish(self, work: Work) -> None:
        for hold in work.holds:
            self.agent.let_go(hold)
        self._done.put(work.completion())
        self._notify()

    def _drain(self) -> None:
        """Closing: nothing new is posted; what runs may end, what does not is given up."""
        for waiting in self._lanes.values():
            for work in waiting:
                work.cancel()
                if work.ended:
                    self._finish(work)
        self._lanes.clear()
        self.agent.settle(list(self._requests), self._close_timeout_s)
        self._check()
        for work in dict.fromkeys(work for work, _ in self._requests.values()):
            every = tuple(range(len(work.ops)))
            reason = "closed while in flight; its memory is kept until the process ends"
            self._done.put(Completion(work.transfer, Outcome.CANCELLED, every, reason))
            self._notify()
