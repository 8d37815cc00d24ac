"""Many replays of one trace: every policy at every capacity, and the tiers that a budget buys."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from kvstrata.core.config import parse_bytes
from kvstrata.core.errors import ConfigError
from kvstrata.core.ids import SequenceHash
from kvstrata.core.tier import Admission, TierKind, TierName
from kvstrata.policy import policy_names
from kvstrata.sim.hardware import Hardware
from kvstrata.sim.replay import BELADY, LowerSlots, Replay, ReplayReport, next_uses
from kvstrata.sim.traces import Trace, TraceError, TraceRequest

__all__ = [
    "CAPACITIES",
    "Cell",
    "Extent",
    "Load",
    "LowerExtent",
    "check_policies",
    "parse_capacities",
    "parse_extents",
    "sweep",
]

CAPACITIES: Final = "1%,3%,5%,10%,20%"
"""Sizes of the host tier where none is given."""
_KEPT_BYTES_MAX: Final = 64 << 20  # a trace file up to this size is read once and kept
_PERCENT: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True, slots=True)
class Extent:
    """A tier's size: bytes, or a fraction of the trace's unique blocks; one of them is None."""

    size_bytes: int | None = None
    """Bytes."""
    fraction: float | None = None
    """Share of all unique blocks, 0 to 1."""

    def slots(self, unique: int, block_bytes: int) -> int:
        """Return how many blocks that is, the floor of either."""
        if self.size_bytes is not None:
            return self.size_bytes // block_bytes
        assert self.fraction is not None
        return int(unique * self.fraction + 1e-9)

    def __str__(self) -> str:
        if self.size_bytes is not None:
            return f"{self.size_bytes / 2**30:.4g} GiB"
        assert self.fraction is not None
        return f"{100 * self.fraction:g}%"


@dataclass(frozen=True, slots=True)
class LowerExtent:
    """A tier below the host as it was asked for."""

    name: TierName
    """What it is called."""
    extent: Extent
    """Its size."""
    admission: Admission
    """Which blocks of the tier above enter it."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy at one size."""

    capacity: float
    """The fraction of unique blocks that was asked for, else host slots over unique blocks."""
    host: Extent
    """The host tier's size as it was asked for."""
    report: ReplayReport
    """What happened."""


class Load:
    """A trace ready to be replayed many times: kept in memory if small, streamed if not."""

    def __init__(self, trace: Trace, progress: Callable[[int], None] | None = None) -> None:
        """Read the trace once, to check every line and to count; raises TraceError."""
        self._trace = trace
        self._kept: list[TraceRequest] | None = [] if trace.size_bytes <= _KEPT_BYTES_MAX else None
        self._future: list[list[int]] = []
        seen: set[SequenceHash] = set()
        self.requests = self.blocks = 0
        for request in trace.read(progress):
            if self._kept is not None:
                self._kept.append(request)
            seen.update(request.blocks)
            self.requests += 1
            self.blocks += len(request.blocks)
        self.unique = len(seen)
        if not self.unique:
            raise TraceError(
                f"{trace.path.name}: no request has a whole block of "
                f"{trace.info.block_tokens} tokens",
                hint="use a smaller block size, or a trace with longer prompts",
            )

    @property
    def block_tokens(self) -> int:
        """Tokens of one block."""
        return self._trace.info.block_tokens

    def __iter__(self) -> Iterator[TraceRequest]:
        return iter(self._trace) if self._kept is None else iter(self._kept)

    def future(self) -> list[list[int]]:
        """Return each block's next use, for Belady's bound; raises TraceError if too large."""
        if self._kept is None:
            raise TraceError(
                f"policy: {BELADY} needs the whole trace in memory, and {self._trace.path.name} "
                f"is larger than {_KEPT_BYTES_MAX >> 20} MiB",
                hint="leave belady out, or replay a piece of the trace",
            )
        if not self._future:
            self._future = next_uses(self._kept)
        return self._future

    def replay(
        self,
        policy: str,
        host_slots: int,
        lower: Sequence[LowerSlots],
        hardware: Hardware,
        progress: Callable[[int], None] | None = None,
        *,
        weigh_costs: bool = False,
    ) -> ReplayReport:
        """Return what `policy` does with tiers of these sizes."""
        tokens = self.block_tokens
        replay = Replay(policy, host_slots, lower, hardware, tokens, weigh_costs=weigh_costs)
        requests: Iterable[TraceRequest] = self
        if progress:
            requests = _told(self, progress)
        replay.play(requests, self.future() if policy == BELADY else ())
        return replay.report()


