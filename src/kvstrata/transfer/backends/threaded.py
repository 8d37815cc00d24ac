"""A backend that runs its ops on threads of its own; `memcpy`, `posix` and `sealer` build on it.

Concurrency: `threads` workers named `kvstrata-<name>-<n>` share the ops of the transfer that has
waited longest, at most `queue_transfers_max` of which have ops that nobody has begun; completions
go back through a SimpleQueue that only the owner polls. One lock guards the transfers; no op runs
under it. `close` stops and joins the workers.
"""

from __future__ import annotations

import logging
import queue
import signal
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvstrata.core.errors import TransferError
from kvstrata.core.ids import TransferId
from kvstrata.transfer.base import Completion, CopyOp, Outcome

__all__ = ["ThreadedBackend"]

log = logging.getLogger("kvstrata.transfer")


_SHARE_BYTES: Final = 256 << 10
"""A worker takes so many bytes of a transfer at once: a dozen index lines are not worth a dozen
wake-ups, and one large block is."""
_SHARES: Final = 4
"""It takes more while much is left, so many parts of it for each thread: taking costs 10 us."""


@dataclass(slots=True)
class _Work:
    transfer: TransferId
    ops: Sequence[CopyOp]
    source: Any
    target: Any
    begun: int = 0  # ops given to workers
    workers: int = 0
    failed: list[int] = field(default_factory=list)
    reason: str = ""
    cancelled: bool = False  # with ops that were never begun


class ThreadedBackend(ABC):
    """Runs `move` for each op; what it raises as OSError or TransferError fails that op only."""

    name = "threaded"

    def __init__(
        self,
        *,
        threads: int = 1,
        queue_transfers_max: int = 1024,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the workers. `notify` is called from a worker after each completion."""
        self._notify = notify
        self._queue_transfers_max = queue_transfers_max
        self._queue: deque[_Work] = deque()
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self._waiting: set[TransferId] = set()
        self._cancelled: set[TransferId] = set()
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"kvstrata-{self.name}-{index}", daemon=True)
            for index in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @abstractmethod
    def move(self, op: CopyOp, source: Any, target: Any) -> None:
        """Move the bytes of one op, all of them, or raise OSError or TransferError."""

    @abstractmethod
    def capabilities(self) -> frozenset[tuple[str, str]]:
        """Return the (source, target) kinds it serves."""

    def submit(self, transfer: TransferId, ops: Sequence[CopyOp], source: Any, target: Any) -> bool:
        """Queue the transfer, or return False if the queue is full or we are closed."""
        with self._lock:
            if self._closed or len(self._queue) >= self._queue_transfers_max:
                return False
            assert transfer not in self._waiting, f"{transfer=} is already under way"
            self._waiting.add(transfer)
            self._queue.append(_Work(transfer, ops, source, target))
            self._news.notify()
        return True

    def poll(self) -> list[Completion]:
        """Return what completed since the last call."""
        completions = []
        while not self._done.empty():
            completions.append(self._done.get())
        return completions

    def cancel(self, transfer: TransferId) -> None:
        """Skip the ops of `transfer` that have not begun."""
        with self._lock:
            if transfer in self._waiting:
                self._cancelled.add(transfer)

    def close(self) -> None:
        """Cancel what waits, let what runs finish, stop the workers."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._cancelled |= self._waiting
            self._news.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        # A signal taken by this thread would not wake the owner's poll, which has to act on it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        while (taken := self._take()) is not None:
            work, first, end = taken
            failed, reason = self._carry_out(work, range(first, end))
            with self._lock:
                work.workers -= 1
                work.failed += failed
                work.reason = work.reason or reason
                ended = not work.workers and work.begun == len(work.ops)
                if ended:
                    self._waiting.discard(work.transfer)
                    self._cancelled.discard(work.transfer)
            if ended:
                self._done.put(_completion(work))
                self._notify()

    def _take(self) -> tuple[_Work, int, int] | None:
        """Wait for a share of the oldest transfer that has one; None when there is no more."""
        with self._lock:
            while not self._queue:
                if self._closed:
                    return None
                self._news.wait()
            work = self._queue[0]
            first = end = work.begun
            if work.transfer in self._cancelled:
                work.cancelled = first < len(work.ops)
                end = first = len(work.ops)
            size, many = 0, first + (len(work.ops) - first) // (_SHARES * len(self._threads))
            while end < len(work.ops) and (size < _SHARE_BYTES or end < many):
                size += work.ops[end].length
                end += 1
            work.begun = end
            work.workers += 1
            if end == len(work.ops):
                self._queue.popleft()
            if self._queue:
                self._news.notify()
            return work, first, end

    def _carry_out(self, work: _Work, share: range) -> tuple[list[int], str]:
        failed: list[int] = []
        reason = ""
        for index in share:
            if work.transfer in self._cancelled:
                work.cancelled = True
                break
            try:
                self.move(work.ops[index], work.source, work.target)
            except (OSError, TransferError) as error:
                failed.append(index)
                reason = reason or str(error)
            except Exception as error:  # a dead worker would never complete: say so and go on
                log.exception("%s backend failed unexpectedly", self.name)
                failed.append(index)
                reason = reason or f"{type(error).__name__}: {error}"
        return failed, reason


def _completion(work: _Work) -> Completion:
    if work.cancelled:
        every = tuple(range(len(work.ops)))
        return Completion(work.transfer, Outcome.CANCELLED, every, "cancelled")
    outcome = Outcome.FAILED if work.failed else Outcome.DONE
    return Completion(work.transfer, outcome, tuple(sorted(work.failed)), work.reason)
