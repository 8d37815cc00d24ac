"""Backends by name, and which one serves a pair of regions best here.

Shipped ones and those that other packages offer by entry point are treated alike: each is made,
asked for its capabilities, and tried for a moment on every pair that it declares. What cannot be
made or tried is not chosen, and the reason is kept.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from kvstrata.core.errors import ConfigError, TransferError
from kvstrata.core.ids import TransferId
from kvstrata.core.plugins import Plugin, check_verbs, find_plugin, load_plugin, plugins, said
from kvstrata.storage.base import MemoryRegion
from kvstrata.transfer.backends.memcpy import MemcpyBackend
from kvstrata.transfer.backends.nixl.backend import NixlBackend
from kvstrata.transfer.backends.posix import PosixBackend
from kvstrata.transfer.base import CopyOp, Outcome, TransferBackend

__all__ = [
    "ENTRY_POINTS",
    "PAIRS",
    "SHIPPED",
    "Candidate",
    "Choice",
    "MakeBackend",
    "Pair",
    "backend_names",
    "better",
    "choose",
    "make_backend",
]

Pair = tuple[str, str]
"""What a backend moves from and to: `memory`, `file`, `peer`."""


class MakeBackend(Protocol):
    """Makes a backend; `notify` is called from its threads after each completion."""

    def __call__(self, *, notify: Callable[[], None]) -> TransferBackend:
        """Return a new backend; raises ConfigError if it cannot work here."""


ENTRY_POINTS: Final = "kvstrata.backends"
"""Entry point group; each entry is a `MakeBackend`."""

SHIPPED: Final[Mapping[str, MakeBackend]] = {
    "memcpy": MemcpyBackend,
    "posix": PosixBackend,
    "nixl": NixlBackend,
}
"""The backends of this package; an earlier one is kept unless a later one is clearly faster."""

PAIRS: Final[tuple[Pair, ...]] = (
    ("memory", "memory"),
    ("memory", "peer"),
    ("peer", "memory"),
)
"""What a node moves, files left out: who moves those is found with whole jobs (`mover.py`)."""

_KINDS: Final = frozenset({"memory", "file", "peer", "sealed memory"})
_DECLARABLE: Final = frozenset((source, target) for source in _KINDS for target in _KINDS)
_TEXT_MAX: Final = 200
_VERBS: Final = ("submit", "poll", "cancel", "capabilities", "close")
_MARGIN: Final = 1.25  # less is noise, and a choice that changes with noise explains nothing
_PROBE_BYTES: Final = 16 << 20
_PROBE_BLOCK_BYTES: Final = 1 << 20
_PROBE_ROUNDS: Final = 7
_PROBE_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """What came of one backend for one pair."""

    name: str
    """The backend."""
    usable: bool
    """Whether it could be made, serves the pair, and moved bytes."""
    why: str
    """How fast it was, or why it is not usable."""
    remedy: str = ""
    """What to do if it is to be used; empty if nothing helps or nothing is wrong."""
    gb_per_s: float | None = None
    """How fast it was; None if it was not tried."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which backend serves a pair, and why."""

    pair: Pair
    """Source and target."""
    name: str | None
    """The backend; None if none can."""
    reason: str
    """Why it, in one sentence."""
    candidates: tuple[Candidate, ...]
    """Every backend that declares the pair or that could not be made."""


def backend_names() -> list[str]:
    """Return every name that `make_backend` knows here, shipped ones first."""
    return [*SHIPPED, *(name for name in plugins(ENTRY_POINTS) if name not in SHIPPED)]


def make_backend(name: str, *, notify: Callable[[], None] = lambda: None) -> TransferBackend:
    """Return a new backend.

    Raises ConfigError for a name nobody offers, or two packages do, for one that cannot work here,
    and for a plug-in that cannot be loaded, is no backend, or declares capabilities that are none.
    A plug-in cannot take the name of a shipped backend.
    """
    if name in SHIPPED:
        return SHIPPED[name](notify=notify)
    return _make(find_plugin(ENTRY_POINTS, name, what="backend", known=SHIPPED), notify)


def choose(
    pairs: Iterable[Pair] = PAIRS, *, progress: Callable[[str], None] = lambda _: None
) -> list[Choice]:
    """Try every backend on every pair that it declares; return the choice for each pair.

    Pairs with a peer are chosen by capability, since there is no peer to try. Takes about a second.
    """
    broken: list[Candidate] = []
    opened: dict[str, _Opened] = {}
    try:
        for name in backend_names():
            progress(f"trying backend {name}")
            told = threading.Event()
            try:
                opened[name] = _Opened(make_backend(name, notify=told.set), told)
            except ConfigError as error:
                broken.append(Candidate(name, usable=False, why=error.message, remedy=error.hint))
        return [_choose(pair, [*_race(opened, pair), *broken]) for pair in pairs]
    finally:
        for each in opened.values():
            each.backend.close()


