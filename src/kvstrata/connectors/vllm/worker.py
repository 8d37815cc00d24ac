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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvstrata.connectors.vllm.adapters import LoadedAdapters
from kvstrata.connectors.vllm.bridged import BridgedPages
from kvstrata.connectors.vllm.canary import fly_canary
from kvstrata.connectors.vllm.geometry import FP8_TENSORS
from kvstrata.connectors.vllm.grouped import GroupedPages
from kvstrata.connectors.vllm.metadata import LoadJob, SaveJob, StepPlan, StepReport
from kvstrata.connectors.vllm.stages import check_stage
from kvstrata.connectors.vllm.states import StatePages, state_view
from kvstrata.connectors.vllm.weights import WeightsWatch
from kvstrata.core.errors import KvstrataError, LayoutError
from kvstrata.layout import BlockLayout, Bridge, GroupedCache, PagedCache, page_view, rank_part
from kvstrata.storage.arena import Arena

__all__ = ["WorkerHalf", "pages_of"]

log = logging.getLogger("kvstrata.vllm")


class WorkerHalf:
    """Owner: the engine's model runner thread."""

    def __init__(self, cache: GroupedCache, layout: BlockLayout) -> None:
        """Remember the geometry that the caches must have."""
        self._cache = cache
        self._layout = layout
        self._rank = 0
        self._held = range(0)  # which of the model's layers
        self._pages: list[list[NDArray[np.uint8]]] = []  # of each group
        self._arena: Arena | None = None
        self._blocks: GroupedPages | BridgedPages | StatePages | None = None
        self._epoch = 0
        self._saved: StepPlan | None = None
        self._allowed = True  # by the weights, in this step
        self._report = StepReport()
        self._failed_pages: set[int] = set()
        self._failed_requests: set[str] = set()
        self.adapters = LoadedAdapters(None)
        self.weights: WeightsWatch | None = None

    def register(
        self,
        caches: dict[str, torch.Tensor],
        layer_names: list[list[str]],
        rank: int,
        stage: int = 0,
    ) -> None:
        """Take the caches of this rank and pipeline stage, `layer_names` for each group.

        Raises LayoutError unless each is exactly as expected.
        """
        if not 0 <= rank < self._cache.ranks:
            raise LayoutError(
                f"this worker has rank {rank} of {self._cache.ranks} that split the heads",
                hint="this engine is unknown to kvstrata; run without the connector",
            )
        self._rank = rank
        self._held = check_stage(self._cache, stage, (n for names in layer_names for n in names))
        known = {name for names in layer_names for name in names}
        if set(caches) != known:
            odd = sorted(set(caches) ^ known)[:3]
            raise LayoutError(
                f"the engine registered other layers than it configured, such as {odd}",
                hint="this engine's KV layout is unknown to kvstrata; run without the connector",
            )
        self._pages = [
            [
                state_view(group, name, caches[name])
                if group.state_bytes
                else self._taken(group.cache, name, caches[name])
                for name in names
            ]
            for group, names in zip(self._cache.groups, layer_names, strict=True)
        ]
        if len({len(pages) for layers in self._pages for pages in layers}) != 1:
            raise LayoutError(
                "layers have different numbers of pages",
                hint="this engine's KV layout is unknown to kvstrata; run without the connector",
            )
        self._try_copies([[caches[name] for name in names] for names in layer_names])

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
            self._loaded(job, failed, time.perf_counter() - began)

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

    def take_failed_requests(self) -> set[str]:
        """Return the requests, since the last call, of whose load nothing can be used."""
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    def take_report(self) -> StepReport | None:
        """Return what was done since the last call, None if nothing was."""
        report, self._report = self._report, StepReport()
        jobs = report.loaded or report.saved or report.unsaved
        told = jobs or report.step or report.adapters or report.weights or report.pids
        return report if told else None

    def close(self) -> None:
        """Unmap the arena."""
        self._blocks = None
        if self._arena:
            self._arena.close()
            self._arena = None

    # -- private -------------------------------------------------------------------------------

    def _follow(self, plan: StepPlan) -> None:
        """Map the arena of a new epoch; while there is no daemon the old data is still right."""
        self._report.step = plan.step
        if plan.arena is None or plan.layout is None or plan.epoch == self._epoch:
            return
        self.close()
        self._epoch = plan.epoch
        try:
            self._arena = Arena.attach(plan.arena, plan.layout)
            self._blocks = self._copier(self._arena, plan.layout)
        except KvstrataError as error:
            log.warning("kvstrata cannot map the daemon's arena: %s", error)

    def _taken(self, cache: PagedCache, name: str, tensor: torch.Tensor) -> Any:
        """Return one layer's pages, as `_copier` wants them."""
        return _view(cache, name, tensor)

    def _try_copies(self, tensors: list[list[torch.Tensor]]) -> None:
        """Copy made-up pages out and back; raises LayoutError if other bytes come."""
        fly_canary(self._cache, self._layout, tensors, self._plain_copier)

    def _plain_copier(self, arena: Arena) -> GroupedPages | StatePages:
        """Return what copies between the engine's pages and blocks of its own layout."""
        if self._cache.state_groups:
            return StatePages(self._cache, self._layout, self._pages, arena)
        return GroupedPages(self._cache, self._layout, self._pages, arena, self._rank, self._held)

    def _copier(self, arena: Arena, held: BlockLayout) -> GroupedPages | BridgedPages | StatePages:
        """Return what copies between the engine's pages and blocks of the layout `held`."""
        if self._cache.state_groups or held == self._layout:
            return self._plain_copier(arena)
        log.info("kvstrata re-arranges blocks of %s", held.describe())
        (group,), (layers,) = self._cache.groups, self._pages  # only such caches ask for a bridge
        pages = [layers[run.place] for run in self._cache.runs(self._layout.block_tokens)]
        return BridgedPages(
            Bridge(rank_part(self._layout, self._rank), held), arena, group.cache, pages
        )

    def _copied_bytes(self, job: LoadJob) -> int:
        pages = zip(self._cache.groups, self._pages, strict=True)
        sizes = [group.cache.page_bytes * len(layers) for group, layers in pages]
        return sum(sizes[group] for group in job.copy.groups)

    def _loaded(self, job: LoadJob, failed: Sequence[int], took_s: float) -> None:
        """Report a load of whose pages `failed` must not be used."""
        if not failed:
            self._report.copied_bytes += self._copied_bytes(job)
            self._report.copied_s += took_s
        # vLLM computes from the first failed page on, whatever lies behind it.
        good = min(map(job.copy.pages.index, failed), default=len(job.copy.pages))
        if self._cache.is_whole:
            self._failed_pages.update(job.lost_pages, failed)
            self._report.failed_pages.update(job.lost_pages, failed)
        elif job.lost_pages or failed:  # a shorter prefix would need other pages of a window
            self._failed_requests.add(job.request)
            good = 0
        self._report.loaded[job.request] = good

    def _fits(self, job: LoadJob | SaveJob) -> bool:
        """Return whether a job is of the arena, the weights and the adapter at hand."""
        if self._blocks is None or job.epoch != self._epoch:
            return False
        return self._allowed and self.adapters.current(job.adapter)

    def _load(self, job: LoadJob) -> Sequence[int]:
        """Copy; return the engine pages whose bytes must not be used."""
        copy = job.copy
        if not copy.pages:
            return []
        if self._blocks is None or self._arena is None or not self._fits(job):
            return copy.pages
        generations = self._arena.generations
        good = [
            generations[slot] == generation
            for slot, generation in zip(copy.slots, job.generations, strict=True)
        ]
        self._blocks.load(copy)
        return [
            page
            for page, slot, generation, was_good in zip(
                copy.pages, copy.slots, job.generations, good, strict=True
            )
            if not was_good or generations[slot] != generation
        ]

    def _save(self, job: SaveJob) -> bool:
        return self._blocks is not None and self._fits(job) and self._blocks.save(job.copy)


