"""Which copier moves blocks of a layout in a direction: every one is tried, for a moment, at start.

A copier is believed only after it has moved random bytes into poison, twice, with every byte of
the target right, those between the runs included. What cannot be made, fails, is wrong or is not
done in time is not chosen, and the reason is kept. Owner: the thread that starts the worker; this
waits, so it never runs beside the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from kvstrata.core.errors import ConfigError, KvstrataError, TransferError
from kvstrata.transfer.cuda.copier import RunCopier
from kvstrata.transfer.cuda.movers import RunMover
from kvstrata.transfer.cuda.runtime import CudaStreams
from kvstrata.transfer.cuda.tables import RunTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "AUTO",
    "COPIERS",
    "DIRECTIONS",
    "CopierChoice",
    "CopierTry",
    "CopyShape",
    "ProbeMemory",
    "TryLimits",
    "Trying",
    "check_copier_name",
    "choose_copier",
    "probe_tables",
]

COPIERS: Final = ("batch", "runs", "triton", "torch")
"""Every copier; an earlier one is kept unless a later one is clearly faster.

Those that leave the multiprocessors to the model come first, the naive one last.
"""

AUTO: Final = "auto"
"""The setting that lets a trial decide."""

DIRECTIONS: Final = ("to_host", "to_device")
"""Out of the engine's caches, and into them."""

_MARGIN: Final = 1.25  # as `transfer.registry`: less is noise
_POISONS: Final = (0xEE, 0x11)  # two: a byte that happens to be the poison is not right by luck
_SEED: Final = 6
_REMEDY: Final = "update or remove its library, or set device_copier to another one; report it"


