"""Which backend moves blocks between host and disk, found by doing the daemon's own jobs.

What is compared is the whole job: our threads seal a block while they move it, another mover has
its seals computed in a stage of their own. So each candidate gets an executor over a small slab
and arena of its own in the tier's directory, and writes and reads them in turns with the others.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from kvstrata.core.config import Limits
from kvstrata.core.errors import ConfigError, KvstrataError, TransferError
from kvstrata.core.ids import SequenceHash, SlotId, TransferId
from kvstrata.core.plugins import find_plugin, load_plugin
from kvstrata.core.tier import DISK
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.arena import Arena
from kvstrata.storage.base import PAGE_BYTES
from kvstrata.storage.entry import ENTRY_BYTES
from kvstrata.storage.seal import seal
from kvstrata.storage.slab import Slab
from kvstrata.transfer.backends.guarded import FILE_PAIRS, GuardedBackend
from kvstrata.transfer.backends.nixl.agent import NixlAgent
from kvstrata.transfer.backends.nixl.backend import NixlBackend
from kvstrata.transfer.backends.nixl.binding import nixl_version
from kvstrata.transfer.backends.posix import PosixBackend
from kvstrata.transfer.base import JobDone, ReadJob, TransferBackend, WriteJob
from kvstrata.transfer.executor import Executor
from kvstrata.transfer.registry import (
    ENTRY_POINTS,
    SHIPPED,
    Candidate,
    backend_names,
    better,
    make_backend,
)

__all__ = [
    "MoverChoice",
    "check_mover",
    "choose_mover",
    "decide",
    "installed",
    "make_mover",
    "mover_names",
    "try_movers",
]

AUTO: Final = "auto"
OWN: Final = "posix"
"""Our threads, which need no fence and seal on the way."""

_LINE_THREADS: Final = 2  # beside another mover our threads move index lines only
_BLOCK_BYTES: Final = 1 << 20
_BLOCKS: Final = 16
_JOB_BLOCKS: Final = 4
_TURNS_MAX: Final = 5
_BUDGET_S: Final = 1.0  # then nobody begins another turn
_TIMEOUT_S: Final = 5.0  # of one turn
_REMEDY: Final = "run kvstrata doctor, or leave the backend out: posix serves files everywhere"
_LAYOUT: Final = BlockLayout((Dimension("byte", _BLOCK_BYTES),), "int8", 8, "trial")


@dataclass(frozen=True, slots=True)
class MoverChoice:
    """What moves a daemon's blocks between host and disk, and why."""

    name: str | None
    """The backend; None if nothing that was tried works."""
    setting: str
    """What the operator asked for: a name, or `auto`."""
    reason: str
    """Why it, in one sentence."""
    candidates: tuple[Candidate, ...] = ()
    """What was tried, with whole jobs."""


def mover_names() -> list[str]:
    """Return every name that may move files here, ours first."""
    return [OWN, *(name for name in backend_names() if name not in {OWN, "memcpy"})]


def installed(name: str) -> bool:
    """Whether there is something to try under this name; loads nothing."""
    return name != NixlBackend.name or nixl_version() is not None


def check_mover(setting: str) -> None:
    """Raise ConfigError for a name that nobody offers or whose package cannot be loaded."""
    if setting == AUTO or setting in SHIPPED:
        return
    known = [AUTO, *SHIPPED]
    load_plugin(find_plugin(ENTRY_POINTS, setting, what="backend", known=known), what="backend")


def make_mover(
    name: str,
    limits: Limits,
    *,
    jobs_max: int = 1024,
    notify: Callable[[], None] = lambda: None,
) -> TransferBackend:
    """Return a new mover of files: our threads, or another backend in its fence.

    Raises ConfigError if it cannot be made or does not move both ways between memory and files.
    """
    if name == OWN:
        return PosixBackend(
            threads=limits.transfer_threads, queue_transfers_max=jobs_max, notify=notify
        )
    if name == NixlBackend.name:  # no peers are reached from here: without UCX it starts sooner
        agent = NixlAgent({"POSIX": {"use_aio": "true"}})
        inner: TransferBackend = NixlBackend(agent, queue_transfers_max=jobs_max, notify=notify)
    else:
        inner = make_backend(name, notify=notify)
    if not inner.capabilities() >= FILE_PAIRS:
        with contextlib.suppress(Exception):
            inner.close()
        raise ConfigError(
            f"backend: {name} does not move both ways between memory and files",
            hint=f"leave it out, or name one that does: {', '.join(mover_names())}; kvstrata "
            "doctor tries each",
        )
    lines = PosixBackend(threads=_LINE_THREADS, queue_transfers_max=2 * jobs_max, notify=notify)
    return GuardedBackend(inner, lines, name=name, queue_transfers_max=jobs_max)


