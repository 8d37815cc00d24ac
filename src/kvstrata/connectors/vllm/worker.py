"""The worker half: copies between the engine's pages and the daemon's arena.

It makes no calls: the plan of each step says everything. A load is believed only if each slot
has the promised generation before and after its copy; else its pages are reported as failed and
vLLM computes them.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvstrata.connectors.vllm.adapters import LoadedAdapters
from kvstrata.connectors.vllm.metadata import LoadJob, PageCopy, SaveJob, StepPlan, StepReport
from kvstrata.connectors.vllm.weights import WeightsWatch
from kvstrata.core.errors import KvstrataError, LayoutError
from kvstrata.layout import BlockLayout, PagedCache, page_view
from kvstrata.storage.arena import Arena

__all__ = ["WorkerHalf"]

log = logging.getLogger("kvstrata.vllm")


class WorkerHalf:
    """Owner: the engine's model runner thread."""

    def __init__(self, cache: PagedCache, layout: BlockLayout) -> None:
        """Remember the geometry that the caches must have."""
        self._cache = cache
        self._layout = layout
        self._rank = 0
        self._pages: list[NDArray[np.uint8]] = []
        self._arena: Arena | None = None
        self._blocks: NDArray[np.uint8] | None = None
        self._epoch = 0
        self._saved: StepPlan | None = None
        self._allowed = True  # by the weights, in this step
        self._report = StepReport()
        self._failed_pages: set[int] = set()
        self.adapters = LoadedAdapters(None)
        self.weights: WeightsWatch | None = None

    def register(self, caches: dict[str, torch.Tensor], layer_names: list[str], rank: int) -> None:
        """Take the caches of this rank; raises LayoutError unless each is exactly as expected."""
        if not 0 <= rank < self._cache.ranks:
            raise LayoutError(
                f"this worker has rank {rank} of {self._cache.ranks} that split the heads",
                hint="this engine is unknown to kvstrata; run without the connector",
            )
        self._rank = rank
        if set(caches) != set(layer_names):
            odd = sorted(set(caches) ^ set(layer_names))[:3]
            raise LayoutError(
                f"the engine registered other layers than it configured, such as {odd}",
                hint="this engine's KV layout is unknown to kvstrata; run without the connector",
            )
        self._pages = [self._view(name, caches[name]) for name in layer_names]
        if len({len(pages) for pages in self._pages}) != 1:
            raise LayoutError(
                "layers have different numbers of pages",
                hint="this engine's KV layout is unknown to kvstrata; run without the connector",
            )

    def load(self, plan: StepPlan) -> None:
        """Fill the pages of every load in `plan`."""
        self._follow(plan)
        if plan.introduce:
            self._report.pids = [os.getpid()]
        if self.weights:
            self._report.weights = max(self._report.weights, self.weights.check(plan))
        self._allowed = not self.weights or self.weights.allows(plan)
        for job in plan.loads:
            began = time.perf_counter()
            failed = self._load(job)
            if not failed:
                size = len(job.copy.pages) * self._cache.page_bytes * self._cache.layers
                self._report.copied_bytes += size
                self._report.copied_s += time.perf_counter() - began
            self._failed_pages.update(job.lost_pages, failed)
            self._report.failed_pages.update(job.lost_pages, failed)
            # vLLM computes from the first failed page on, whatever lies behind it.
            good = min(map(job.copy.pages.index, failed), default=len(job.copy.pages))
            self._report.loaded[job.request] = good

    def save(self, plan: StepPlan) -> None:
        """Fill the slots of every save in `plan`, the first time that it comes."""
        if plan is self._saved:
            return
        self._saved = plan
        self._follow(plan)
        self._report.adapters |= self.adapters.digests(plan.adapters)
        began = time.perf_counter()
        for job in plan.saves:
            (self._report.saved if self._save(job) else self._report.unsaved).append(job)
        if plan.saves:
            self._report.saved_s += time.perf_counter() - began

    def take_loaded(self) -> set[str]:
        """Return the requests whose load ended in this step."""
        return set(self._report.loaded)

    def take_failed_pages(self) -> set[int]:
        """Return the pages that could not be filled since the last call."""
        failed, self._failed_pages = self._failed_pages, set()
        return failed

    def take_report(self) -> StepReport | None:
        """Return what was done since the last call, None if nothing was."""
        report, self._report = self._report, StepReport()
        told = report.loaded or report.saved or report.unsaved or report.step or report.adapters
        return report if told else None

    def close(self) -> None:
        """Unmap the arena."""
        self._blocks = None
        if self._arena:
            self._arena.close()
            self._arena = None

    # -- private -------------------------------------------------------------------------------

    def _view(self, name: str, tensor: torch.Tensor) -> NDArray[np.uint8]:
        """Return one layer as `[pages, page bytes]`, sharing the engine's memory."""
        if tensor.device.type != "cpu":
            raise LayoutError(
                f"layer {name!r} is on {tensor.device}; this version copies from CPU caches only",
                hint="run vLLM's CPU platform, or run without the connector",
            )
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype != self._cache.dtype:
            raise LayoutError(
                f"layer {name!r} has elements of {dtype}, not {self._cache.dtype}",
                hint="this engine's KV layout is unknown to kvstrata; run without the connector",
            )
        pages, stride = page_view(self._cache, tensor.shape, tensor.stride(), name=name)
        flat = torch.tensor([], dtype=torch.uint8).set_(
            tensor.untyped_storage(),
            tensor.storage_offset() * tensor.element_size(),
            (pages, self._cache.page_bytes),
            (stride, 1),
        )
        view: NDArray[np.uint8] = flat.numpy()
        return view

    def _follow(self, plan: StepPlan) -> None:
        """Map the arena of a new epoch; while there is no daemon the old data is still right."""
        self._report.step = plan.step
        if plan.arena is None or plan.epoch == self._epoch:
            return
        self.close()
        self._epoch = plan.epoch
        try:
            self._arena = Arena.attach(plan.arena, self._layout)
        except KvstrataError as error:
            log.warning("kvstrata cannot map the daemon's arena: %s", error)
            return
        grid, cache = self._arena.grid, self._cache
        places = self._layout.block_tokens // cache.page_tokens
        self._blocks = np.ndarray(
            (grid.slots, cache.layers, places, cache.page_bytes),
            np.uint8,
            self._arena.region.view,
            grid.base_bytes + self._rank * (self._layout.block_bytes // cache.ranks),
            (grid.stride_bytes, places * cache.page_bytes, cache.page_bytes, 1),
        )

    def _load(self, job: LoadJob) -> Sequence[int]:
        """Copy; return the engine pages whose bytes must not be used."""
        copy = job.copy
        if not copy.pages:
            return []
        if self._blocks is None or self._arena is None or job.epoch != self._epoch:
            return copy.pages
        if not self._allowed or not self.adapters.current(job.adapter):
            return copy.pages
        generations = self._arena.generations
        good = [
            generations[slot] == generation
            for slot, generation in zip(copy.slots, job.generations, strict=True)
        ]
        for layer, pages in enumerate(self._pages):
            pages[copy.pages] = self._blocks[copy.slots, layer, copy.places]
        return [
            page
            for page, slot, generation, was_good in zip(
                copy.pages, copy.slots, job.generations, good, strict=True
            )
            if not was_good or generations[slot] != generation
        ]

    def _save(self, job: SaveJob) -> bool:
        if self._blocks is None or job.epoch != self._epoch:
            return False
        if not self._allowed or not self.adapters.current(job.adapter):
            return False
        copy: PageCopy = job.copy
        for layer, pages in enumerate(self._pages):
            self._blocks[copy.slots, layer, copy.places] = pages[copy.pages]
        return True
