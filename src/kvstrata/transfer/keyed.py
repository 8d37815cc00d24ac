"""Carries out the jobs of one keyed tier: each is one transfer of its keyed backends.

    read    store -> host, verified against the header as it arrives
    write   host blocks compared with their seals, then put
    erase   deleted
    probe   which of them are there

The executor hands over the jobs that name this tier. Reads have workers of their own: a request
waits for them, and for nobody's writes. A write of a key that is being deleted waits until that
ended, or the delete would take what was just written; where the store itself bounds its bytes
writes wait for all deletes.

Owner: the daemon's one thread. A store that hangs holds its workers and nothing else: jobs beyond
`jobs_max` end at once as failed, and what is cancelled before it began ends too.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from kvstrata.core.ids import SequenceHash, TransferId
from kvstrata.storage.arena import Arena
from kvstrata.storage.base import NOBODY
from kvstrata.storage.envelope import TAG_BYTES
from kvstrata.transfer.backends.keyed import (
    KeyedAnswer,
    KeyedBackend,
    KeyedEnd,
    KeyedErase,
    KeyedOp,
    KeyedProbe,
    KeyedResult,
)
from kvstrata.transfer.base import (
    Completion,
    EraseJob,
    JobDone,
    Lineage,
    Outcome,
    ProbeJob,
    ReadJob,
    WriteJob,
)

__all__ = ["KeyedJob", "KeyedMover"]

KeyedJob: TypeAlias = ReadJob | WriteJob | EraseJob | ProbeJob
"""What a keyed tier can be asked for."""

_GONE = frozenset({KeyedResult.MISSED, KeyedResult.REFUSED})


@dataclass(slots=True)
class _Running:
    job: KeyedJob
    end: KeyedEnd


class KeyedMover:
    """The jobs of one keyed tier."""

    def __init__(
        self,
        end: KeyedEnd,
        arena: Arena,
        *,
        threads: int = 16,
        jobs_max: int = 1024,
        close_timeout_s: float = 1.0,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the workers: `threads` that read, half as many that write and delete.

        `end` says where the blocks are and how they are written; its store is closed with us.
        """
        self.store = end.store
        self._end, self._arena = end, arena
        self._jobs_max = jobs_max
        self._reader, self._writer = (
            KeyedBackend(
                threads=count,
                queue_transfers_max=jobs_max,
                close_timeout_s=close_timeout_s,
                notify=notify,
            )
            for count in (threads, max(threads // 2, 1))
        )
        self._running: dict[TransferId, _Running] = {}
        self._held: deque[WriteJob] = deque()
        self._deleting: Counter[SequenceHash] = Counter()
        self._ended: list[JobDone] = []
        self._notify = notify

    @property
    def running(self) -> int:
        """Jobs accepted and not yet ended."""
        return len(self._running) + len(self._held) + len(self._ended)

    def submit(self, job: KeyedJob) -> None:
        """Take `job`: it ends in one JobDone, at once and failed if there are too many."""
        if len(self._running) + len(self._held) >= self._jobs_max:
            self._refuse(job, "too many jobs of this tier are under way")
        elif isinstance(job, WriteJob) and self._waits(job):
            self._held.append(job)
        else:
            self._start(job)

    def poll(self) -> list[JobDone]:
        """Return the jobs that ended since the last call."""
        for completion in [*self._reader.poll(), *self._writer.poll()]:
            running = self._running.pop(completion.transfer)
            self._ended.append(_judge(running.job, running.end, completion))
            if isinstance(running.job, EraseJob):
                self._deleting -= Counter(running.job.keys)
        for _ in range(len(self._held)):
            job = self._held.popleft()
            if self._waits(job):
                self._held.append(job)
            else:
                self._start(job)
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, transfer: TransferId) -> None:
        """Ask for an early end of a job; it still ends in a JobDone."""
        self._reader.cancel(transfer)
        self._writer.cancel(transfer)
        for job in [each for each in self._held if each.transfer == transfer]:
            self._held.remove(job)
            self._refuse(job, "cancelled")

    def statistics(self) -> dict[str, Any]:
        """Return the counters of the store and of what moved."""
        read, written = self._reader.statistics(), self._writer.statistics()
        moved = {name: count + asdict(written)[name] for name, count in asdict(read).items()}
        return {"store": asdict(self.store.statistics()), "moved": moved}

    def close(self) -> None:
        """Stop the workers, then the store; what waits ends as failed."""
        while self._held:
            self._refuse(self._held.popleft(), "closed")
        self._reader.close()
        self._writer.close()
        self.store.close()

    # -- private -------------------------------------------------------------------------------

    def _waits(self, job: WriteJob) -> bool:
        if self.store.capacity_bytes is not None:  # what is deleted makes room for what is written
            return bool(self._deleting)
        return bool(self._deleting) and not self._deleting.keys().isdisjoint(job.keys)

    def _refuse(self, job: KeyedJob, reason: str) -> None:
        bad = (False,) * (len(job.keys))
        self._ended.append(JobDone(job.transfer, bad, (b"",) * len(bad), reason))
        self._notify()

    def _start(self, job: KeyedJob) -> None:
        end = replace(self._end, answers={})
        memory = self._arena.region
        match job:
            case ReadJob():
                accepted = self._reader.submit(job.transfer, self._plan_read(job), end, memory)
            case WriteJob():
                accepted = self._writer.submit(job.transfer, self._plan_write(job), memory, end)
            case ProbeJob():
                accepted = self._reader.submit(job.transfer, [KeyedProbe(job.keys)], end, None)
            case EraseJob():
                accepted = self._writer.submit(job.transfer, [KeyedErase(job.keys)], None, end)
                if accepted:
                    self._deleting.update(job.keys)
        if accepted:
            self._running[job.transfer] = _Running(job, end)
        else:
            self._refuse(job, "closed, or too much is waiting")

    def _plan_read(self, job: ReadJob) -> list[KeyedOp]:
        grid = self._arena.grid
        pairs = zip(job.slots, job.keys, strict=True)
        return [
            KeyedOp(key, grid.offset(slot), grid.block_bytes, place)
            for place, (slot, key) in enumerate(pairs)
        ]

    def _plan_write(self, job: WriteJob) -> list[KeyedOp]:
        grid = self._arena.grid
        owners = job.owners or (NOBODY,) * len(job.keys)
        return [
            KeyedOp(
                key,
                grid.offset(job.slots[place]),
                grid.block_bytes,
                place,
                parent=job.parents[place],
                seal=job.checksums[place],
                namespace=owners[place][:TAG_BYTES],
                tenant=owners[place][TAG_BYTES:],
            )
            for place, key in enumerate(job.keys)
        ]


def _judge(job: KeyedJob, end: KeyedEnd, completion: Completion) -> JobDone:
    """Return what became of each block of `job`."""
    count = len(job.keys)
    good = completion.outcome is Outcome.DONE
    if isinstance(job, EraseJob):
        return JobDone(job.transfer, (good,) * count, (), completion.reason)
    if isinstance(job, ProbeJob):
        answer = end.answers.get(0)
        there = answer.there if good and answer else (False,) * count
        return JobDone(job.transfer, there, (), "" if good else completion.reason or "failed")
    if completion.outcome is Outcome.CANCELLED:
        return JobDone(
            job.transfer, (False,) * count, (b"",) * count, completion.reason or "cancelled"
        )
    failed = set(completion.failed_ops)
    answers = [end.answers.get(place) for place in range(count)]
    said = [answer.envelope if answer else None for answer in answers]
    read = isinstance(job, ReadJob)
    return JobDone(
        job.transfer,
        tuple(place not in failed for place in range(count)),
        tuple(envelope.seal if envelope else b"" for envelope in said),
        completion.reason,
        lost=tuple(place for place, each in enumerate(answers) if read and _is_gone(each)),
        damaged=tuple(
            place
            for place, each in enumerate(answers)
            if read and each and each.result is KeyedResult.DAMAGED
        ),
        lineage=tuple(
            Lineage(envelope.parent, envelope.namespace + envelope.tenant) if envelope else None
            for envelope in said
        )
        if read
        else (),
    )


def _is_gone(answer: KeyedAnswer | None) -> bool:
    """Return whether asking again is of no use."""
    if answer is None:
        return False
    return answer.result in _GONE or (answer.result is KeyedResult.FAILED and not answer.retryable)
