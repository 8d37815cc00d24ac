"""Groups: layers that share a kind of attention, each with blocks and keys of its own.

A hybrid model keeps a prefix in several groups, and a hit is only what all of them can serve. What
a group needs for a hit of n blocks depends on its kind:

    full attention, MLA    blocks 0 to n-1                    window 0
    sliding window         the last w blocks before n         window w
    state space            the state at the end of block n-1  window 1

So a kind is one number, the window in blocks. Groups have equal blocks, as vLLM pads them to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from kvstrata.core.ids import SequenceHash

__all__ = ["WHOLE", "Chain", "longest", "split"]

WHOLE: Final = (0,)
"""The windows of a model with one group of full attention."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The blocks of one prompt in one group."""

    hashes: Sequence[SequenceHash]
    """Keys, root first."""
    window: int = 0
    """How many blocks before its end a hit needs; 0 for all."""

    def needed(self, blocks: int) -> range:
        """Return the places of the blocks that a hit of `blocks` needs."""
        return range(max(blocks - self.window, 0) if self.window else 0, blocks)


def split(hashes: Sequence[SequenceHash], windows: Sequence[int]) -> list[Chain]:
    """Return one chain a group; `hashes` has all keys of the first group, then of the next.

    Raises ValueError unless every group has as many.
    """
    count, rest = divmod(len(hashes), len(windows))
    if rest:
        raise ValueError(
            f"hashes: {len(hashes)} are not the same for each of {len(windows)} groups"
        )
    if len(windows) == 1:
        return [Chain(hashes, windows[0])]
    return [
        Chain(hashes[place * count : (place + 1) * count], window)
        for place, window in enumerate(windows)
    ]


def longest(whole: Iterable[int], windowed: Iterable[tuple[int, Sequence[bool]]]) -> int:
    """Return the most leading blocks of which each group has what a hit of that length needs.

    `whole` has for each group without a window how many leading blocks it has, `windowed` the
    window of each other group and for each block whether it is there. One of them is not empty.
    """
    runs = [(window, _runs(there)) for window, there in windowed]
    limit = min([*whole, *(len(run) for _, run in runs)])
    for blocks in range(limit, 0, -1):
        if all(run[blocks - 1] >= min(window, blocks) for window, run in runs):
            return blocks
    return 0


def _runs(there: Sequence[bool]) -> list[int]:
    """Return for each block how many blocks in a row are there up to and with it."""
    runs, run = [], 0
    for each in there:
        run = run + 1 if each else 0
        runs.append(run)
    return runs
