"""Why a block missed, and what another policy or size would have hit.

The memory of what left is bounded: it forgets what left longest ago, and then says so. Gauges are
shadows (see policy/shadow.py) over a sample of the keys that requests looked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from kvstrata.core.ids import SequenceHash
from kvstrata.core.tier import TierName
from kvstrata.policy import make_policy, policy_names
from kvstrata.policy.shadow import Shadow, sample_mask

__all__ = ["Departure", "Departures", "Gauges"]

DEPARTURES_MAX: Final = 1 << 17
"""Most blocks whose departure is remembered for certain; up to twice as many are."""
_GAUGE_SLOTS_MIN: Final = 128


@dataclass(frozen=True, slots=True)
class Departure:
    """How a block left the tiers, or failed to be there."""

    what: str
    """`evicted`, `cleared`, `corrupt`, `read failed`, `lost`, `seal failed`,
    `not stored, no slot free`, `not stored, quota`, `time to live ended`."""
    tier: TierName
    """Where."""
    at: float
    """When, on the clock of `now`."""
    by: str = ""
    """Name of the policy that chose it, for an eviction."""

    def sentence(self, now: float) -> str:
        """Return it in words, seen from `now`."""
        by = f" by {self.by}" if self.by else ""
        return f"{self.what} in {self.tier}{by}, {max(now - self.at, 0.0):.1f} s ago"


class Departures:
    """The last departure of each block, as far back as there is room."""

    def __init__(self, limit: int = DEPARTURES_MAX) -> None:
        """Remember `limit` blocks for certain."""
        self._limit = limit
        self._young: dict[SequenceHash, Departure] = {}
        self._old: dict[SequenceHash, Departure] = {}
        self._forgot = False

    def note(self, keys: Iterable[SequenceHash], departure: Departure) -> None:
        """Remember how `keys` left."""
        self._young.update(dict.fromkeys(keys, departure))
        if len(self._young) > self._limit:
            self._forgot = self._forgot or bool(self._old)
            self._old, self._young = self._young, {}

    def why(self, key: SequenceHash, now: float) -> str:
        """Return why `key`, which is in no tier, is not."""
        found = self._young.get(key) or self._old.get(key)
        if found:
            return found.sentence(now)
        return "never stored, or left too long ago to tell" if self._forgot else "never stored"

    def __len__(self) -> int:
        return len(self._young) + len(self._old)


class Gauges:
    """Hit rates that the host tier would have had, by policy and by size; block by block."""

    def __init__(self, slots: int, policy: str) -> None:
        """Watch beside a tier of `slots` that `policy` serves."""
        mask = sample_mask(slots, _GAUGE_SLOTS_MIN)
        sampled = max(1, slots // (mask + 1))
        self._mask = mask
        self._shadows: dict[tuple[str, float], Shadow] = {
            (name, 1.0): Shadow(make_policy(name), sampled)
            for name in policy_names()
            if name != "auto"
        }
        for factor in (0.5, 1.0, 2.0):
            size = max(1, int(sampled * factor))
            self._shadows.setdefault((policy, factor), Shadow(make_policy(policy), size))

    def use(self, hashes: Sequence[SequenceHash]) -> None:
        """Take note that a request wanted `hashes`, root first."""
        mask = self._mask
        sample = [key for key in reversed(hashes) if not key[-1] & mask]
        if sample:
            for shadow in self._shadows.values():
                shadow.use(sample)

    def rates(self) -> dict[str, float]:
        """Return `policy xSIZE` -> hit rate of blocks so far; empty before any use."""
        return {
            f"{policy} x{factor:g}": shadow.hits / shadow.uses
            for (policy, factor), shadow in self._shadows.items()
            if shadow.uses
        }
