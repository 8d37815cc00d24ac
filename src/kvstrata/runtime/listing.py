"""Finds out, in the background, what a keyed tier held before the daemon started.

Concurrency: a few threads `kvstrata-list-<tier>-<n>` take turns at the listing, under one lock, and
read the headers of what they got. Batches go through a bounded queue that the daemon's thread
polls, so a store that is faster than the brain waits. `close` asks them to stop and joins for a
bounded time.
"""

from __future__ import annotations

import logging
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

from kvstrata.core.errors import TransferError
from kvstrata.core.ids import SequenceHash
from kvstrata.core.tier import TierName
from kvstrata.manager.lineage import Found
from kvstrata.storage.envelope import Envelope, decode_envelope
from kvstrata.storage.keyed import KeyedEntry, KeyedStore
from kvstrata.transfer.base import Lineage

__all__ = ["BATCH_KEYS", "Listing"]

log = logging.getLogger("kvstrata.runtime")

BATCH_KEYS: Final = 64
"""Blocks in one batch."""
_BATCHES_MAX: Final = 16
_READERS: Final = 8
_CLOSE_S: Final = 2.0


class Listing:
    """One listing of one store, under way or ended."""

    def __init__(
        self, name: TierName, store: KeyedStore, blocks_max: int, notify: Callable[[], None]
    ) -> None:
        """Start it; `notify` is called from its thread when there is news.

        It ends after `blocks_max` blocks: the tier has room for no more.
        """
        self._name, self._store, self._blocks_max = name, store, blocks_max
        self._notify = notify
        self._batches: queue.Queue[list[Found]] = queue.Queue(_BATCHES_MAX)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._entries: Iterator[KeyedEntry] | None = None
        self._left = _READERS
        self.error = ""
        """Why it ended early, for people; empty if it did not."""
        self._threads = [
            threading.Thread(target=self._run, name=f"kvstrata-list-{name}-{index}", daemon=True)
            for index in range(_READERS)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def ended(self) -> bool:
        """Whether `poll` has returned all there is."""
        return not self._left and self._batches.empty()

    def poll(self) -> list[Found]:
        """Return the next batch; empty if there is none yet."""
        try:
            return self._batches.get_nowait()
        except queue.Empty:
            return []

    def close(self) -> None:
        """Stop it; twice is harmless."""
        self._stop.set()
        until_s = time.monotonic() + _CLOSE_S
        for thread in self._threads:  # one whose store hangs ends with the process
            thread.join(max(0.0, until_s - time.monotonic()))

    def _run(self) -> None:
        # A signal taken by this thread would not wake the owner's poll, which has to act on it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            while not self._stop.is_set() and (keys := self._next_keys()):
                if not self._put([self._look(key) for key in keys]):
                    return
        except (OSError, TransferError) as error:
            self._stop.set()
            self.error = str(error)
            log.warning("%s: listing ended early: %s", self._name, error)
        finally:
            with self._lock:
                self._left -= 1
            self._notify()

    def _next_keys(self) -> list[SequenceHash]:
        with self._lock:
            if self._entries is None:
                self._entries = islice(self._store.entries(), self._blocks_max)
            return [entry.key for entry in islice(self._entries, BATCH_KEYS)]

    def _look(self, key: SequenceHash) -> Found:
        try:
            header = None if self._stop.is_set() else self._store.peek(key)
        except (OSError, TransferError):
            header = None  # whoever reads the block meets it again
        said = None if header is None else decode_envelope(header)
        if not isinstance(said, Envelope) or said.key != key:
            return Found(key)
        return Found(key, Lineage(said.parent, said.namespace + said.tenant))

    def _put(self, found: list[Found]) -> bool:
        while not self._stop.is_set():
            try:
                self._batches.put(found, timeout=0.1)
            except queue.Full:
                continue
            self._notify()
            return True
        return False
