"""The operations of one very long request, in a small and in a very large pool, per policy.

8,192 blocks are half a million tokens. The large pool does not fit into any processor cache: what
it costs there is what memory costs.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from interleave import Cost, interleave
from sides import Chain, Limit, Ours, Side

__all__ = ["FULL_SCALES", "QUICK_SCALES", "Scaled", "measure_scales", "ratios"]

CHAIN_BLOCKS = 8192
FULL_SCALES = (10_240, 1 << 20)
QUICK_SCALES = (10_240,)
ROUNDS = 7
POLICIES = ("lru", "arc")


@dataclass(frozen=True, slots=True)
class Scaled:
    """One line of the report."""

    operation: str
    """lookup, store_evict_POLICY or pin_unpin."""
    slots: int
    """Resident blocks."""
    costs: Mapping[str, Cost]
    """Side -> microseconds per block."""
    resident_bytes: int
    """Memory that ours takes per resident block, keys included; 0 where it was not measured."""

    def record(self) -> dict[str, Any]:
        """Return the line as JSON has it."""
        line: dict[str, Any] = {"operation": self.operation, "slots": self.slots}
        for side, cost in self.costs.items():
            line[f"{side}_us"] = round(cost.median, 4)
        if "peer" in self.costs:
            line["theirs_over_ours"] = round(
                self.costs["peer"].median / self.costs["ours"].median, 2
            )
        if self.resident_bytes:
            line["resident_bytes"] = self.resident_bytes
        return line


def measure_scales(
    peer: Callable[..., Side] | None, scales: tuple[int, ...], progress: Callable[[str], None]
) -> Iterator[Scaled]:
    """Yield every line, small pool first."""
    for slots in scales:
        for policy in POLICIES:
            progress(f"{slots} blocks, {policy}")
            yield from _measure(peer, slots, policy)


def ratios(lines: list[Scaled]) -> dict[str, float]:
    """Return theirs over ours in the largest pool; empty without a peer."""
    largest = max((line.slots for line in lines), default=0)
    return {
        line.operation: round(line.costs["peer"].median / line.costs["ours"].median, 2)
        for line in lines
        if line.slots == largest and "peer" in line.costs
    }


def _measure(peer: Callable[..., Side] | None, slots: int, policy: str) -> Iterator[Scaled]:
    luck = random.Random(slots)

    def chain() -> Chain:
        return [luck.randbytes(16) for _ in range(CHAIN_BLOCKS)]

    residents = [chain() for _ in range(slots // CHAIN_BLOCKS)]
    before = _resident_bytes()
    sides: dict[str, Side] = {"ours": Ours(slots, policy)}
    sides["ours"].store(sides["ours"].fresh(residents))
    taken = (_resident_bytes() - before) // slots
    if peer:
        sides["peer"] = peer(slots, policy=policy)
    sides["limit"] = Limit(slots)
    for name in list(sides)[1:]:
        for each in residents:  # one by one: the peer's forms of a million keys are large
            sides[name].store(sides[name].fresh([each]))
    known = [luck.choice(residents) for _ in range(ROUNDS + 1)]
    strange = [chain() for _ in range(ROUNDS + 1)]
    line = partial(_line, sides, slots)
    if policy == "lru":
        yield line("lookup", known, "fresh", "match", 0)
        yield line("pin_unpin", known, "held", "use", 0)
    yield line(f"store_evict_{policy}", strange, "fresh", "store", taken if slots > 1 << 16 else 0)


def _line(
    sides: Mapping[str, Side],
    slots: int,
    name: str,
    chains: list[Chain],
    form: str,
    method: str,
    resident_bytes: int,
) -> Scaled:
    def ready(side: Side, turn: int) -> Callable[[], int]:
        return partial(getattr(side, method), getattr(side, form)([chains[turn]]))

    costs = interleave(
        {key: partial(ready, side) for key, side in sides.items()},
        blocks=CHAIN_BLOCKS,
        handled=CHAIN_BLOCKS,
        rounds=ROUNDS,
    )
    return Scaled(name, slots, costs, resident_bytes)


def _resident_bytes() -> int:
    """Return the memory of this process; 0 where there is no /proc."""
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
