"""The linker's two threads: one loads leased pages layer by layer, one saves pages.

The engine's forward pass waits for each layer of the counter. A layer counts only if no slot has
changed while it was copied; else the whole batch fails, and SGLang drops its requests' output.

Saves are never refused, they fail: SGLang pairs the results of its ranks by their order, so every
rank must have one for each node.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from kvstrata.connectors.sglang.devicepages import DevicePages
from kvstrata.connectors.sglang.kept import KeptPages
from kvstrata.connectors.sglang.leases import Lease, Leases
from kvstrata.core.errors import DaemonError
from kvstrata.core.ids import LineageDigest

__all__ = ["LayerCounter", "LayerLoads", "NodeSave", "NodeSaves"]

log = logging.getLogger("kvstrata.sglang")

_BATCHES_MAX: Final = 8  # SGLang waits for each batch's load before it begins another one
_NODES_MAX: Final = 256


class LayerCounter(Protocol):
    """What SGLang's forward pass waits on."""

    def complete(self, index: int, layer: int) -> None:
        """A layer of batch `index` is there."""

    def fail(self, index: int, error: BaseException) -> None:
        """The layers of batch `index` that are not there will never be."""


class LayerLoads:
    """Loads batches of leases, one after the other."""

    def __init__(self, leases: Leases, pages: DevicePages, counter: LayerCounter) -> None:
        self._leases, self._pages, self._counter = leases, pages, counter
        self._batches: queue.Queue[tuple[int, list[Lease]] | None] = queue.Queue(_BATCHES_MAX)
        self._thread = threading.Thread(target=self._run, name="kvstrata-load", daemon=True)
        self._thread.start()
        self.loaded = 0
        self.torn = 0

    def begin(self, index: int, batch: Sequence[Lease]) -> None:
        """Load a batch under the counter's `index`; waits for a place behind copies only."""
        self._batches.put((index, list(batch)))

    def settle(self) -> None:
        """Return once nothing is being loaded: every copy is of bounded length."""
        self._batches.join()

    def close(self) -> None:
        """End the thread behind what was begun."""
        self._batches.put(None)
        self._thread.join()

    # -- private -------------------------------------------------------------------------------

    def _run(self) -> None:
        while (task := self._batches.get()) is not None:
            index, batch = task
            try:
                self._load(index, batch)
            except BaseException as error:  # noqa: BLE001  # the forward pass waits for a word
                self._fail(index, error)
            try:
                self._leases.end(batch)
            except BaseException:  # the thread must live: SGLang waits for its later batches
                log.exception("kvstrata could not give slots back")
            finally:
                self._batches.task_done()
        self._batches.task_done()

    def _fail(self, index: int, error: BaseException) -> None:
        """Give the forward pass its word first; nothing that goes wrong here ends the thread."""
        try:
            self._counter.fail(index, error)
            log.warning("kvstrata's load failed, SGLang drops its requests: %s", error)
        except BaseException:
            log.exception("kvstrata could not tell SGLang that a load failed")

    def _load(self, index: int, batch: list[Lease]) -> None:
        bridged = any(lease.mapped.bridge for lease in batch)
        if bridged:  # blocks in another layout are re-arranged whole
            for lease in batch:
                lease.copy(self._pages)
        for layer in range(self._pages.layers):
            for lease in () if bridged else batch:
                for slot, page in zip(lease.slots, lease.pages, strict=True):
                    self._pages.write_layer(layer, page, lease.mapped.blocks[slot])
            if not all(lease.intact() for lease in batch):
                self.torn += 1
                raise DaemonError("a slot was given to another block while it was loaded")
            self._counter.complete(index, layer)
        self.loaded += sum(len(lease.pages) for lease in batch)


@dataclass(frozen=True, slots=True)
class NodeSave:
    """Pages of one node of SGLang's tree, which keeps them in place until the save ends."""

    digests: list[LineageDigest]
    """Their digests."""
    pages: list[int]
    """The page of the device that each one is."""
    ready: Sequence[Any]
    """Events of the device behind which the pages are whole."""


@dataclass(slots=True)
class _Result:
    kept: bool | None = None  # None until the save has ended; written once


class NodeSaves:
    """Saves nodes, one after the other; each has a result, in the order in which they came.

    One thread begins and pops. As many results can wait as the device has pages: SGLang keeps a
    node in place until it has popped its result.
    """

    def __init__(self, kept: KeptPages, pages: DevicePages, usable: Callable[[], bool]) -> None:
        """`usable` tells whether pages are still those of the weights at hand."""
        self._kept, self._pages, self._usable = kept, pages, usable
        self._nodes: queue.Queue[tuple[NodeSave, _Result] | None] = queue.Queue(_NODES_MAX)
        self._stopping = False
        self._results: deque[_Result] = deque()
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="kvstrata-save", daemon=True)
        self._thread.start()

    def begin(self, node: NodeSave | None) -> None:
        """Save a node; None, and a node for which too many others wait, has failed in its turn."""
        self._results.append(result := _Result())
        if node is not None:
            try:
                self._nodes.put_nowait((node, result))
            except queue.Full:
                pass
            else:
                return
        self.dropped += 1
        result.kept = False

    def ended(self) -> int:
        """Return how many saves have ended and were not popped; none behind one that runs."""
        ended = itertools.takewhile(lambda result: result.kept is not None, self._results)
        return sum(1 for _ in ended)

    def pop(self) -> bool:
        """Return whether the oldest save, which has ended, has kept every page."""
        kept = self._results.popleft().kept
        assert kept is not None, "only what has ended is popped"
        return kept

    def settle(self) -> None:
        """Return once nothing is being saved; what waits is dropped, and every result with it."""
        self._stopping = True
        try:
            self._nodes.join()
        finally:
            self._stopping = False
        self._results.clear()

    def close(self) -> None:
        """End the thread; what waits is dropped."""
        self.settle()
        self._nodes.put(None)
        self._thread.join()

    # -- private -------------------------------------------------------------------------------

    def _run(self) -> None:
        while (task := self._nodes.get()) is not None:
            (node, result), kept = task, False
            try:
                kept = self._save(node)
            except BaseException:  # the thread must live: SGLang keeps the node's pages till then
                log.exception("kvstrata could not save pages")
            finally:
                result.kept = kept
                self._nodes.task_done()
        self._nodes.task_done()

    def _save(self, node: NodeSave) -> bool:
        if self._stopping or not self._usable():
            self.dropped += 1
            return False
        for event in node.ready:
            event.synchronize()
        # SGLang names no page before the first of a node.
        return all(self._kept.save(node.digests, None, self._pages, node.pages))
