"""One accepted transfer, from its ops to the batches that NIXL is given. No NIXL, no threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from kvstrata.core.ids import TransferId
from kvstrata.storage.base import FileRegion, MemoryRegion
from kvstrata.transfer.backends.nixl.invitation import PeerMemory
from kvstrata.transfer.backends.nixl.registrations import FileHold, MemoryHold
from kvstrata.transfer.backends.nixl.requests import FILE, MEMORY, Rows
from kvstrata.transfer.base import Completion, CopyOp, Outcome

__all__ = ["Batch", "Work", "plan_work"]

_BATCH_OPS_MAX: Final = 256
_BATCH_BYTES_MAX: Final = 64 << 20  # each request more costs about 0.1 ms at its end
_OFFSET_END: Final = 1 << 62  # what a file is registered with


@dataclass(frozen=True, slots=True)
class Batch:
    """Ops that go to NIXL as one request."""

    ops: tuple[int, ...]
    """Their indices."""


@dataclass(slots=True, eq=False)
class Work:
    """A transfer: what of it waits, what runs, what has failed."""

    transfer: TransferId
    """Its name."""
    ops: Sequence[CopyOp]
    """What it moves."""
    local: MemoryRegion | None
    """The side in this process."""
    far: MemoryRegion | FileRegion | PeerMemory | None
    """The other side."""
    read: bool
    """Whether bytes come from the far side."""
    batches: deque[Batch] = field(default_factory=deque)
    """What NIXL has not been given."""
    holds: list[MemoryHold | FileHold] = field(default_factory=list)
    """What stays registered until it has ended."""
    sides: tuple[int, int, int] = (0, 0, 0)
    """Once held: local address, far address or 0 for a file, the file's descriptor or 0."""
    queued: bool = False
    """Whether it stands in its lane."""
    live: int = 0
    """Requests under way."""
    failed: dict[int, str] = field(default_factory=dict)
    """Failed ops and why."""
    cancelled: bool = False
    """Whether somebody asked for an early end before NIXL was given all."""

    @property
    def far_name(self) -> str:
        """What the agent calls the far side."""
        match self.far:
            case PeerMemory(peer=peer):
                return peer
            case FileRegion():
                return FILE
            case _:
                return MEMORY

    @property
    def lane(self) -> str:
        """What it shares its window with: one peer, one file, or all memory of this process."""
        match self.far:
            case FileRegion(descriptor=descriptor):
                return f"{FILE} {descriptor}"
            case _:
                return self.far_name

    @property
    def ended(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.batches and not self.live

    def fail(self, ops: Sequence[int], reason: str) -> None:
        """Note that the bytes of these ops must not be used."""
        self.failed.update(dict.fromkeys(ops, reason))

    def drop(self, reason: str) -> None:
        """Fail what NIXL has not been given."""
        while self.batches:
            self.fail(self.batches.popleft().ops, reason)

    def cancel(self) -> None:
        """Drop what NIXL has not been given; what it has runs to its end."""
        if self.batches:
            self.cancelled = True
            self.drop("cancelled")

    def completion(self) -> Completion:
        """Return how it ended."""
        if self.cancelled:
            every = tuple(range(len(self.ops)))
            return Completion(self.transfer, Outcome.CANCELLED, every, "cancelled")
        if not self.failed:
            return Completion(self.transfer, Outcome.DONE)
        reason = next(iter(self.failed.values()))
        return Completion(self.transfer, Outcome.FAILED, tuple(sorted(self.failed)), reason)

    def rows(self, batch: Batch) -> tuple[Rows, Rows]:
        """Return the local and the far side of a batch as NIXL takes them."""
        local_address, far_base, device = self.sides
        moves = [self.ops[index] for index in batch.ops]
        sources = [op.source_offset for op in moves]
        targets = [op.target_offset for op in moves]
        lengths = [op.length for op in moves]
        mine, other = (targets, sources) if self.read else (sources, targets)
        local: Rows = np.empty((len(moves), 3), np.uint64)
        far: Rows = np.empty((len(moves), 3), np.uint64)
        local[:, 0] = np.array(mine, np.uint64) + np.uint64(local_address)
        far[:, 0] = np.array(other, np.uint64) + np.uint64(far_base)
        local[:, 1] = far[:, 1] = lengths
        local[:, 2], far[:, 2] = 0, device
        return local, far


def plan_work(transfer: TransferId, ops: Sequence[CopyOp], source: Any, target: Any) -> Work:
    """Return the transfer with its good ops in batches and its bad ones failed.

    Files get one op a request: when one of several fails, NIXL says neither which nor whether
    the others have ended. Between memories the whole connection fails or nothing does.
    """
    work = Work(transfer, ops, *_sides(source, target))
    if work.local is None or work.far is None:
        pair = f"{type(source).__name__} to {type(target).__name__}"
        work.fail(range(len(ops)), f"nixl does not move {pair}")
        return work
    one_by_one = isinstance(work.far, FileRegion)
    waiting: list[int] = []
    waiting_bytes = 0
    ends = (_end(source), _end(target))
    for index, op in enumerate(ops):
        why = _outside(op, *ends)
        if why:
            work.fail([index], why)
            continue
        full = len(waiting) >= _BATCH_OPS_MAX or waiting_bytes + op.length > _BATCH_BYTES_MAX
        if waiting and (one_by_one or full):
            work.batches.append(Batch(tuple(waiting)))
            waiting, waiting_bytes = [], 0
        if op.length:
            waiting.append(index)
            waiting_bytes += op.length
    if waiting:
        work.batches.append(Batch(tuple(waiting)))
    return work


def _sides(
    source: Any, target: Any
) -> tuple[MemoryRegion | None, MemoryRegion | FileRegion | PeerMemory | None, bool]:
    far_kinds = (FileRegion, PeerMemory)
    if isinstance(source, MemoryRegion) and isinstance(target, (MemoryRegion, *far_kinds)):
        return source, target, False
    if isinstance(source, far_kinds) and isinstance(target, MemoryRegion):
        return target, source, True
    return None, None, False


def _end(region: MemoryRegion | FileRegion | PeerMemory) -> int:
    match region:
        case MemoryRegion():
            return len(region.view)
        case PeerMemory():
            return region.length
        case FileRegion():
            return _OFFSET_END


def _outside(op: CopyOp, source_end: int, target_end: int) -> str:
    if op.length < 0:
        return f"an op of {op.length} bytes"
    for side, offset, end in (
        ("source", op.source_offset, source_end),
        ("target", op.target_offset, target_end),
    ):
        if not 0 <= offset <= end - op.length:
            return f"bytes {offset} to {offset + op.length} are outside the {side}, which has {end}"
    return ""
