"""Copies layer by layer beside the forward pass; the worker half's part of `loading`, `saving`.

    engine's thread   begin | layer 0: wait, attend, saved? | layer 1: wait, attend ... | end: join
    copies' thread          | load 0 | load 1 | load 2 ...  | save 0 | save 1 ...       |

The engine's thread owns everything here; the one thread of copies runs what it is given, in that
order, at most two copies a layer and step. Every copy has ended when a step ends: vLLM may give the
pages to another request then. What a pass has read of a load that failed is known only at the end,
so its pages are reported as failed, and vLLM drops what the step has computed on them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstrata.connectors.vllm.metadata import LoadJob, SaveJob

__all__ = ["LayerCopies", "LayerHooks", "LayerViews"]

log = logging.getLogger("kvstrata.vllm")

_PIECE_BYTES: Final = 4 << 20  # what a load that is given up still copies

LayerViews = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""One layer's pages, `[pages, page bytes]`, and slots, `[slots, pages of a block, page bytes]`."""

_Indices = NDArray[np.intp]


class LayerHooks:
    """Learns whether the engine asks for each layer, and says so once."""

    def __init__(self, layers: Iterable[str]) -> None:
        self._missing: set[str] | None = set(layers)

    def asked(self, layer: str) -> None:
        """The engine's pass waits for a layer."""
        if self._missing:
            self._missing.discard(layer)

    def step_ended(self) -> bool:
        """Return, after the first step that computes, whether it asked for every layer."""
        if self._missing is None:
            return False
        missing, self._missing = self._missing, None
        if missing:
            log.warning(
                "this engine computes without asking for layer %r; kvstrata loads between steps",
                min(missing),
            )
        return not missing


@dataclass(frozen=True, slots=True)
class _Rows:
    """One row a page, of all jobs of a step."""

    pages: _Indices
    slots: _Indices
    places: _Indices

    @classmethod
    def of(cls, jobs: Sequence[LoadJob] | Sequence[SaveJob]) -> _Rows:
        return cls(
            np.array([page for job in jobs for page in job.copy.pages], np.intp),
            np.array([slot for job in jobs for slot in job.copy.slots], np.intp),
            np.array([place for job in jobs for place in job.copy.places], np.intp),
        )


