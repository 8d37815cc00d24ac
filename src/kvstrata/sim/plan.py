"""Which tiers to buy: every pair of sizes that a budget allows, replayed, and the best of them.

Sizes are tried at fractions of what the trace would fill, because neither more nor much finer
changes the answer. The best is the lowest mean time to first token; of those within a hundredth
of it, the cheapest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from kvstrata.core.errors import ConfigError
from kvstrata.core.tier import DISK
from kvstrata.sim.hardware import Hardware, TierSpeed
from kvstrata.sim.replay import LowerSlots, ReplayReport
from kvstrata.sim.sweep import Load

__all__ = ["HOST_FRACTIONS", "Candidate", "best", "candidates", "plan"]

HOST_FRACTIONS: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Host sizes that are tried, of the trace's unique blocks."""
DISK_FRACTIONS: Final = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Disk sizes that are tried."""
_GIB: Final = 1 << 30
_CLOSE: Final = 1.01


@dataclass(frozen=True, slots=True)
class Candidate:
    """Sizes that the budget allows."""

    host_bytes: int
    """Bytes of host memory."""
    disk_bytes: int
    """Bytes of disk, 0 for none."""
    price: float
    """What they cost, in the unit of the budget."""
    slots: tuple[int, int]
    """Blocks that host and disk hold."""


def candidates(load: Load, hardware: Hardware, budget: float) -> list[Candidate]:
    """Return what can be bought, cheapest first; raises ConfigError if nothing can."""
    block_bytes = hardware.block_bytes(load.block_tokens)
    found = []
    cheapest = float("inf")
    for host in HOST_FRACTIONS:
        for disk in DISK_FRACTIONS:
            slots = (max(int(load.unique * host), 1), int(load.unique * disk))
            sizes = (slots[0] * block_bytes, slots[1] * block_bytes)
            price = _price(hardware.host, sizes[0]) + _price(hardware.disk, sizes[1])
            cheapest = min(cheapest, price)
            fits = _fits(hardware.host, sizes[0]) and _fits(hardware.disk, sizes[1])
            if price <= budget and fits:
                found.append(Candidate(*sizes, price, slots))
    if not found:
        raise ConfigError(
            f"budget: {budget:g} buys no tiers for this trace; the smallest that are tried cost "
            f"{cheapest:.4g}",
            hint="raise the budget, or check price_per_gib and bytes_max of the hardware",
        )
    return sorted(found, key=lambda each: (each.price, each.slots))


def plan(
    load: Load,
    hardware: Hardware,
    budget: float,
    policies: Sequence[str],
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[Candidate, ReplayReport]]:
    """Yield every candidate with every policy, replayed."""
    for candidate in candidates(load, hardware, budget):
        for policy in policies:
            lower = [LowerSlots(DISK, candidate.slots[1])] if candidate.slots[1] else []
            yield candidate, load.replay(policy, candidate.slots[0], lower, hardware, progress)


def best(
    outcomes: Sequence[tuple[Candidate, ReplayReport]],
) -> tuple[Candidate, ReplayReport]:
    """Return the outcome to recommend."""
    fastest = min(report.ttft_s["mean"] for _, report in outcomes)
    close = [each for each in outcomes if each[1].ttft_s["mean"] <= fastest * _CLOSE]
    return min(close, key=lambda each: (each[0].price, each[1].ttft_s["mean"]))


def _price(tier: TierSpeed, size: int) -> float:
    return tier.price_per_gib * size / _GIB


def _fits(tier: TierSpeed, size: int) -> bool:
    return tier.bytes_max is None or size <= tier.bytes_max
