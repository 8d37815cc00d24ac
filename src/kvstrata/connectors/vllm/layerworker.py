"""The worker half for `loading: layerwise`, `saving: layerwise`: copies beside the forward pass."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from kvstrata.connectors.vllm.bridged import BridgedPages
from kvstrata.connectors.vllm.grouped import GroupedPages
from kvstrata.connectors.vllm.layerwise import LayerCopies, LayerHooks
from kvstrata.connectors.vllm.metadata import SaveJob, StepPlan
from kvstrata.connectors.vllm.settings import ConnectorSettings
from kvstrata.connectors.vllm.states import StatePages
from kvstrata.connectors.vllm.worker import WorkerHalf
from kvstrata.layout import BlockLayout, GroupedCache
from kvstrata.storage.arena import Arena

__all__ = ["LayerwiseWorker"]


class LayerwiseWorker(WorkerHalf):
    """Owner: the engine's model runner thread; what copies beside it has ended with each step."""

    def __init__(
        self, cache: GroupedCache, layout: BlockLayout, settings: ConnectorSettings
    ) -> None:
        """Remember the geometry that the caches must have, and what moves layer by layer."""
        super().__init__(cache, layout)
        self._settings = settings
        self._names: list[str] = []  # of the only group's layers
        self._hooks = LayerHooks(())
        self._copies: LayerCopies | None = None
        self._same_step: set[str] = set()  # requests of loads that are no news to vLLM
        self._by_layers: list[SaveJob] = []  # saved, all layers of them

    def register(
        self,
        caches: dict[str, torch.Tensor],
        layer_names: list[list[str]],
        rank: int,
        stage: int = 0,
    ) -> None:
        """Take the caches of the only group; raises LayoutError unless they are as expected."""
        super().register(caches, layer_names, rank, stage)
        (self._names,) = layer_names
        if self._settings.loading == "layerwise":
            self._hooks = LayerHooks(self._names)

    def load(self, plan: StepPlan) -> None:
        """Fill the pages of loads in `plan`, or begin to where its step computes on them."""
        within = [job for job in plan.loads if job.same_step]
        super().load(replace(plan, loads=[job for job in plan.loads if not job.same_step]))
        self._same_step = {job.request for job in within}
        begun = []
        for job in within:
            if self._copies and self._fits(job):
                begun.append(job)
            else:  # nobody to wait for in the pass
                self._loaded(job, job.copy.pages, 0.0)
        if self._copies:
            self._copies.begin_loads(begun)

    def wait_for(self, layer: str) -> None:
        """Return once the step's loads have filled the pages of `layer`, or failed to in time."""
        self._hooks.asked(layer)
        if self._copies:
            self._copies.wait_for(layer)

    def computed(self, plan: StepPlan, layer: str) -> None:
        """Begin to save `layer`, all of which this step has computed now."""
        # A plan that is saved has been reported: its slots may be sealed.
        if not plan.saves or plan is self._saved or self._settings.saving != "layerwise":
            return
        self._follow(plan)
        # What needs more than its epoch to be right is saved whole, behind the step.
        jobs = [job for job in plan.saves if job.epoch == self._epoch and not job.adapter]
        if self._copies:
            self._copies.computed(plan.step, jobs, layer)

    def save(self, plan: StepPlan) -> None:
        """Fill the slots of every save in `plan`, the first time that it comes."""
        if plan is self._saved:
            return
        began = time.perf_counter()
        if self._copies:
            self._end_loads(self._copies)
            began = time.perf_counter()
            self._by_layers = self._copies.end_saves()
        waited_s = time.perf_counter() - began
        super().save(plan)
        self._by_layers = []
        self._report.asks_layers |= bool(plan.step) and self._hooks.step_ended()
        if plan.saves:
            self._report.saved_s += waited_s

    def take_loaded(self) -> set[str]:
        """Return the requests that waited for a load which ended in this step."""
        return super().take_loaded() - self._same_step

    def close(self) -> None:
        """End every copy; unmap the arena."""
        if self._copies:
            self._copies.close()
            self._copies = None
        super().close()

    # -- private -------------------------------------------------------------------------------

    def _copier(self, arena: Arena, held: BlockLayout) -> GroupedPages | BridgedPages | StatePages:
        blocks = super()._copier(arena, held)
        if isinstance(blocks, GroupedPages):
            ordered = [self._names[run.place] for run in self._cache.runs(held.block_tokens)]
            self._copies = LayerCopies(
                dict(zip(ordered, blocks.layers(0), strict=True)),
                arena.generations,
                self._settings.layer_timeout_s,
            )
        return blocks

    def _end_loads(self, copies: LayerCopies) -> None:
        ended, took_s = copies.end_loads()
        pages = sum(len(job.copy.pages) for job, _ in ended)
        for job, failed in ended:
            self._loaded(job, failed, took_s * len(job.copy.pages) / max(pages, 1))

    def _save(self, job: SaveJob) -> bool:
        if any(job is each for each in self._by_layers):
            return self._fits(job)
        return super()._save(job)