@dataclass(frozen=True, slots=True)
class CopyShape:
    """How blocks of a layout lie on the device; on the host they are whole, layer by layer."""

    name: str
    """What people call it, such as `nhd`."""
    layers: int
    """Layers that are told apart."""
    parts: int
    """Contiguous runs of one block in one layer: 2 where K and V lie apart."""
    run_bytes: int
    """Length of one of them."""
    blocks: int = 32
    """How many blocks a try moves."""

    @property
    def total_bytes(self) -> int:
        """What one try moves."""
        return self.layers * self.parts * self.run_bytes * self.blocks

    @property
    def pages(self) -> int:
        """Pages on the device: some are left out, as in an engine's cache."""
        return self.blocks + max(1, self.blocks // 8)

    @property
    def device_bytes(self) -> int:
        """What a try needs on the device; one run more, which nothing may write to."""
        return self.run_bytes * (self.layers * self.parts * self.pages + 1)

    @property
    def host_bytes(self) -> int:
        """The same on the host."""
        return self.total_bytes + self.run_bytes


class ProbeMemory(Protocol):
    """A buffer on either side that nobody else uses; the host's is page-locked."""

    device_address: int
    """First byte of the device's buffer."""
    host_address: int
    """First byte of the host's."""
    tensors: Sequence[Any]
    """Both as torch's tensors, for the copier that is torch's."""

    def write(self, direction: str, source: NDArray[np.uint8], poison: int) -> None:
        """Put `source` where `direction` reads, `poison` where it writes; returns when done."""
        ...

    def read(self, direction: str) -> NDArray[np.uint8]:
        """Return all that lies where `direction` writes."""
        ...

    def keep(self) -> None:
        """Never give the buffers back: a copy that did not end may still use them."""
        ...


@dataclass(frozen=True, slots=True)
class TryLimits:
    """How long trying may take."""

    budget_s: float = 0.2
    """For the timed copies of one shape and direction, of all copiers together."""
    rounds_max: int = 7
    """Timed copies of one copier."""
    wait_s: float = 2.0
    """Longest wait for one copy to end."""


@dataclass(frozen=True, slots=True)
class Trying:
    """What a trial is made with; `now` and `pause` make it independent of the machine's clock."""

    streams: CudaStreams
    """The device."""
    makers: Mapping[str, Callable[[], RunMover]]
    """Each copier by name; ConfigError where it cannot work here."""
    now: Callable[[], float]
    """Seconds."""
    pause: Callable[[], None]
    """Called between two looks whether a copy ended."""
    limits: TryLimits = TryLimits()
    """How long it may take."""


@dataclass(frozen=True, slots=True)
class CopierTry:
    """What came of one copier."""

    name: str
    """The copier."""
    usable: bool
    """Whether it could be made and moved every byte."""
    why: str
    """How fast it was, or why it is not usable."""
    remedy: str = ""
    """What to do if it is to be used; empty if nothing helps or nothing is wrong."""
    gb_per_s: float | None = None
    """How fast it was; None if it was not timed."""


@dataclass(frozen=True, slots=True)
class CopierChoice:
    """Which copier moves blocks of one shape in one direction, and why."""

    shape: str
    """The shape's name."""
    direction: str
    """One of `DIRECTIONS`."""
    name: str | None
    """The copier; None if none can."""
    reason: str
    """Why it, in one sentence."""
    tries: tuple[CopierTry, ...]
    """Every copier."""


def check_copier_name(name: str) -> None:
    """Raise ConfigError unless `name` is a copier, or lets a trial decide."""
    if name != AUTO and name not in COPIERS:
        raise ConfigError(
            f"device_copier: there is no {name!r}", hint=f"use {', '.join((AUTO, *COPIERS))}"
        )


def choose_copier(
    shape: CopyShape,
    direction: str,
    trying: Trying,
    memory: ProbeMemory,
    *,
    forced: str = AUTO,
) -> CopierChoice:
    """Try every copier, or the forced one alone; a forced one must be exact too.

    Equal times choose the same: the order of `COPIERS` decides. Raises ConfigError for a name that
    there is not, TransferError if a copy never ended: then no copier can be trusted.
    """
    check_copier_name(forced)
    contest = _Contest(shape, direction, trying, memory)
    tries = contest.run([name for name in COPIERS if forced in {AUTO, name}])
    name, reason = _best(tries)
    if name and forced != AUTO:
        reason = f"{name} is the setting: {reason}"
    return CopierChoice(shape.name, direction, name, reason, tuple(tries))


def probe_tables(
    shape: CopyShape, direction: str, device_address: int, host_address: int
) -> list[RunTable]:
    """Return the runs of a try, layer by layer: pages in random order, always the same."""
    pages = np.random.default_rng(_SEED).permutation(shape.pages)[: shape.blocks]
    blocks, outer, found = np.arange(shape.blocks), shape.layers * shape.parts, []
    for layer in range(shape.layers):
        parts = np.arange(layer * shape.parts, (layer + 1) * shape.parts)[:, None]
        device = ((parts * shape.pages + pages) * shape.run_bytes + device_address).ravel()
        host = ((blocks * outer + parts) * shape.run_bytes + host_address).ravel()
        source, target = (device, host) if direction == "to_host" else (host, device)
        found.append(RunTable(source, target, np.full(len(host), shape.run_bytes, np.int64)))
    return found


# -- private ---------------------------------------------------------------------------------------


class _Contest:
    """One shape and direction: the copiers that are still in it, and what each needed."""

    def __init__(
        self, shape: CopyShape, direction: str, trying: Trying, memory: ProbeMemory
    ) -> None:
        self._shape, self._trying, self._memory = shape, trying, memory
        self._direction = direction
        self._tables = probe_tables(shape, direction, memory.device_address, memory.host_address)
        self._engine = trying.streams.stream_create()
        self._seconds: dict[str, list[float]] = {}
        self._refused: dict[str, CopierTry] = {}
        self._spent_s = 0.0
        self._stuck = False

    def run(self, names: Sequence[str]) -> list[CopierTry]:
        copiers: dict[str, RunCopier] = {}
        try:
            for name in names:
                self._enter(name, copiers)
            for name in [*copiers] * self._trying.limits.rounds_max:
                if name not in self._refused and self._spent_s < self._trying.limits.budget_s:
                    self._guarded(name, partial(self._timed, name, copiers[name]))
        finally:
            self._close(copiers)
        return [self._refused.get(name) or self._good(name) for name in names]

    def _close(self, copiers: dict[str, RunCopier]) -> None:
        """Give the streams back; if a copy is in flight, keep the memory that it uses."""
        if self._stuck or any(copier.close() for copier in copiers.values()):
            self._memory.keep()
        else:
            self._trying.streams.stream_destroy(self._engine)

    def _enter(self, name: str, copiers: dict[str, RunCopier]) -> None:
        """Make a copier and see that it is exact; its first copy, which may compile, is not timed.

        The second one is, so that each copier has a time even if the budget is short.
        """

        def enter() -> None:
            make = self._trying.makers.get(name)
            if make is None:
                raise ConfigError(f"{name} is left out", hint="take it into the copiers again")
            streams = self._trying.streams
            copiers[name] = RunCopier(streams, tickets_max=1, mover=make())
            for at, poison in enumerate(_POISONS):
                source = self._source(at)
                self._memory.write(self._direction, source, poison)
                if at:
                    self._timed(name, copiers[name])
                else:
                    self._copied(copiers[name])
                self._check(source, poison)

        self._guarded(name, enter)

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        """Refuse a copier that raises; let only a copy that never ended pass."""
        try:
            call()
        except Exception as error:  # a copier's library may raise anything
            if self._stuck:
                raise
            known = isinstance(error, KvstrataError)
            why = str(error) if known else f"{type(error).__name__}: {error}"
            remedy = _REMEDY
            if isinstance(error, ConfigError):
                why, remedy = error.message, error.hint or _REMEDY
            self._refused[name] = CopierTry(name, usable=False, why=why, remedy=remedy)

    def _timed(self, name: str, copier: RunCopier) -> None:
        took_s = self._copied(copier)
        self._spent_s += took_s
        self._seconds.setdefault(name, []).append(took_s)

    def _copied(self, copier: RunCopier) -> float:
        """Copy once and wait for the end; return the seconds."""
        now, pause = self._trying.now, self._trying.pause
        began = now()
        ticket = copier.submit(self._tables, self._engine)
        ends = now() + self._trying.limits.wait_s
        while not copier.poll():
            if now() > ends:
                self._stuck = True
                raise TransferError(
                    f"a copy has not ended after {self._trying.limits.wait_s} s",
                    retryable=False,
                )
            pause()
        if ticket.error:
            raise ticket.error
        return now() - began

    def _source(self, number: int) -> NDArray[np.uint8]:
        luck = np.random.default_rng((_SEED, number))
        return luck.integers(0, 256, self._lengths()[0], np.uint8)

    def _check(self, source: NDArray[np.uint8], poison: int) -> None:
        """Compare the whole target with what one copy a run makes of it."""
        wanted = np.full(self._lengths()[1], poison, np.uint8)
        for table in probe_tables(self._shape, self._direction, 0, 0):
            for at, to, length in zip(table.sources, table.targets, table.lengths, strict=True):
                wanted[to : to + length] = source[at : at + length]
        got = self._memory.read(self._direction)
        if got.shape != wanted.shape or not np.array_equal(got, wanted):
            wrong = int((got != wanted).sum()) if got.shape == wanted.shape else wanted.size
            raise TransferError(f"{wrong} of {wanted.size} bytes were wrong", retryable=False)

    def _lengths(self) -> tuple[int, int]:
        sides = self._shape.device_bytes, self._shape.host_bytes
        return sides if self._direction == "to_host" else sides[::-1]

    def _good(self, name: str) -> CopierTry:
        speed = self._shape.total_bytes / max(min(self._seconds[name]), 1e-9) / 1e9
        why = f"{name} moved {speed:.2f} GB/s"
        return CopierTry(name, usable=True, why=why, gb_per_s=speed)


def _best(tries: Sequence[CopierTry]) -> tuple[str | None, str]:
    usable = [each for each in tries if each.usable]
    if not usable:
        return None, "no copier works here"
    best = usable[0]
    for each in usable:
        if (each.gb_per_s or 0) > _MARGIN * (best.gb_per_s or 0):
            best = each
    others = ", ".join(each.why for each in usable if each is not best)
    if not others:
        return best.name, best.why
    if best is usable[0]:
        return best.name, f"{best.why}, kept unless another is {_MARGIN - 1:.0%} faster: {others}"
    return best.name, f"{best.why}, clearly more than the others: {others}"
