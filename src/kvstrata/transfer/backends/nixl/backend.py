"""The NIXL mover: memory and files of this process, and the memory of peers.

Concurrency: one thread, `kvstrata-nixl-0`, posts and watches every request (`driver.py`). The
owner submits and polls; at most `queue_transfers_max` transfers are accepted and not yet polled.
`close` joins the thread.

A transfer completes when NIXL says that its requests have ended, never before: until then bytes
may arrive. One that is past `timeout_s` gives up what NIXL has not been given, its peer gets no
new work, and its memory stays held; its completion comes late, or at `close`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from kvstrata.core.ids import TransferId
from kvstrata.transfer.backends.nixl.agent import NixlAgent
from kvstrata.transfer.backends.nixl.driver import Driver
from kvstrata.transfer.backends.nixl.work import plan_work
from kvstrata.transfer.base import Completion, CopyOp

__all__ = ["NixlBackend"]


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
        self._queue_max = queue_transfers_max
        self._notify = notify
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self._accepted: set[TransferId] = set()  # and not yet polled
        self._driver = Driver(
            self.agent, self._tell, timeout_s=timeout_s, close_timeout_s=close_timeout_s
        )
        self._closed = False
        self._thread = threading.Thread(
            target=self._driver.run, name="kvstrata-nixl-0", daemon=True
        )
        self._thread.start()

    def submit(self, transfer: TransferId, ops: Sequence[CopyOp], source: Any, target: Any) -> bool:
        """Queue the transfer, or return False if the queue is full or we are closed."""
        if self._closed or self._driver.stopped or len(self._accepted) >= self._queue_max:
            return False
        assert transfer not in self._accepted, f"{transfer=} is already under way"
        self._accepted.add(transfer)
        self._driver.inbox.put(plan_work(transfer, ops, source, target))
        return True

    def poll(self) -> list[Completion]:
        """Return what completed since the last call."""
        completions = []
        while not self._done.empty():
            completion = self._done.get()
            self._accepted.discard(completion.transfer)
            self._driver.cancelled.discard(completion.transfer)
            completions.append(completion)
        return completions

    def cancel(self, transfer: TransferId) -> None:
        """Skip what NIXL has not been given of `transfer`."""
        if transfer in self._accepted:
            self._driver.cancelled.add(transfer)

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
        self._driver.inbox.put(None)
        self._thread.join()
        self.agent.close(timeout_s=0)

    def _tell(self, completion: Completion) -> None:
        self._done.put(completion)
        self._notify()