def _view(cache: PagedCache, name: str, tensor: torch.Tensor) -> NDArray[np.uint8]:
    """Return one layer as `[pages, page bytes]`, sharing the engine's memory."""
    if tensor.device.type != "cpu":
        raise LayoutError(
            f"layer {name!r} is on {tensor.device}; this version copies from CPU caches only",
            hint="run vLLM's CPU platform, or run without the connector",
        )
    pages, stride = pages_of(cache, name, tensor)
    flat = torch.tensor([], dtype=torch.uint8).set_(
        tensor.untyped_storage(),
        tensor.storage_offset() * tensor.element_size(),
        (pages, cache.page_bytes),
        (stride, 1),
    )
    view: NDArray[np.uint8] = flat.numpy()
    return view


def pages_of(cache: PagedCache, name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """Return (pages, bytes from one to the next) of one layer; LayoutError if it is unexpected."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    is_fp8 = cache.dtype.startswith("float8")
    expected = FP8_TENSORS if is_fp8 else cache.dtype
    if dtype != expected:
        raise LayoutError(
            f"layer {name!r} has elements of {dtype}, not {expected}",
            hint="this engine's KV layout is unknown to kvstrata; run without the connector",
        )
    return page_view(cache, tensor.shape, tensor.stride(), name=name)