def choose_mover(
    setting: str,
    directory: Path | None,
    limits: Limits,
    progress: Callable[[str], None] = lambda _: None,
) -> MoverChoice:
    """Return what a daemon with this setting uses for a disk tier in `directory`.

    Ours needs no trial. Another one that is named is tried once and refused with ConfigError if it
    cannot be made or does not bring back what it wrote. `auto` lets all take turns in `directory`
    and falls back to ours; without a directory there is nothing to compare.
    """
    if setting == OWN:
        return MoverChoice(OWN, setting, "it is the setting")
    if setting != AUTO:
        places = [directory, None] if directory else [None]  # a full disk has no room for a trial
        (found,) = try_movers([setting], places, limits, progress, turns_max=1)
        if not found.usable:
            raise ConfigError(f"backend: {found.why}", hint=found.remedy or _REMEDY)
        return MoverChoice(setting, setting, "it is the setting", (found,))
    if directory is None:
        return MoverChoice(OWN, setting, "there is no directory of a disk tier to try others in")
    if not (others := [name for name in mover_names() if name != OWN and installed(name)]):
        return MoverChoice(OWN, setting, "no other is installed")
    choice = decide(setting, try_movers([OWN, *others], [directory], limits, progress))
    return choice if choice.name else replace(choice, name=OWN)


def decide(setting: str, candidates: Iterable[Candidate]) -> MoverChoice:
    """Return the choice among what was tried; `name` is None if what was asked for is unusable."""
    tried = tuple(candidates)
    best, reason = better(tried)
    if setting == AUTO:
        return MoverChoice(best, setting, reason, tried)
    works = any(each.usable for each in tried if each.name == setting)
    reason = f"{setting} is the setting; auto would take {best or 'none'}: {reason}"
    return MoverChoice(setting if works else None, setting, reason, tried)


def try_movers(
    names: Iterable[str],
    places: Sequence[Path | None],
    limits: Limits,
    progress: Callable[[str], None] = lambda _: None,
    *,
    turns_max: int = _TURNS_MAX,
) -> list[Candidate]:
    """Let movers take turns at writing and reading 16 blocks of 1 MiB; say what came of each.

    In the first of these directories that has room; None is where temporary files go. Nobody
    begins another turn after `_BUDGET_S`.
    """
    with contextlib.ExitStack() as opened:
        trials: dict[str, _Trial] = {}
        failed: dict[str, ConfigError] = {}
        for name in names:
            progress(f"trying backend {name} between memory and files")
            try:
                trials[name] = opened.enter_context(
                    contextlib.closing(_Trial(name, places, limits))
                )
            except ConfigError as error:
                failed[name] = error
        end = time.monotonic() + _BUDGET_S
        for _ in range(turns_max):
            for name in [name for name in trials if name not in failed]:
                try:
                    trials[name].run()
                except TransferError as error:
                    failed[name] = ConfigError(f"{name}: {error}", hint=_REMEDY)
            if time.monotonic() >= end:
                break
        return [
            Candidate(name, usable=False, why=failed[name].message, remedy=failed[name].hint)
            if name in failed
            else trials[name].told()
            for name in [*trials, *(name for name in failed if name not in trials)]
        ]


