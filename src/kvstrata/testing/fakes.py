"""Fakes of the seams: ordinary implementations that misbehave on order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvstrata.core.ids import TransferId
from kvstrata.storage.base import FileRegion, MemoryRegion, StripedRegion
from kvstrata.transfer.base import Completion, CopyOp, Outcome, TransferBackend
from kvstrata.transfer.sealed import SealedMemory

__all__ = ["Faults", "FaultyBackend"]


@dataclass(frozen=True, slots=True)
class Faults:
    """How often each thing goes wrong, as a probability; the default is never."""

    fail: float = 0.0
    """An op moves its bytes and is reported as failed."""
    flip: float = 0.0
    """One bit of an op's bytes in a memory target is flipped, and nobody is told."""
    tear: float = 0.0
    """Only the first half of an op's bytes reaches a file target, and nobody is told."""
    late_polls: int = 0
    """How many polls a completion is held back."""


class FaultyBackend:
    """Wraps a backend; without faults it is that backend and passes the same suite."""

    def __init__(self, inner: TransferBackend, faults: Faults, luck: random.Random) -> None:
        """Spoil what `inner` does, as `luck` has it."""
        self._inner = inner
        self._faults = faults
        self._luck = luck
        self._ops: dict[TransferId, tuple[Sequence[CopyOp], Any]] = {}
        self._held: list[tuple[int, Completion]] = []

    def submit(self, transfer: TransferId, ops: Sequence[CopyOp], source: Any, target: Any) -> bool:
        """Hand the transfer on, some of its writes torn."""
        files = isinstance(target, FileRegion | StripedRegion)
        handed = [self._torn(op) for op in ops] if files else ops
        plain = target.region if isinstance(target, SealedMemory) else target
        accepted = self._inner.submit(transfer, handed, source, plain)
        if accepted:
            self._ops[transfer] = (ops, target)
        return accepted

    def poll(self) -> list[Completion]:
        """Return what completed, spoilt, once it has been held back long enough."""
        self._held = [(polls - 1, completion) for polls, completion in self._held]
        for completion in self._inner.poll():
            self._held.append((self._faults.late_polls, self._spoil(completion)))
        ready = [completion for polls, completion in self._held if polls <= 0]
        self._held = [held for held in self._held if held[0] > 0]
        return ready

    def cancel(self, transfer: TransferId) -> None:
        """Hand the wish on."""
        self._inner.cancel(transfer)

    def capabilities(self) -> frozenset[tuple[str, str]]:
        """Return what the wrapped backend can."""
        return self._inner.capabilities()

    def close(self) -> None:
        """Close the wrapped backend."""
        self._inner.close()

    def _torn(self, op: CopyOp) -> CopyOp:
        if self._luck.random() < self._faults.tear:
            return replace(op, length=op.length // 2)
        return op

    def _spoil(self, completion: Completion) -> Completion:
        ops, target = self._ops.pop(completion.transfer)
        failed = set(completion.failed_ops)
        for index, op in enumerate(ops):
            if self._luck.random() < self._faults.fail:
                failed.add(index)
            memory = target.region if isinstance(target, SealedMemory) else target
            if self._luck.random() < self._faults.flip and isinstance(memory, MemoryRegion):
                place = op.target_offset + self._luck.randrange(op.length)
                memory.view[place] ^= 1 << self._luck.randrange(8)
            if isinstance(target, SealedMemory) and index not in completion.failed_ops:
                target.seal(op, op.target_offset)  # as spoilt: nobody moves it after us
        if failed == set(completion.failed_ops):
            return completion
        reason = completion.reason or "a fault was ordered"
        return Completion(completion.transfer, Outcome.FAILED, tuple(sorted(failed)), reason)