def sweep(
    load: Load,
    policies: Sequence[str],
    hosts: Sequence[Extent],
    below: Sequence[LowerExtent],
    hardware: Hardware,
    progress: Callable[[int], None] | None = None,
    *,
    weigh_costs: bool = False,
) -> Iterator[Cell]:
    """Yield a cell for every policy and host size; `progress` is told of requests.

    Raises ConfigError for a size that holds no block.
    """
    block_bytes = hardware.block_bytes(load.block_tokens)
    sizes = [(host, _slots("host", host, load, block_bytes)) for host in hosts]
    lower = [
        LowerSlots(each.name, _slots(each.name, each.extent, load, block_bytes), each.admission)
        for each in below
    ]
    for policy in policies:
        for host, slots in sizes:
            report = load.replay(policy, slots, lower, hardware, progress, weigh_costs=weigh_costs)
            fraction = slots / load.unique if host.fraction is None else host.fraction
            yield Cell(fraction, host, report)


def check_policies(names: Sequence[str]) -> list[str]:
    """Return `names`, or all policies if there are none; raises ConfigError for an unknown one."""
    known = [*policy_names(), BELADY]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"policy: unknown policy {name!r}", hint=f"known here: {', '.join(known)}"
            )
    return list(dict.fromkeys(names)) or known


def parse_capacities(text: str) -> list[Extent]:
    """Return the sizes of `1%,5%,2GiB`; raises ConfigError that names the field."""
    found = [_extent(part, "capacity") for part in text.split(",") if part.strip()]
    if not found:
        raise ConfigError("capacity: no size is given", hint="write sizes such as 1%,5%,20GiB")
    return found


def parse_extents(text: str) -> tuple[Extent | None, list[LowerExtent]]:
    """Return the host's size and the tiers below it, of `host:5%,disk:50%:on-evict,disk:2TiB`.

    The host's is None where not said. Raises ConfigError that names the field.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    name, _, size = parts[0].partition(":") if parts else ("", "", "")
    if name != TierKind.HOST.value:
        raise ConfigError(
            "tiers: the first tier is not the host", hint="write host, or host:2GiB,disk:20GiB"
        )
    host = _extent(size, "tiers.host") if size else None
    below: list[LowerExtent] = []
    for part in parts[1:]:
        name, _, size = part.partition(":")
        if name != TierKind.DISK.value:
            raise ConfigError(
                f"tiers: {part!r} is not a tier below the host",
                hint="write host, host:2GiB, or host:5%,disk:50%; no directory is needed here",
            )
        size, _, admission = size.partition(":")
        if admission not in {"", *(each.value for each in Admission)}:
            raise ConfigError(
                f"tiers.disk: {admission!r} is not a way to admit blocks",
                hint=f"known ways: {', '.join(each.value for each in Admission)}",
            )
        if not size:
            raise ConfigError("tiers.disk: no size", hint="write disk:20GiB or disk:50%")
        label = TierName(f"{name}{len(below) + 1 if below else ''}")
        admitted = Admission(admission) if admission else Admission.WRITE_THROUGH
        below.append(LowerExtent(label, _extent(size, f"tiers.{label}"), admitted))
    return host, below


def _extent(text: str, field: str) -> Extent:
    percent = _PERCENT.fullmatch(text)
    if not percent:
        return Extent(size_bytes=parse_bytes(text, field=field))
    fraction = float(percent[1]) / 100
    if not 0 < fraction <= 1:
        raise ConfigError(
            f"{field}: {text.strip()!r} is outside 0% to 100%",
            hint="percentages are of the trace's unique blocks",
        )
    return Extent(fraction=fraction)


def _slots(field: str, extent: Extent, load: Load, block_bytes: int) -> int:
    slots = extent.slots(load.unique, block_bytes)
    if slots < 1:
        raise ConfigError(
            f"{field}: {extent} does not hold one block of {block_bytes:,} bytes "
            f"({load.unique:,} unique blocks in the trace)",
            hint="give it more, or state another kv_bytes_per_token with --hardware",
        )
    return slots


def _told(load: Iterable[TraceRequest], progress: Callable[[int], None]) -> Iterator[TraceRequest]:
    for number, request in enumerate(load, 1):
        yield request
        if number % 256 == 0:
            progress(256)
