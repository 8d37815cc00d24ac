"""Killing a writer at any point of its write path: for children of tests, never for a daemon.

`arm` replaces the system calls of the write path in this process by ones that count, and at the
ordered call kill the process before it, in the middle of it, or just after it. The product has no
hook for this and pays nothing. What a child did is told by `Journal`, a file whose lines outlive a
SIGKILL because the kernel has them.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvstrata.core.config import Limits
from kvstrata.core.ids import SequenceHash, SlotId, TransferId
from kvstrata.core.tier import DISK
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.arena import Arena
from kvstrata.storage.entry import ENTRY_BYTES
from kvstrata.storage.seal import seal
from kvstrata.storage.stripe import open_slab
from kvstrata.transfer.base import EraseJob, JobDone, WriteJob
from kvstrata.transfer.executor import Executor

__all__ = ["LAYOUT", "POINTS", "Journal", "Life", "arm", "expected_payload", "live"]

LAYOUT: Final = BlockLayout((Dimension("byte", 6000),), "int8", 8, "crash")
"""Blocks that do not fill their pages."""
_JOB_BLOCKS: Final = 4
_KEY_BYTES: Final = 16
_JOBS: Final = 4
_CLEAR_SHARE: Final = 0.005
_ERASE_SHARE: Final = 0.1

POINTS: Final = tuple(
    f"{part}.{moment}"
    for part in ("payload", "line", "superblock", "floor")
    for moment in ("before", "middle", "after")
) + tuple(
    f"{part}.{moment}"
    for part in ("allocate", "flush", "publish")
    for moment in ("before", "after")
)
"""Every named point: what is written, and when in it."""


@dataclass(frozen=True)
class Life:
    """One life of the child."""

    places: tuple[str, ...]
    """Where its slab is."""
    capacity_bytes: int
    """Size of the slab."""
    journal: str
    """Path of its journal."""
    seed: int
    """Its luck."""
    point: str = ""
    """Where it kills itself; empty to live until it is killed."""
    count: int = 1
    """At which passage of `point`."""
    clears: bool = False
    """Whether it clears everything now and then."""


class Journal:
    """What a child is about to do and has done, line by line.

    `begin SLOT`, before the slot may change; `durable SLOT KEY`, once the write was acknowledged;
    `clearing` and `cleared`, around a clear.
    """

    def __init__(self, path: str) -> None:
        """Append to `path`."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        self._write = os.write  # the real one: the journal is not the write path

    def note(self, *words: object) -> None:
        """Append one line; it is in the kernel's hands when this returns."""
        self._write(self._descriptor, (" ".join(map(str, words)) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    @staticmethod
    def read(path: str) -> tuple[dict[int, bytes], set[bytes], int]:
        """Return slot -> key of what must be there, keys that must not, and the count of lines.

        There must be what was acknowledged and not touched since, by a clear that had begun
        neither. What a clear that ended covered must not be there, whatever else happened.
        """
        kept: dict[int, bytes] = {}
        known: set[bytes] = set()
        gone: set[bytes] = set()
        lines = Path(path).read_text(encoding="ascii").splitlines() if Path(path).exists() else []
        for line in lines:
            match line.split():
                case ["begin", slot]:
                    kept.pop(int(slot), None)
                case ["durable", slot, key]:
                    kept[int(slot)] = bytes.fromhex(key)
                    known.add(bytes.fromhex(key))
                case ["clearing"]:
                    kept.clear()
                case ["cleared"]:
                    gone |= known
        return kept, gone, len(lines)


def expected_payload(key: bytes) -> bytes:
    """Return the one payload that is ever stored under `key`."""
    return random.Random(key).randbytes(LAYOUT.block_bytes)


def arm(point: str, count: int) -> None:
    """Kill this process at the `count`-th passage of `point`."""
    part, _, moment = point.partition(".")
    left = count

    def passes(found: str) -> bool:
        nonlocal left
        left -= found == part
        return found == part and left == 0

    def wrap(real: Callable[..., Any], classify: Callable[..., str]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if not passes(classify(*arguments)):
                return real(*arguments, **named)
            if moment == "middle":
                _write_half(*arguments)
            elif moment == "after":
                real(*arguments, **named)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("unreachable: SIGKILL cannot be caught")

        return call

    os.pwritev = wrap(os.pwritev, _part_of)
    os.pwrite = wrap(os.pwrite, _part_of)
    os.posix_fallocate = wrap(os.posix_fallocate, lambda *_: "allocate")
    os.fsync = wrap(os.fsync, lambda *_: "flush")
    os.link = wrap(os.link, lambda *_: "publish")


def live(life: Life) -> None:
    """Write, evict, erase and clear at full speed, for ever or until killed."""
    if life.point:
        arm(life.point, life.count)
    luck = random.Random(life.seed)
    journal = Journal(life.journal)
    arena = Arena.create(4 << 20, LAYOUT)
    slab = open_slab(life.places, life.capacity_bytes, LAYOUT)
    written = max([slab.floor, *(block.written for block in slab.recover())])
    news: list[None] = []
    executor = Executor(
        arena, {DISK: slab}, LAYOUT.fingerprint, Limits(), notify=lambda: news.append(None)
    )
    running: dict[TransferId, WriteJob | EraseJob] = {}
    busy: set[int] = set()
    transfer, clear = 0, False
    journal.note("open")
    while True:
        clear = clear or (life.clears and luck.random() < _CLEAR_SHARE)
        if clear and not running:
            journal.note("clearing")
            slab.forget_until(written)
            journal.note("cleared")
            clear = False
        while len(running) < _JOBS and not clear:
            free = [slot for slot in range(slab.grid.slots) if slot not in busy]
            targets = tuple(SlotId(slot) for slot in luck.sample(free, _JOB_BLOCKS))
            transfer += 1
            for slot in targets:
                journal.note("begin", slot)
            busy.update(targets)
            if luck.random() < _ERASE_SHARE:
                running[TransferId(transfer)] = EraseJob(TransferId(transfer), DISK, targets)
            else:
                job = _job(TransferId(transfer), targets, written + 1, luck, arena)
                written += _JOB_BLOCKS
                running[TransferId(transfer)] = job
            assert executor.try_submit(running[TransferId(transfer)])
        for done in executor.poll():
            _note_end(done, running.pop(done.transfer), journal, busy)
        time.sleep(0)


def _note_end(done: JobDone, job: WriteJob | EraseJob, journal: Journal, busy: set[int]) -> None:
    busy.difference_update(job.targets)
    assert all(done.ok), done.reason
    if isinstance(job, WriteJob):
        for slot, key in zip(job.targets, job.keys, strict=True):
            journal.note("durable", slot, key.hex())


def _job(
    transfer: TransferId, targets: Sequence[SlotId], written: int, luck: random.Random, arena: Arena
) -> WriteJob:
    keys = tuple(SequenceHash(luck.randbytes(_KEY_BYTES)) for _ in targets)
    first = int(transfer) * _JOB_BLOCKS % (arena.grid.slots - 8 * _JOB_BLOCKS)
    slots = tuple(SlotId(first + place) for place in range(len(targets)))
    for slot, key in zip(slots, keys, strict=True):
        arena.slot(slot)[:] = expected_payload(key)
    seals = tuple(
        seal(key + LAYOUT.fingerprint, arena.slot(slot))
        for slot, key in zip(slots, keys, strict=True)
    )
    return WriteJob(
        transfer, DISK, slots, tuple(targets), keys, (None,) * len(keys), seals, written
    )


def _part_of(descriptor: int, data: Any, offset: int, *_: Any) -> str:
    """Say what of a slab is being written by `pwrite` or `pwritev`."""
    del descriptor
    length = len(data) if isinstance(data, bytes) else sum(map(len, data))
    if offset == 0:
        return "superblock"
    if length == ENTRY_BYTES:
        return "line"
    return "payload" if length >= LAYOUT.block_bytes else "floor"


def _write_half(descriptor: int, data: Any, offset: int, *_: Any) -> None:
    whole = data if isinstance(data, bytes) else b"".join(map(bytes, data))
    # A direct descriptor takes whole pages only; the same bytes by a plain one mean the same.
    plain = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY)
    os.lseek(plain, offset, os.SEEK_SET)
    os.write(plain, whole[: len(whole) // 2])
