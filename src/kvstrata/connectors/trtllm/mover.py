"""Copies between the engine's pages and the arena, in a thread of their own or within the step.

Threads: the engine's calls `submit` and `cancel`; one thread of ours, `kvstrata-trtllm`, copies.
The queue has at most `SAVES_QUEUED_MAX` saves: what comes on top is given up and counted by the
scheduler half. Loads are as many as the engine has put requests aside for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import nullcontext
from typing import Any, Final

import torch

from kvstrata.connectors.trtllm.desk import Desk, MappedArena
from kvstrata.connectors.trtllm.jobs import LoadJob, PageCopy, Report, SaveJob
from kvstrata.connectors.trtllm.pages import EnginePages
from kvstrata.core.errors import TransferError

__all__ = ["SAVES_QUEUED_MAX", "Mover"]

log = logging.getLogger("kvstrata.trtllm")

SAVES_QUEUED_MAX: Final = 256
"""Saves that wait for the thread; one is the new blocks of one request in one step."""
_JOB_TIMEOUT_S: Final = 30.0


class Mover:
    """Carries out the jobs of one engine."""

    def __init__(self, desk: Desk, pages: EnginePages, *, background: bool) -> None:
        """Copy in a thread if `background`, else in the caller's."""
        self._desk = desk
        self._pages = pages
        self._loads: deque[tuple[LoadJob, Any]] = deque()
        self._saves: deque[tuple[SaveJob, Any]] = deque()
        self._running: LoadJob | SaveJob | None = None
        self._stopping = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._run, name="kvstrata-trtllm", daemon=True)
            self._thread.start()

    def submit(self, job: LoadJob | SaveJob, after: Any) -> None:
        """Carry out a job that is open at the desk, once the CUDA event `after` has come to pass.

        A load that the engine waits for within its step is carried out before this returns.
        """
        inline = self._thread is None or (isinstance(job, LoadJob) and not job.background)
        if inline:
            self._carry_out(job)
            return
        with self._changed:
            if isinstance(job, LoadJob):
                self._loads.append((job, after))
            elif len(self._saves) < SAVES_QUEUED_MAX and not self._stopping:
                self._saves.append((job, after))
            else:
                self._desk.report(Report(job.id, done=False))
            self._changed.notify_all()

    def cancel(self, request: int) -> None:
        """Give up the request's jobs; when this returns nobody writes to its pages.

        Raises TransferError if a copy under way does not end.
        """
        with self._changed:
            dropped = [job for job in self._waiting() if job.request == request]
            self._loads = deque(pair for pair in self._loads if pair[0].request != request)
            self._saves = deque(pair for pair in self._saves if pair[0].request != request)
            for job in dropped:
                self._desk.report(Report(job.id, done=False))
            if not self._changed.wait_for(lambda: not self._loads_for(request), _JOB_TIMEOUT_S):
                raise TransferError(
                    f"a load of request {request} did not end within {_JOB_TIMEOUT_S:g} s",
                    retryable=False,
                )

    def close(self) -> None:
        """End the thread; what waits is given up. Twice is harmless."""
        with self._changed:
            self._stopping = True
            waiting = self._waiting()
            self._loads.clear()
            self._saves.clear()
            self._changed.notify_all()
        for job in waiting:
            self._desk.report(Report(job.id, done=False))
        if self._thread:
            self._thread.join(_JOB_TIMEOUT_S)
            self._thread = None

    # -- private -------------------------------------------------------------------------------

    def _waiting(self) -> list[LoadJob | SaveJob]:
        return [*(job for job, _ in self._loads), *(job for job, _ in self._saves)]

    def _loads_for(self, request: int) -> bool:
        running = self._running
        return isinstance(running, LoadJob) and running.request == request

    def _run(self) -> None:
        stream = (
            torch.cuda.Stream(self._pages.device) if self._pages.device.type == "cuda" else None
        )
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._loads or self._saves or self._stopping)
                if self._stopping:
                    return
                queue: Any = self._loads or self._saves  # an engine's request waits for a load
                job, after = queue.popleft()
                self._running = job
            try:
                with torch.cuda.stream(stream) if stream else nullcontext():
                    if stream and after is not None:
                        stream.wait_event(after)
                    self._carry_out(job, stream)
            except BaseException as error:
                self._desk.break_off(f"the copying thread has ended: {error!r}")
                raise
            finally:
                with self._changed:
                    self._running = None
                    self._changed.notify_all()

    def _carry_out(self, job: LoadJob | SaveJob, stream: Any = None) -> None:
        """Copy and report; whatever goes wrong is a report too."""
        began = time.perf_counter()
        size, done = 0, False
        try:
            if isinstance(job, LoadJob):
                done = self._load(job)
                size = len(job.copy.slots) * self._pages.page_bytes
            else:
                done = self._save(job)
            if stream is not None:
                stream.synchronize()
        except (RuntimeError, IndexError, ValueError) as error:
            done = False
            log.warning("kvstrata could not copy: %s", error)
        if isinstance(job, LoadJob) and not done:
            self._desk.break_off(f"a promised load of request {job.request} failed")
        self._desk.report(Report(job.id, done, size, time.perf_counter() - began))

    def _load(self, job: LoadJob) -> bool:
        """Fill the pages, unless a slot was not, or is no longer, what was promised."""
        mapped = self._desk.mapped(job.epoch)
        if mapped is None:
            return False
        promised = list(zip(job.copy.slots, job.generations, strict=True))
        generations = mapped.arena.generations
        if any(generations[slot] != wanted for slot, wanted in promised):
            return False
        rows = mapped.blocks[torch.tensor(job.copy.slots), torch.tensor(job.copy.places)]
        if any(generations[slot] != wanted for slot, wanted in promised):
            return False
        for region, pages, columns in self._regions(job.copy):
            region[pages] = rows[:, columns].to(region.device)
        return True

    def _save(self, job: SaveJob) -> bool:
        mapped: MappedArena | None = self._desk.mapped(job.epoch)
        if mapped is None:
            return False
        slots, places = torch.tensor(job.copy.slots), torch.tensor(job.copy.places)
        for region, pages, columns in self._regions(job.copy):
            mapped.blocks[slots, places, columns] = region[pages].cpu()
        return True

    def _regions(self, copy: PageCopy) -> list[tuple[torch.Tensor, torch.Tensor, slice]]:
        """Return each region, its pages, and which bytes of a stored page are its own."""
        found, start = [], 0
        for region in self._pages.regions:
            size = int(region.rows.shape[1])
            pages = copy.pages[region.group]
            # A negative index would be taken from the end: a page of somebody else.
            if pages and not 0 <= min(pages) <= max(pages) < region.rows.shape[0]:
                raise IndexError(f"a page of {pages} does not exist")
            index = torch.tensor(pages, device=region.rows.device)
            found.append((region.rows, index, slice(start, start + size)))
            start += size
        return found
