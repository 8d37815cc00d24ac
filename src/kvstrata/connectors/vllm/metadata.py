"""What the scheduler half tells the worker half each step, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvstrata.layout import BlockLayout
from kvstrata.storage.arena import ArenaAddress

__all__ = [
    "AdapterKey",
    "AdapterUse",
    "LoadJob",
    "PageCopy",
    "SaveJob",
    "StepPlan",
    "StepReport",
    "WeightsReport",
    "WorkerProcess",
]


class AdapterKey(NamedTuple):
    """What a request says about its LoRA adapter; the weights behind it may be others later."""

    number: int
    """vLLM's `lora_int_id`: what its worker knows the adapter by."""
    name: str
    """Its name in requests."""
    path: str
    """Where vLLM loads it from."""


class AdapterUse(NamedTuple):
    """An adapter and the weights that some KV was, or is to be, computed with."""

    key: AdapterKey
    """Which one."""
    digest: str
    """Of its weights as loaded."""


@dataclass(frozen=True, slots=True)
class WorkerProcess(KVConnectorHandshakeMetadata):  # type: ignore[misc]  # vLLM is untyped here
    """Told by each worker before the first step: which process will write to our slots."""

    pid: int
    """The worker's process."""


class WeightsReport(IntEnum):
    """What the worker half says about the model's weights; the greater, the more urgent."""

    SAME = 0
    RENEWED = 1
    CHANGED = 2


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Which pages of the engine go with which slots: one row a page of all layers."""

    slots: list[int]
    """Arena slot of each page."""
    places: list[int]
    """Position of each page within its block."""
    pages: list[int]
    """The engine's page index."""
    groups: list[int] = field(default_factory=list)
    """Index of each page's cache group."""


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Pages to fill from the arena for one request."""

    request: str
    """vLLM's request id."""
    epoch: int
    """Session epoch in which the slots were acquired."""
    copy: PageCopy
    """What goes where."""
    generations: list[int]
    """For each page the generation that its slot must have, before and after the copy."""
    lost_pages: list[int] = field(default_factory=list)
    """Engine pages that were promised and cannot be filled any more."""
    adapter: AdapterUse | None = None
    """What the KV was computed with, if with an adapter."""
    same_step: bool = False
    """Whether the step that fills the pages also reads them, layer by layer."""


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Slots to fill from full pages of one request."""

    name: str
    """The request's name in the session."""
    epoch: int
    """Session epoch in which the slots were reserved."""
    copy: PageCopy
    """What goes where."""
    slots: list[int]
    """The slots, each once."""
    adapter: AdapterUse | None = None
    """What the KV must have been computed with, if with an adapter."""


@dataclass(slots=True)
class StepPlan(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is untyped here
    """One step's work for the worker half."""

    epoch: int = 0
    """The session's epoch; 0 while there is no daemon."""
    arena: ArenaAddress | None = None
    """The arena of that epoch, to be mapped when the epoch is new."""
    loads: list[LoadJob] = field(default_factory=list)
    """Requests to load for."""
    saves: list[SaveJob] = field(default_factory=list)
    """Requests to save from."""
    step: int = 0
    """Number of the step if it computes anything, to come back in its report."""
    layout: BlockLayout | None = None
    """The layout of the blocks in the arena; the engine's own, or one that is bridged."""
    adapters: dict[AdapterKey, Any] = field(default_factory=dict)
    """vLLM's LoRARequest of each adapter that this step computes with or that is asked about."""
    introduce: bool = False
    """Whether the workers are to say which processes they are."""
    resets: int = 0
    """How often everything was forgotten."""
    renewals: int = 0
    """How often blocks got other names because the weights had changed."""


@dataclass(slots=True)
class StepReport(KVConnectorWorkerMetadata):  # type: ignore[misc]  # as above
    """What the worker half did in one step."""

    loaded: dict[str, int] = field(default_factory=dict)
    """Requests whose load ended, with how many of its leading pages hold what was promised."""
    saved: list[SaveJob] = field(default_factory=list)
    """Saves whose slots hold every byte."""
    unsaved: list[SaveJob] = field(default_factory=list)
    """Saves that could not be made."""
    step: int = 0
    """Number of the step, 0 if it computed nothing."""
    copied_bytes: int = 0
    """Bytes copied into the engine's pages."""
    copied_s: float = 0.0
    """How long that took."""
    failed_pages: set[int] = field(default_factory=set)
    """Engine pages that could not be filled."""
    pids: list[int] = field(default_factory=list)
    """The workers' processes, if asked for."""
    saved_s: float = 0.0
    """How long the saves took."""
    workers: int = 1
    """How many workers' reports these are."""
    adapters: dict[AdapterKey, str] = field(default_factory=dict)
    """Digest of the weights of each adapter asked about, empty where it cannot be told."""
    weights: WeightsReport = WeightsReport.SAME
    """Whether the model's own weights have changed."""
    asks_layers: bool = False
    """Whether the pass of this step, the first, has asked for every layer before it read it."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        """Join the reports of other workers on the same step.

        Each worker moves its part of every block, so what one of them could not do was not done.
        """
        assert isinstance(other, StepReport)
        pages = [self.loaded, other.loaded]
        slots = {slot for job in other.saved for slot in job.slots}
        saved = [job for job in self.saved if slots.issuperset(job.slots)]
        whole = {slot for job in saved for slot in job.slots}
        attempted = {
            tuple(job.slots): job
            for job in (*self.saved, *self.unsaved, *other.saved, *other.unsaved)
        }
        return StepReport(
            loaded={
                request: min(report.get(request, 0) for report in pages)
                for request in self.loaded | other.loaded
            },
            saved=saved,
            unsaved=[job for job in attempted.values() if not whole.issuperset(job.slots)],
            step=max(self.step, other.step),
            copied_bytes=self.copied_bytes + other.copied_bytes,
            copied_s=max(self.copied_s, other.copied_s),
            failed_pages=self.failed_pages | other.failed_pages,
            pids=self.pids + other.pids,
            saved_s=max(self.saved_s, other.saved_s),
            workers=self.workers + other.workers,
            weights=max(self.weights, other.weights),
            asks_layers=self.asks_layers and other.asks_layers,
            adapters={
                key: digest if other.adapters.get(key) == digest else ""
                for key, digest in self.adapters.items()
            },
        )
