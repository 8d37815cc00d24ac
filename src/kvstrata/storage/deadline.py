"""Calls of somebody else's code that end in time, whatever that code does.

Concurrency: each call runs on a thread `kvstrata-<name>-<n>` of ours that lends it a buffer. One
that is late is left behind with its buffer: its caller gets an error, and the thread serves again
if the call ever ends. At most `threads_max` threads exist; if all of them are held, calls are
refused at once. One lock guards the list of idle threads. `close` joins for a bounded time; what
hangs then ends with the process.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

__all__ = ["Helper", "HelperThreads", "LateError"]

T = TypeVar("T")

_CLOSE_S: Final = 1.0


class LateError(Exception):
    """A call did not end in time, or could not begin because too many others have not."""


class _GivenUpError(LateError):
    """The thread is still busy, and comes back by itself."""


class Helper:
    """One thread and its buffer; used by one caller at a time."""

    def __init__(self, name: str, back: Callable[[Helper], None]) -> None:
        """Start it; `back` is called from it when a call that was given up has ended."""
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._back = back
        self._room = bytearray()
        self._lock = threading.Lock()
        self._lost = False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def room(self, length: int) -> memoryview:
        """Return a buffer of `length` bytes, which nobody else reads or writes meanwhile."""
        if len(self._room) < length:
            self._room = bytearray(length)
        return memoryview(self._room)[:length]

    def call(self, function: Callable[[], T], timeout_s: float) -> T:
        """Return what `function` returns, raise what it raises; LateError after `timeout_s`."""
        answers: list[T] = []
        errors: list[BaseException] = []
        ended = threading.Event()

        def work() -> None:
            try:
                answers.append(function())
            except BaseException as error:  # noqa: BLE001  # SystemExit must not end our thread
                errors.append(error)
            finally:
                ended.set()

        self._work.put(work)
        if not ended.wait(timeout_s):
            with self._lock:
                self._lost = lost = not ended.is_set()
            if lost:
                raise _GivenUpError(f"no answer within {timeout_s:g} s")
        if errors:
            raise errors[0]
        return answers[0]

    def stop(self) -> None:
        """Let the thread end after what it does."""
        self._work.put(None)

    def _run(self) -> None:
        # A signal taken by this thread would not wake the owner's poll, which has to act on it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        while (work := self._work.get()) is not None:
            work()
            del work  # it holds what the call was given
            with self._lock:
                lost, self._lost = self._lost, False
            if lost:
                self._back(self)


class HelperThreads:
    """The threads of one store."""

    def __init__(self, name: str, threads_max: int = 64) -> None:
        """Start none yet: each is started when it is first needed."""
        self._name, self._threads_max = name, threads_max
        self._lock = threading.Lock()
        self._idle: list[Helper] = []
        self._all: list[Helper] = []
        self._closed = False

    @contextmanager
    def one(self) -> Iterator[Helper]:
        """Lend a thread; raises LateError if all are held or this is closed."""
        helper = self._take()
        try:
            yield helper
        except _GivenUpError:
            raise
        except BaseException:
            self._give_back(helper)
            raise
        else:
            self._give_back(helper)

    def close(self) -> None:
        """End the idle threads, and each other one when its call ends; twice is harmless."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for helper in idle:
            helper.stop()
        until_s = time.monotonic() + _CLOSE_S
        for helper in idle:
            helper.thread.join(max(0.0, until_s - time.monotonic()))

    def _take(self) -> Helper:
        with self._lock:
            if self._closed:
                raise LateError("closed")
            if self._idle:
                return self._idle.pop()
            if len(self._all) >= self._threads_max:
                raise LateError(f"{len(self._all)} calls have not ended; no more are begun")
            helper = Helper(f"kvstrata-{self._name}-{len(self._all)}", self._give_back)
            self._all.append(helper)
            return helper

    def _give_back(self, helper: Helper) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(helper)
                return
        helper.stop()
