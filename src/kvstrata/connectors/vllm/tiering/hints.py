"""What a request's hints mean for the blocks that vLLM hands to its tier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvstrata.connectors.vllm.hints import hints_for
from kvstrata.core.retention import HINTS_MAX, BlockHint, Retention

__all__ = ["block_hints"]


def block_hints(
    retention: list[Retention], block_tokens: int, ends: Sequence[int | None]
) -> list[BlockHint]:
    """Return the hints for blocks that end behind the tokens `ends`, None where not known.

    vLLM leaves out blocks that its CPU tier has, so they need not be neighbours. What is beyond
    the daemon's limit for one call is left out: those blocks are kept as others are.
    """
    found: list[BlockHint] = []
    if not retention:
        return found
    for start, first, count in _runs([end and end // block_tokens - 1 for end in ends]):
        for hint in hints_for(retention, block_tokens, first, first + count):
            place = start + hint.first
            found.append(BlockHint(place, hint.count, hint.priority, hint.duration_s, hint.ttl_s))
    return found[:HINTS_MAX]


def _runs(blocks: Sequence[int | None]) -> Iterator[tuple[int, int, int]]:
    """Yield (index, block, count) of each run of neighbours."""
    start = 0
    for index in range(1, len(blocks) + 1):
        first = blocks[start]
        if index < len(blocks) and first is not None and blocks[index] == first + index - start:
            continue
        if first is not None:
            yield start, first, index - start
        start = index
