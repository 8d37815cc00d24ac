"""The worker half where the engine's caches are on a GPU. Not yet run on one.

As on the CPU the plan of each step says everything. What differs: a copy is given to a stream of
its own and ends some steps later, which events tell when they are polled; the host never waits.

    load    begins after all that the engine's stream has; its request is scheduled once it ended
    save    begins after the step's forward pass; the engine's stream goes on once pages are read

A load is believed only if each slot has the promised generation before and after its copy, and the
weights are still the same. Until the arena is page-locked loads fail and nothing is saved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Final, cast

import torch

from kvstrata.connectors.vllm.devicepages import DeviceBlocks, DeviceLayer, copy_shape
from kvstrata.connectors.vllm.metadata import LoadJob, SaveJob, StepPlan
from kvstrata.connectors.vllm.settings import ConnectorSettings
from kvstrata.connectors.vllm.worker import WorkerHalf, pages_of
from kvstrata.core.errors import CapacityError, ConfigError, LayoutError
from kvstrata.layout import BlockLayout, GroupedCache, PagedCache
from kvstrata.storage.arena import Arena
from kvstrata.transfer.cuda.copier import Ticket
from kvstrata.transfer.cuda.platform import DevicePlatform
from kvstrata.transfer.cuda.survey import choose_all
from kvstrata.transfer.cuda.torchcuda import TorchCuda

__all__ = ["DeviceWorker", "worker_half"]

log = logging.getLogger("kvstrata.vllm")

_WITHOUT: Final = "run without the connector, or on vLLM's CPU platform"


def worker_half(
    cache: GroupedCache, layout: BlockLayout, settings: ConnectorSettings, kind: str, *, alone: bool
) -> WorkerHalf:
    """Return the worker half for devices of this kind; on a CPU that is `WorkerHalf` itself."""
    if kind != "cuda":
        return WorkerHalf(cache, layout)
    if settings.device_copier is None:
        raise ConfigError(
            "kvstrata's copies to and from a GPU have not been run on one yet",
            hint=f"set device_copier to auto to try them, or {_WITHOUT}",
        )
    if not alone:  # another connector may spoil a step whose saves end only in a later one
        raise ConfigError(
            "connectors: on a GPU kvstrata does not work beside another connector yet",
            hint=f"name KvstrataConnector alone, or {_WITHOUT}",
        )
    return DeviceWorker(cache, layout, settings.device_copier, TorchCuda)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A job whose copy is under way."""

    job: LoadJob | SaveJob
    """What it is for."""
    blocks: DeviceBlocks
    """Whose copy it is; its arena stays until this has ended."""
    ticket: Ticket
    """Tells its end."""
    began: float
    """When it was given to the device."""
    good: list[bool]
    """For each page of a load whether its slot had the promised generation before."""