class LayerCopies:
    """Owner: the engine's model runner thread; it has one thread of its own, which copies."""

    def __init__(
        self,
        layers: Mapping[str, LayerViews],
        generations: memoryview,
        timeout_s: float,
    ) -> None:
        """Copy between `layers`, in their order; a pass waits `timeout_s` for a step's loads."""
        self._layers = dict(layers)
        self._generations = generations
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kvstrata-layers")
        self._given_up = threading.Event()
        self._deadline_s = 0.0
        self._busy_s = 0.0  # written by the thread of copies, read when it has ended
        self._jobs: list[LoadJob] = []
        self._good: list[list[bool]] = []
        self._loads: dict[str, Future[None]] = {}
        self._asked: set[str] = set()
        self._step = -1
        self._save_jobs: list[SaveJob] = []
        self._save_rows: _Rows | None = None
        self._saves: dict[str, Future[None]] = {}
        self._twice = False

    # -- loads ---------------------------------------------------------------------------------

    def begin_loads(self, jobs: Sequence[LoadJob]) -> None:
        """Start to fill the pages of `jobs`, which this step's pass will read."""
        assert not self._jobs, "the loads of the step before have not ended"
        if not jobs:
            return
        self._jobs = list(jobs)
        self._good = [self._intact(job) for job in jobs]
        self._given_up.clear()
        self._asked.clear()
        self._busy_s = 0.0
        self._deadline_s = time.monotonic() + self._timeout_s
        rows = _Rows.of(jobs)
        self._loads = {
            name: self._pool.submit(self._load_layer, name, rows) for name in self._layers
        }

    def wait_for(self, layer: str) -> None:
        """Return once `layer` is there, or has failed, or the deadline of the step has passed."""
        if not self._jobs or self._given_up.is_set():
            return
        self._asked.add(layer)
        load = self._loads.get(layer)
        # A layer that keeps nothing of its own reads another one's pages: which, we do not know.
        needed = list(self._loads.values()) if load is None else [load]
        left_s = max(0.0, self._deadline_s - time.monotonic())
        if wait(needed, left_s).not_done:
            self._given_up.set()
            log.warning("a load took more than %s s; vLLM computes its tokens", self._timeout_s)

    def end_loads(self) -> tuple[list[tuple[LoadJob, Sequence[int]]], float]:
        """Return each load with the pages that must not be used, and the processor's time for all.

        Nothing is being copied into the engine's pages any more when this returns.
        """
        jobs, self._jobs = self._jobs, []
        if not jobs:
            return [], 0.0
        if not self._asked.issuperset(self._layers):
            self._given_up.set()  # the pass has read a layer before it was there, or not ended
        for load in self._loads.values():
            if self._given_up.is_set():
                load.cancel()
        wait(self._loads.values())
        failed = self._given_up.is_set() or not _succeeded(self._loads.values())
        self._loads = {}
        return [
            (job, job.copy.pages if failed else self._torn(job, good))
            for job, good in zip(jobs, self._good, strict=True)
        ], self._busy_s

    # -- saves ---------------------------------------------------------------------------------

    def computed(self, step: int, jobs: Sequence[SaveJob], layer: str) -> None:
        """Start to save `layer`, which this step's pass has computed, for the step's `jobs`.

        Slots that are filled here are not found before they are sealed: whether they may be is
        decided when the step has ended.
        """
        if not jobs or layer not in self._layers:
            return
        if step != self._step:
            self.end_saves()
            self._step, self._save_jobs = step, list(jobs)
            self._save_rows, self._twice = _Rows.of(jobs), False
        if layer in self._saves:
            self._twice = True  # computed in parts: the first copy may have come too early
            return
        assert self._save_rows is not None
        self._saves[layer] = self._pool.submit(self._save_layer, layer, self._save_rows)

    def end_saves(self) -> list[SaveJob]:
        """Return the jobs of which every layer was saved; no copy is under way any more."""
        saves, self._saves = self._saves, {}
        jobs, self._save_jobs = self._save_jobs, []
        self._step, self._save_rows = -1, None
        wait(saves.values())
        whole = len(saves) == len(self._layers) and not self._twice and _succeeded(saves.values())
        return jobs if whole else []

    def close(self) -> None:
        """End every copy and the thread."""
        self._given_up.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    # -- private -------------------------------------------------------------------------------

    def _intact(self, job: LoadJob) -> list[bool]:
        now = self._generations
        promised = zip(job.copy.slots, job.generations, strict=True)
        return [now[slot] == generation for slot, generation in promised]

    def _torn(self, job: LoadJob, good: list[bool]) -> list[int]:
        """Return the pages whose slot was not what was promised before and behind the copies."""
        pages = zip(job.copy.pages, good, self._intact(job), strict=True)
        return [page for page, before, after in pages if not (before and after)]

    def _load_layer(self, name: str, rows: _Rows) -> None:
        # Of the processor: the pass keeps this thread waiting for cores and the interpreter, and by
        # the clock the cost model would take copies for slower than computing.
        began = time.thread_time()
        pages, slots = self._layers[name]
        size = max(1, _PIECE_BYTES // pages.shape[1])
        for start in range(0, len(rows.pages), size):
            if self._given_up.is_set():
                break
            piece = slice(start, start + size)
            pages[rows.pages[piece]] = slots[rows.slots[piece], rows.places[piece]]
        self._busy_s += time.thread_time() - began

    def _save_layer(self, name: str, rows: _Rows) -> None:
        pages, slots = self._layers[name]
        slots[rows.slots, rows.places] = pages[rows.pages]


def _succeeded(copies: Iterable[Future[None]]) -> bool:
    """Return whether all of these copies, which have ended, did so well."""
    errors = [error for copy in copies if not copy.cancelled() and (error := copy.exception())]
    if errors:
        log.warning("kvstrata could not copy a layer: %s", errors[0])
    return not errors