class _Opened(NamedTuple):
    backend: TransferBackend
    told: threading.Event


def better(candidates: Iterable[Candidate]) -> tuple[str | None, str]:
    """Return the best of what was tried and why: an earlier one unless another is clearly faster.

    The name is None if none is usable.
    """
    usable = [each for each in candidates if each.usable]
    if not usable:
        return None, "no backend here moves this"
    best = usable[0]
    for each in usable:
        if (each.gb_per_s or 0) > _MARGIN * (best.gb_per_s or 0):
            best = each
    if best.gb_per_s is None:
        return best.name, f"{best.name} declares it; it cannot be tried without a peer"
    reason, others = best.why, ", ".join(each.why for each in usable if each is not best)
    if others and best is usable[0]:
        reason += f", kept unless another is {_MARGIN - 1:.0%} faster: {others}"
    elif others:
        reason += f", clearly more than the others: {others}"
    return best.name, reason


def _choose(pair: Pair, candidates: list[Candidate]) -> Choice:
    return Choice(pair, *better(candidates), tuple(candidates))


def _race(opened: Mapping[str, _Opened], pair: Pair) -> list[Candidate]:
    """Try every backend that declares the pair, in turns, so that a busy moment meets all."""
    racing = {name: each for name, each in opened.items() if pair in each.backend.capabilities()}
    if "peer" in pair:
        return [Candidate(name, usable=True, why=f"{name} declares it") for name in racing]
    seconds: dict[str, list[float]] = {name: [] for name in racing}
    failed: dict[str, str] = {}
    source, target = _memory(), _memory()
    for name in [*racing] * _PROBE_ROUNDS:
        if name in failed:
            continue
        try:
            seconds[name].append(_time_move(racing[name], source, target))
        except Exception as error:  # noqa: BLE001 - a plug-in may raise anything
            failed[name] = str(error)
    return [
        Candidate(name, usable=False, why=f"{name}: {failed[name]}")
        if name in failed
        else _timed(name, min(seconds[name]))
        for name in racing
    ]


def _timed(name: str, seconds: float) -> Candidate:
    speed = _PROBE_BYTES / seconds / 1e9
    return Candidate(name, usable=True, why=f"{name} moved {speed:.2f} GB/s", gb_per_s=speed)


def _memory() -> MemoryRegion:
    view = memoryview(mmap.mmap(-1, _PROBE_BYTES))
    view[:] = bytes(_PROBE_BYTES)  # pages that are not there yet would be measured too
    return MemoryRegion(view)


def _time_move(opened: _Opened, source: MemoryRegion, target: MemoryRegion) -> float:
    backend, told = opened
    ops = [
        CopyOp(at, at, _PROBE_BLOCK_BYTES, index)
        for index, at in enumerate(range(0, _PROBE_BYTES, _PROBE_BLOCK_BYTES))
    ]
    told.clear()
    begin = time.perf_counter()
    if not backend.submit(TransferId(1), ops, source, target):
        raise TransferError("it accepts no transfer", retryable=False)
    while not (completions := backend.poll()):
        left = begin + _PROBE_TIMEOUT_S - time.perf_counter()
        if left <= 0 or not told.wait(left):
            raise TransferError(f"no answer within {_PROBE_TIMEOUT_S} s", retryable=False)
        told.clear()
    took = time.perf_counter() - begin
    if completions[0].outcome is not Outcome.DONE:
        raise TransferError(completions[0].reason, retryable=False)
    return took


def _make(plugin: Plugin, notify: Callable[[], None]) -> TransferBackend:
    make = load_plugin(plugin, what="backend")
    try:
        made = make(notify=notify)
    except ConfigError:
        raise
    except Exception as error:  # whatever a plug-in raises: say whose it is
        raise ConfigError(
            f"backend: plug-in {plugin} cannot be made: {said(error)}",
            hint=f"mend, update or uninstall {plugin.distribution}",
        ) from error
    check_verbs(made, _VERBS, plugin, what="backend", page="transfer-backend.md")
    backend: TransferBackend = made
    declared: frozenset[object]
    try:
        declared = frozenset(backend.capabilities())
    except Exception as error:  # noqa: BLE001  # it is refused, with its own words
        declared = frozenset({said(error)})
    if not declared or not declared <= _DECLARABLE:
        with contextlib.suppress(Exception):
            backend.close()
        wrong = sorted(map(repr, declared - _DECLARABLE)) or ["nothing"]
        raise ConfigError(
            f"backend: plug-in {plugin} declares {', '.join(wrong)[:_TEXT_MAX]} as capabilities",
            hint=f"declare pairs of {', '.join(sorted(_KINDS))}, see "
            "docs/contracts/transfer-backend.md",
        )
    return backend