class DeviceWorker(WorkerHalf):
    """Owner: the engine's model runner thread. One rank only: ranks would end in unlike steps."""

    def __init__(
        self,
        cache: GroupedCache,
        layout: BlockLayout,
        copier: str,
        platform: Callable[[], DevicePlatform],
    ) -> None:
        """Remember; `platform` is made when the caches come, since vLLM sets its device later.

        Raises LayoutError for several workers and for models with states.
        """
        super().__init__(cache, layout)
        workers = cache.ranks * max(1, len(cache.stages))
        if workers != 1:
            raise LayoutError(
                f"{workers} workers: on a GPU one worker is served so far",
                hint=f"set tensor_parallel_size and pipeline_parallel_size to 1, or {_WITHOUT}",
            )
        if cache.state_groups:
            raise LayoutError(
                "the model keeps states: on a GPU they are not served yet", hint=_WITHOUT
            )
        self._make_platform, self._copier_name = platform, copier
        self._platform: DevicePlatform | None = None
        self._chosen: dict[str, str] = {}  # direction -> copier
        self._flights: list[_Flight] = []
        self._retired: list[DeviceBlocks] = []

    def register(
        self,
        caches: dict[str, torch.Tensor],
        layer_names: list[list[str]],
        rank: int,
        stage: int = 0,
    ) -> None:
        """Take the caches, as on the CPU, and choose the copiers.

        Raises ConfigError where no copier works.
        """
        self._platform = self._make_platform()
        super().register(caches, layer_names, rank, stage)
        log.warning(
            "kvstrata's copies to and from a GPU have been tested without one only: they have not "
            "run on hardware yet; device_copier=torch takes the reference copy"
        )
        shape = copy_shape(self._cache)
        for choice in choose_all(self._platform, [shape], forced=self._copier_name):
            if choice.name is None:
                why = "; ".join(f"{each.name}: {each.why}" for each in choice.tries)
                raise ConfigError(
                    f"no device copier can be used {choice.direction}: {why}",
                    hint="; ".join(dict.fromkeys(each.remedy for each in choice.tries)),
                )
            log.info("kvstrata copies %s by %s", choice.direction, choice.reason)
            self._chosen[choice.direction] = choice.name

    def load(self, plan: StepPlan) -> None:
        """Begin every load in `plan`; those that end are reported by a later call of `save`."""
        super().load(replace(plan, loads=[]))
        for job in plan.loads:
            self._begin_load(job)

    def save(self, plan: StepPlan) -> None:
        """Take what has ended; begin every save in `plan`, the first time that it comes."""
        self._poll()
        if plan is self._saved:
            return
        super().save(replace(plan, saves=[]))
        self._saved = plan
        for job in plan.saves:
            self._begin_save(job)

    def close(self) -> None:
        """Give the arena and its lock back as soon as no copy uses them; never waits."""
        if blocks := self._device():
            self._retired.append(blocks)
        elif self._arena:
            self._arena.close()
        self._blocks = self._arena = None
        self._poll()

    # -- private -------------------------------------------------------------------------------

    def _taken(self, cache: PagedCache, name: str, tensor: torch.Tensor) -> DeviceLayer:
        assert self._platform, "it is made before"
        if tensor.device.type != self._platform.device_type:
            raise LayoutError(
                f"layer {name!r} is on {tensor.device}, not on {self._platform.device_type}",
                hint=f"this engine's caches are unknown to kvstrata; {_WITHOUT}",
            )
        pages, stride = pages_of(cache, name, tensor)
        return DeviceLayer(tensor, pages, stride, cache.page_bytes)

    def _try_copies(self, tensors: list[list[torch.Tensor]]) -> None:
        """Leave it to `choose_all`, which tries each copier on memory of its own."""

    def _copier(self, arena: Arena, held: BlockLayout) -> Any:
        if held != self._layout:
            raise LayoutError(
                f"the daemon holds blocks of {held.describe()}, which are not re-arranged on a GPU",
                hint="give this engine a daemon of its own, or start the daemon anew",
            )
        assert self._platform, "it is made before"
        return DeviceBlocks(
            self._platform, self._chosen, self._cache, held, self._pages, arena
        )  # fmt: skip

    def _begin_load(self, job: LoadJob) -> None:
        pages = job.copy.pages
        blocks = self._usable(job) if pages else None
        if blocks is None or self._arena is None:
            self._loaded(job, pages, 0.0)
            return
        good = self._current(job)
        try:
            ticket = blocks.load(job.copy)
        except CapacityError:  # nothing was given to the device: vLLM computes these pages
            self._loaded(job, pages, 0.0)
            return
        self._flights.append(_Flight(job, blocks, ticket, perf_counter(), good))

    def _begin_save(self, job: SaveJob) -> None:
        blocks = self._usable(job)
        if blocks is None:
            self._report.unsaved.append(job)
            return
        try:
            ticket = blocks.save(job.copy)
        except CapacityError:
            self._report.unsaved.append(job)
            return
        self._flights.append(_Flight(job, blocks, ticket, perf_counter(), []))

    def _usable(self, job: LoadJob | SaveJob) -> DeviceBlocks | None:
        """Return what copies for this job, None if its bytes must not be used or it cannot yet."""
        blocks = self._device()
        return blocks if blocks and self._fits(job) and blocks.is_ready else None

    def _device(self) -> DeviceBlocks | None:
        """Return what `_copier` has made, if it has."""
        blocks = cast("object", self._blocks)
        return blocks if isinstance(blocks, DeviceBlocks) else None

    def _current(self, job: LoadJob) -> list[bool]:
        assert self._arena, "who calls has looked"
        generations = self._arena.generations
        return [
            generations[slot] == generation
            for slot, generation in zip(job.copy.slots, job.generations, strict=True)
        ]

    def _poll(self) -> None:
        """Report the jobs whose copies have ended, and give back arenas that no copy uses."""
        held = [each for each in (self._device(), *self._retired) if each]
        ended = {id(ticket) for blocks in held for ticket in blocks.poll()}
        left = []
        for flight in self._flights:
            if id(flight.ticket) in ended:
                self._ended(flight)
            else:
                left.append(flight)
        self._flights = left
        flying = [flight.blocks for flight in left]  # a closed one would not tell their end
        self._retired = [each for each in self._retired if each in flying or not each.close()]

    def _ended(self, flight: _Flight) -> None:
        job, error, took_s = flight.job, flight.ticket.error, perf_counter() - flight.began
        if error:
            log.warning("kvstrata could not copy for a request: %s", error)
        if isinstance(job, SaveJob):
            whole = error is None and job.epoch == self._epoch
            (self._report.saved if whole else self._report.unsaved).append(job)
            self._report.saved_s += took_s
            return
        failed: Sequence[int] = job.copy.pages
        if error is None and self._fits(job):
            still = zip(job.copy.pages, flight.good, self._current(job), strict=True)
            failed = [page for page, before, after in still if not (before and after)]
        self._loaded(job, failed, took_s)
