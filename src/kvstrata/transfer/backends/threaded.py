"""A backend that runs its ops on threads of its own; `memcpy`, `posix` and `sealer` build on it.

Concurrency: `threads` workers named `kvstrata-<name>-<n>` take whole transfers from one queue of
at most `queue_transfers_max`; completions go back through a SimpleQueue that only the owner
polls. One lock guards the set of cancelled transfers. `close` stops and joins the workers.
"""

from __future__ import annotations

import logging
import queue
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvstrata.core.errors import TransferError
from kvstrata.core.ids import TransferId
from kvstrata.transfer.base import Completion, CopyOp, Outcome

__all__ = ["ThreadedBackend"]

log = logging.getLogger("kvstrata.transfer")


class _Work(NamedTuple):
    transfer: TransferId
    ops: Sequence[CopyOp]
    source: Any
    target: Any


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
        self._queue: queue.Queue[_Work | None] = queue.Queue(queue_transfers_max)
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self._waiting: set[TransferId] = set()
        self._cancelled: set[TransferId] = set()
        self._lock = threading.Lock()
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
        if self._closed:
            return False
        with self._lock:
            assert transfer not in self._waiting, f"{transfer=} is already under way"
            self._waiting.add(transfer)
        try:
            self._queue.put_nowait(_Work(transfer, ops, source, target))
        except queue.Full:
            with self._lock:
                self._waiting.discard(transfer)
            return False
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
        if self._closed:
            return
        self._closed = True
        with self._lock:
            self._cancelled |= self._waiting
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        # A signal taken by this thread would not wake the owner's poll, which has to act on it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        while (work := self._queue.get()) is not None:
            completion = self._carry_out(work)
            with self._lock:
                self._waiting.discard(work.transfer)
                self._cancelled.discard(work.transfer)
            self._done.put(completion)
            self._notify()

    def _carry_out(self, work: _Work) -> Completion:
        failed: list[int] = []
        reason = ""
        for index, op in enumerate(work.ops):
            if work.transfer in self._cancelled:
                every = tuple(range(len(work.ops)))
                return Completion(work.transfer, Outcome.CANCELLED, every, "cancelled")
            try:
                self.move(op, work.source, work.target)
            except (OSError, TransferError) as error:
                failed.append(index)
                reason = reason or str(error)
            except Exception as error:  # a dead worker would never complete: say so and go on
                log.exception("%s backend failed unexpectedly", self.name)
                failed.append(index)
                reason = reason or f"{type(error).__name__}: {error}"
        outcome = Outcome.FAILED if failed else Outcome.DONE
        return Completion(work.transfer, outcome, tuple(failed), reason)
