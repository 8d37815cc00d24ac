"""Where the two halves of one engine meet: both live in its one process.

TensorRT-LLM tells the scheduler half neither what the pages look like nor what became of a save;
the worker half leaves both here. Any thread may call; the lock is held for moments only.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from kvstrata.connectors.trtllm.jobs import LoadJob, Report, SaveJob
from kvstrata.connectors.trtllm.pages import EnginePages
from kvstrata.core.errors import TransferError
from kvstrata.layout import BlockLayout
from kvstrata.storage.arena import Arena, ArenaAddress

if TYPE_CHECKING:
    from kvstrata.connectors.trtllm.mover import Mover

__all__ = ["Desk", "MappedArena", "desk_of", "partner_of"]

_desks: WeakSet[Desk] = WeakSet()
_desks_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class MappedArena:
    """One epoch's arena, mapped for as long as a job refers to it."""

    arena: Arena
    """The mapping."""
    blocks: torch.Tensor
    """Its blocks, `[slots, pages of a block, bytes of a page]`."""

    @classmethod
    def attach(cls, address: ArenaAddress, layout: BlockLayout, page_bytes: int) -> MappedArena:
        """Map the arena; raises as `Arena.attach`."""
        arena = Arena.attach(address, layout)
        grid = arena.grid
        places = layout.block_bytes // page_bytes
        blocks = torch.frombuffer(arena.region.view, dtype=torch.uint8).as_strided(
            (grid.slots, places, page_bytes), (grid.stride_bytes, page_bytes, 1), grid.base_bytes
        )
        return cls(arena, blocks)


class Desk:
    """What the halves of one engine share."""

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments
        self.pages: EnginePages | None = None
        self.mover: Mover | None = None
        self.served = False  # a scheduler half has taken it
        self.step_ended = 0  # the last step that has computed and saved
        self.settle: Callable[[], None] | None = None  # has the scheduler half take its reports
        self._arenas: dict[int, MappedArena] = {}
        self._reports: deque[Report] = deque()  # at most one for each open job
        self._open: dict[int, LoadJob | SaveJob] = {}
        self._loads: Counter[int] = Counter()  # loads beside the steps that have not ended
        self._lock = threading.Lock()
        self._broken = ""

    # -- arenas --------------------------------------------------------------------------------

    def map(self, epoch: int, mapped: MappedArena) -> None:
        """Take the arena of a new epoch; those before it are needed only by jobs under way."""
        with self._lock:
            needed = {job.epoch for job in self._open.values()}
            old = [each for each in self._arenas if each not in needed]
            dropped = [self._arenas.pop(each) for each in old]
            self._arenas[epoch] = mapped
        for each in dropped:
            each.arena.close()

    def mapped(self, epoch: int) -> MappedArena | None:
        """Return the arena of an epoch, None if it is gone."""
        with self._lock:
            return self._arenas.get(epoch)

    # -- jobs ----------------------------------------------------------------------------------

    def promise_load(self, request: int) -> None:
        """Note that a request was put aside for a load, so that nobody takes it for loaded."""
        with self._lock:
            self._loads[request] += 1

    def drop_load(self, request: int) -> None:
        """Note that a promised load will not come, or has ended."""
        with self._lock:
            self._drop_load(request)

    def open(self, job: LoadJob | SaveJob) -> None:
        """Note a job that is about to be handed over."""
        with self._lock:
            self._open[job.id] = job

    def report(self, report: Report) -> None:
        """End a job."""
        with self._lock:
            job = self._open.pop(report.job, None)
            if isinstance(job, LoadJob) and job.background:
                self._drop_load(job.request)
            self._reports.append(report)

    def take_reports(self) -> list[Report]:
        """Return what has ended since the last call."""
        with self._lock:
            found = list(self._reports)
            self._reports.clear()
        return found

    def loading(self, request: int) -> bool:
        """Return whether a load of this request was promised and has not ended."""
        with self._lock:
            return bool(self._loads[request])

    def busy(self, request: int) -> bool:
        """Return whether the request's pages are still read or written."""
        with self._lock:
            jobs = self._open.values()
            return bool(self._loads[request]) or any(job.request == request for job in jobs)

    def carry_out(self, job: LoadJob | SaveJob) -> None:
        """Hand a job to the worker half at once."""
        self.open(job)
        assert self.mover is not None, "pages are registered before requests come"
        self.mover.submit(job, None)

    # -- broken promises -----------------------------------------------------------------------

    def break_off(self, why: str) -> None:
        """Remember that a promised load failed: the engine must not compute with its pages."""
        with self._lock:
            self._broken = self._broken or why

    def check(self) -> None:
        """Raise TransferError if a promised load has failed."""
        if self._broken:
            raise TransferError(
                f"{self._broken}; the engine has no way to be told, and a part of a prefix would "
                "be a wrong answer",
                retryable=False,
            )

    def close(self) -> None:
        """Unmap every arena; twice is harmless."""
        with self._lock:
            arenas, self._arenas = self._arenas, {}
        for each in arenas.values():
            each.arena.close()

    def _drop_load(self, request: int) -> None:
        self._loads[request] -= 1
        if self._loads[request] <= 0:
            del self._loads[request]


def desk_of(arguments: Any) -> Desk:
    """Return the desk of the engine with these arguments, the very object; make it if need be."""
    with _desks_lock:
        for desk in _desks:
            if desk.arguments is arguments and not desk.served:
                return desk
        desk = Desk(arguments)
        _desks.add(desk)
        return desk


def partner_of(desk: Desk) -> Desk | None:
    """Return the desk where the worker half has left its pages, None if it cannot be told.

    That is `desk`, unless the engine gave the halves copies of its arguments; then it is the only
    desk in this process with pages and without a scheduler half.
    """
    if desk.pages is not None:
        return desk
    with _desks_lock:
        waiting = [each for each in _desks if each.pages is not None and not each.served]
    return waiting[0] if len(waiting) == 1 else None