class _Trial:
    """One mover under an executor, over a slab and an arena that nobody else has."""

    def __init__(self, name: str, places: Sequence[Path | None], limits: Limits) -> None:
        """Raises ConfigError if the mover cannot be made or the slab not be laid down."""
        self._name = name
        self._news = threading.Semaphore(0)
        self._turn = self._transfer = 0
        self._seconds: list[float] = []
        with contextlib.ExitStack() as opened:
            mover = make_mover(name, limits, notify=self._news.release)
            opened.callback(mover.close)
            self._arena = Arena.create(2 * _BLOCKS * (_BLOCK_BYTES + 8) + 3 * PAGE_BYTES, _LAYOUT)
            opened.callback(self._arena.close)
            self._slab = _open_slab(name, places)
            opened.callback(self._slab.close)
            self._executor = Executor(
                self._arena,
                {DISK: self._slab},
                _LAYOUT.fingerprint,
                limits,
                notify=self._news.release,
                mover=mover,
            )
            opened.pop_all()
        luck = random.Random(1)  # noqa: S311  # any bytes will do
        data = luck.randbytes(_BLOCK_BYTES)
        self._keys = [SequenceHash(luck.randbytes(16)) for _ in range(_BLOCKS)]
        for slot, key in enumerate(self._keys):
            self._arena.slot(slot)[:] = data
            self._arena.slot(slot)[: len(key)] = key
            self._arena.slot(_BLOCKS + slot)[:] = bytes(_BLOCK_BYTES)  # pages that are there
        self._seals = [
            seal(key + _LAYOUT.fingerprint, self._arena.slot(slot))
            for slot, key in enumerate(self._keys)
        ]

    def run(self) -> None:
        """Write every block and read it to another place; raises TransferError if it fails.

        Places change each turn, so that a mover which does nothing brings back another block.
        """
        self._turn += 1
        places = [(block + self._turn) % _BLOCKS for block in range(_BLOCKS)]
        began = time.perf_counter()
        self._move([self._write(part, places) for part in _parts()])
        self._move([self._read(part, places) for part in _parts()])
        self._seconds.append(time.perf_counter() - began)

    def told(self) -> Candidate:
        """Return how fast the quickest turn was."""
        speed = 2 * _BLOCKS * _BLOCK_BYTES / min(self._seconds) / 1e9
        why = f"{self._name} wrote and read blocks at {speed:.2f} GB/s"
        return Candidate(self._name, usable=True, why=why, gb_per_s=speed)

    def close(self) -> None:
        """Stop the mover, give everything back."""
        self._executor.close()
        self._arena.close()
        self._slab.close()

    def _write(self, part: range, places: list[int]) -> WriteJob:
        self._transfer += 1
        return WriteJob(
            TransferId(self._transfer),
            DISK,
            tuple(SlotId(block) for block in part),
            tuple(SlotId(places[block]) for block in part),
            tuple(self._keys[block] for block in part),
            (None,) * len(part),
            tuple(self._seals[block] for block in part),
            self._transfer * _BLOCKS,
        )

    def _read(self, part: range, places: list[int]) -> ReadJob:
        self._transfer += 1
        return ReadJob(
            TransferId(self._transfer),
            DISK,
            tuple(SlotId(places[block]) for block in part),
            tuple(SlotId(_BLOCKS + places[block]) for block in part),
            tuple(self._keys[block] for block in part),
        )

    def _move(self, jobs: list[Any]) -> None:
        wanted = {
            job.transfer: [self._seals[self._keys.index(key)] for key in job.keys] for job in jobs
        }
        for job in jobs:
            assert self._executor.try_submit(job), "more jobs than an executor takes"
        end = time.monotonic() + _TIMEOUT_S
        while wanted:
            if not self._news.acquire(timeout=max(0.0, end - time.monotonic())):
                raise TransferError(f"nothing moved within {_TIMEOUT_S:.0f} s", retryable=False)
            for done in self._executor.poll():
                _check(done, wanted.pop(done.transfer))


def _parts() -> list[range]:
    return [range(at, at + _JOB_BLOCKS) for at in range(0, _BLOCKS, _JOB_BLOCKS)]


def _check(done: JobDone, seals: list[bytes]) -> None:
    if not all(done.ok):
        raise TransferError(done.reason, retryable=False)
    if list(done.checksums) != seals:
        raise TransferError("other bytes came back than it had written", retryable=False)


def _open_slab(name: str, places: Sequence[Path | None]) -> Slab:
    """Return a slab that has no name any more: it is gone however this process ends."""
    capacity = _BLOCKS * (_BLOCK_BYTES + ENTRY_BYTES) + 3 * PAGE_BYTES
    errors: list[str] = []
    for place in places:
        try:
            with tempfile.TemporaryDirectory(prefix=".kvstrata-trial-", dir=place) as folder:
                return Slab.open(folder, capacity, _LAYOUT)
        except (OSError, KvstrataError) as error:  # not the backend's fault
            errors.append(str(error))
    where = " or ".join(str(place or tempfile.gettempdir()) for place in places)
    raise ConfigError(
        f"{name}: cannot be tried with files: {'; '.join(errors)}",
        hint=f"check that {where} can be written to and has 16 MiB left",
    )
