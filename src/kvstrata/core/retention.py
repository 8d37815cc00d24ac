"""How long a block should be kept: a priority for a while, and a time to live.

The words and the default are TensorRT-LLM's (`KvCacheRetentionConfig`): priorities from 0 to 100,
35 unless said otherwise, the lowest leaves first, and after `duration_s` it is 35 again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from kvstrata.core.errors import ConfigError

__all__ = ["HINTS_MAX", "PRIORITY_DEFAULT", "PRIORITY_MAX", "BlockHint", "Retention"]

PRIORITY_DEFAULT: Final = 35
"""Priority of a block that nobody said anything about."""
PRIORITY_MAX: Final = 100
"""Priority of the blocks that leave last."""
HINTS_MAX: Final = 1024
"""Most ranges that one call may name."""
_SECONDS_MAX: Final = 10 * 365 * 86400.0


@dataclass(frozen=True, slots=True)
class Retention:
    """What a client asks for the tokens from `start` up to `end` of a prompt.

    It holds for each block whose first token lies there. Raises ConfigError for a value that is
    out of range.
    """

    start: int = 0
    """First token."""
    end: int | None = None
    """The token behind the last one; None for the end of the prompt."""
    priority: int = PRIORITY_DEFAULT
    """0 to 100: blocks of a lower priority are evicted before blocks of a higher one."""
    duration_s: float | None = None
    """After this time the priority is the default again; None for no end."""
    ttl_s: float | None = None
    """After this time the block is not found any more; None for no end. Such a block is kept in
    the host only, for a restart would forget its end."""

    def __post_init__(self) -> None:
        _expect(self.start >= 0, "start", self.start, "a token position from 0")
        ordered = self.end is None or self.start < self.end
        _expect(ordered, "end", self.end, "a token position above start")
        _expect(0 <= self.priority <= PRIORITY_MAX, "priority", self.priority, "0 to 100")
        for name, seconds in (("duration_s", self.duration_s), ("ttl_s", self.ttl_s)):
            known = seconds is None or 0.0 < seconds <= _SECONDS_MAX  # NaN is neither
            _expect(known, name, seconds, "seconds above 0 and up to ten years")

    def hint(self, block_tokens: int, blocks: int) -> BlockHint | None:
        """Return it for a prompt of so many full blocks; None if no block begins in the range."""
        first = math.ceil(self.start / block_tokens)
        behind = blocks if self.end is None else math.ceil(self.end / block_tokens)
        count = min(behind, blocks) - first
        if count <= 0:
            return None
        return BlockHint(first, count, self.priority, self.duration_s, self.ttl_s)


@dataclass(frozen=True, slots=True)
class BlockHint:
    """A retention in blocks, as the daemon takes it; of two for one block the later one counts.

    Raises ConfigError for a value that is out of range.
    """

    first: int
    """Index of the first block among those offered."""
    count: int
    """How many blocks."""
    priority: int = PRIORITY_DEFAULT
    """See `Retention`."""
    duration_s: float | None = None
    """See `Retention`."""
    ttl_s: float | None = None
    """See `Retention`."""

    def __post_init__(self) -> None:
        _expect(self.first >= 0, "first", self.first, "a block index from 0")
        _expect(self.count >= 1, "count", self.count, "at least one block")
        Retention(priority=self.priority, duration_s=self.duration_s, ttl_s=self.ttl_s)


def _expect(good: bool, name: str, value: object, what: str) -> None:  # noqa: FBT001  # a check
    if not good:
        raise ConfigError(f"retention.{name}: {value} is out of range", hint=f"write {what}")
