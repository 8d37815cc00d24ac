"""Carries out the brain's jobs: each is a short list of stages, each stage one backend transfer.

    seal    seal the host blocks
    read    file -> host, sealing what arrived (the brain compares)
    write   seal the host blocks, drop those that differ, host -> file; index lines -> file
    erase   blank index lines -> file

A mover that cannot seal on the way has it done in a stage of its own, after or before its own.

Owner: the daemon's one thread. Queues are bounded by `jobs_max`; a job that does not fit is
refused and the brain keeps it. Each accepted job ends in exactly one `JobDone`. Deadlines are the
brain's: it stops waiting and quarantines the target, and still gets the JobDone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from kvstrata.core.config import Limits
from kvstrata.core.ids import SequenceHash, TransferId
from kvstrata.core.tier import TierName
from kvstrata.storage.arena import Arena
from kvstrata.storage.base import NOBODY, MemoryRegion, SlotGrid, StoredBlock
from kvstrata.storage.entry import BLANK_ENTRY, ENTRY_BYTES, encode_entry
from kvstrata.storage.slab import Slab
from kvstrata.storage.stripe import Stripe
from kvstrata.transfer.backends.posix import PosixBackend
from kvstrata.transfer.backends.sealer import SealerBackend, SealRequest
from kvstrata.transfer.base import (
    Completion,
    CopyOp,
    EraseJob,
    Job,
    JobDone,
    Outcome,
    ProbeJob,
    ReadJob,
    SealJob,
    TransferBackend,
    WriteJob,
)
from kvstrata.transfer.keyed import KeyedMover
from kvstrata.transfer.plan import OP_BYTES_MAX, plan_copy
from kvstrata.transfer.sealed import SEALED_READ, SEALED_WRITE, SealedMemory

__all__ = ["Executor"]


@dataclass(slots=True)
class _Running:
    job: SealJob | ReadJob | WriteJob | EraseJob
    ok: list[bool]
    ops: list[CopyOp] = field(default_factory=list)
    seals: list[bytes] = field(default_factory=list)
    reason: str = ""
    stages: list[Callable[[_Running], bool]] = field(default_factory=list)


class Executor:
    """Runs jobs over one arena and the slabs of the tiers below it."""

    def __init__(  # noqa: PLR0913  # each kind of tier and of backend by its own name
        self,
        arena: Arena,
        slabs: Mapping[TierName, Slab | Stripe],
        fingerprint: bytes,
        limits: Limits,
        *,
        notify: Callable[[], None] = lambda: None,
        mover: TransferBackend | None = None,
        keyed: Mapping[TierName, KeyedMover] = MappingProxyType({}),
        jobs_max: int = 1024,
    ) -> None:
        """Start the backends; `notify` is called from their threads when there is news.

        `mover` replaces the posix backend, for other backends (`transfer/mover.py`) and for
        wrappers; the executor closes it. Jobs of the tiers in `keyed` go there.
        """
        self._arena, self._slabs, self._fingerprint = arena, slabs, fingerprint
        self._keyed = dict(keyed)
        self._jobs_max = jobs_max
        self._mover: TransferBackend = mover or PosixBackend(
            threads=limits.transfer_threads, queue_transfers_max=jobs_max, notify=notify
        )
        self._sealer: TransferBackend = SealerBackend(
            threads=limits.checksum_threads, queue_transfers_max=jobs_max, notify=notify
        )
        self._fuses = {SEALED_READ, SEALED_WRITE} <= self._mover.capabilities()
        self._running: dict[TransferId, _Running] = {}
        self._closed = False

    def try_submit(self, job: Job) -> bool:
        """Start `job`, or return False because as many as allowed are running."""
        if not isinstance(job, SealJob) and job.tier in self._keyed and not self._closed:
            self._keyed[job.tier].submit(job)
            return True
        if self._closed or len(self._running) >= self._jobs_max:
            return False
        assert not isinstance(job, ProbeJob), "only keyed tiers are probed"
        blocks = job.targets if isinstance(job, EraseJob) else job.slots
        running = _Running(job, [True] * len(blocks))
        match job:
            case SealJob():
                running.stages = [self._seal]
            case ReadJob():
                running.stages = [self._read] if self._fuses else [self._read, self._seal]
            case WriteJob():
                before = [] if self._fuses else [self._seal]
                running.stages = [*before, self._write, self._write_entries]
            case EraseJob():
                running.stages = [self._erase]
        self._running[job.transfer] = running
        self._advance(running)
        return True

    def poll(self) -> list[JobDone]:
        """Return the jobs that ended since the last call."""
        ended = [done for tier in self._keyed.values() for done in tier.poll()]
        for completion in [*self._mover.poll(), *self._sealer.poll()]:
            running = self._running[completion.transfer]
            self._note(running, completion)
            if running.stages and self._closed:
                running.ok = [False] * len(running.ok)  # its next stage has nowhere to run
                running.reason = running.reason or "closed"
            cancelled = completion.outcome is Outcome.CANCELLED
            if running.stages and any(running.ok) and not cancelled:
                self._advance(running)
                continue
            del self._running[completion.transfer]
            ended.append(
                JobDone(
                    completion.transfer, tuple(running.ok), tuple(running.seals), running.reason
                )
            )
        return ended

    def cancel(self, transfer: TransferId) -> None:
        """Ask for an early end of a job; it still ends in a JobDone."""
        if transfer in self._running:
            self._mover.cancel(transfer)
            self._sealer.cancel(transfer)
            return
        for tier in self._keyed.values():
            tier.cancel(transfer)

    @property
    def running(self) -> int:
        """Jobs accepted and not yet ended."""
        return len(self._running) + sum(tier.running for tier in self._keyed.values())

    def close(self) -> None:
        """Stop the backends; jobs that had not begun are dropped."""
        self._closed = True
        self._mover.close()
        self._sealer.close()
        for tier in self._keyed.values():
            tier.close()

    # -- stages --------------------------------------------------------------------------------

    def _advance(self, running: _Running) -> None:
        stage = running.stages.pop(0)
        accepted = stage(running)
        assert accepted, "a backend's queue is shorter than jobs_max"

    def _note(self, running: _Running, completion: Completion) -> None:
        running.reason = running.reason or completion.reason
        for failed in completion.failed_ops:
            op = running.ops[failed]
            running.ok[op.first : op.first + op.count] = [False] * op.count
        if isinstance(running.job, WriteJob) and running.seals and running.stages:
            for index, expected in enumerate(running.job.checksums):
                if running.seals[index] != expected:  # memory changed under us: never write it
                    running.ok[index] = False
                    running.reason = running.reason or "host block differs from its seal"

    def _binding(self, key: SequenceHash) -> bytes:
        return key + self._fingerprint

    def _seal(self, running: _Running) -> bool:
        job = running.job
        assert not isinstance(job, EraseJob)
        grid = self._arena.grid
        running.ops = [
            CopyOp(grid.offset(slot), 0, grid.block_bytes, index)
            for index, slot in enumerate(job.slots)
            if running.ok[index]  # what did not arrive has no seal
        ]
        running.seals = [b""] * len(job.slots)
        bindings = tuple(map(self._binding, job.keys))
        request = SealRequest(self._arena.region, bindings, running.seals)
        return self._sealer.submit(job.transfer, running.ops, request, None)

    def _read(self, running: _Running) -> bool:
        job = running.job
        assert isinstance(job, ReadJob)
        slab = self._slabs[job.tier]
        pairs = list(zip(job.sources, job.slots, strict=True))
        running.ops = plan_copy(
            pairs, _pages(slab.grid), _pages(self._arena.grid), op_bytes_max=_op_bytes_max(slab)
        )
        target = self._sealed(running, job.keys) if self._fuses else self._arena.region
        return self._mover.submit(job.transfer, running.ops, slab.region, target)

    def _write(self, running: _Running) -> bool:
        job = running.job
        assert isinstance(job, WriteJob)
        slab = self._slabs[job.tier]
        chosen = [index for index, ok in enumerate(running.ok) if ok]
        pairs = [(job.slots[index], job.targets[index]) for index in chosen]
        grids = _pages(self._arena.grid), _pages(slab.grid)
        if len(chosen) == len(job.slots):
            running.ops = plan_copy(pairs, *grids, op_bytes_max=_op_bytes_max(slab))
        else:  # one op a block: its number in the plan is not its number in the job
            planned = plan_copy(pairs, *grids, op_bytes_max=1)
            running.ops = [_renumber(op, chosen[op.first]) for op in planned]
        if self._fuses:
            source = self._sealed(running, job.keys, job.checksums)
            return self._mover.submit(job.transfer, running.ops, source, slab.region)
        return self._mover.submit(job.transfer, running.ops, self._arena.region, slab.region)

    def _sealed(
        self, running: _Running, keys: tuple[SequenceHash, ...], expected: tuple[bytes, ...] = ()
    ) -> SealedMemory:
        running.seals = [b""] * len(keys)
        bindings = tuple(map(self._binding, keys))
        return SealedMemory(self._arena.region, self._arena.grid, bindings, running.seals, expected)

    def _write_entries(self, running: _Running) -> bool:
        job = running.job
        assert isinstance(job, WriteJob)
        slab = self._slabs[job.tier]
        last = len(job.slots) - 1
        lines = {
            index: encode_entry(
                StoredBlock(
                    slot=job.targets[index],
                    key=job.keys[index],
                    parent=job.parents[index],
                    checksum=job.checksums[index],
                    written=job.written + last - index,
                    owner=job.owners[index] if job.owners else NOBODY,
                ),
                slab.grid.block_bytes,
            )
            for index, ok in enumerate(running.ok)
            if ok
        }
        return self._submit_lines(running, slab, job.targets, lines)

    def _erase(self, running: _Running) -> bool:
        job = running.job
        assert isinstance(job, EraseJob)
        slab = self._slabs[job.tier]
        lines = dict.fromkeys(range(len(job.targets)), BLANK_ENTRY)
        return self._submit_lines(running, slab, job.targets, lines)

    def _submit_lines(
        self,
        running: _Running,
        slab: Slab | Stripe,
        targets: tuple[int, ...],
        lines: dict[int, bytes],
    ) -> bool:
        buffer = MemoryRegion(memoryview(bytearray(b"".join(lines.values()))))
        running.ops = [
            CopyOp(place * ENTRY_BYTES, slab.entry_offset(targets[index]), ENTRY_BYTES, index)
            for place, index in enumerate(lines)
        ]
        return self._mover.submit(running.job.transfer, running.ops, buffer, slab.region)


def _renumber(op: CopyOp, first: int) -> CopyOp:
    return CopyOp(op.source_offset, op.target_offset, op.length, first, op.count)


def _pages(grid: SlotGrid) -> SlotGrid:
    """Return `grid` as one of whole pages: only they can move past the page cache.

    What lies behind a block in its last page moves along and means nothing.
    """
    return replace(grid, block_bytes=grid.stride_bytes)


def _op_bytes_max(slab: Slab | Stripe) -> int:
    return OP_BYTES_MAX if slab.merges else 1
