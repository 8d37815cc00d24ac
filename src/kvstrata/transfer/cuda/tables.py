"""Runs as three arrays: a hundred thousand are joined and given to a device as such. Pure.

`merge_runs` says the same of `Run`s one by one; a table of 65,536 runs costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstrata.transfer.cuda.runs import Run

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["RunTable", "merge_table", "table_of", "tile_table", "unit_bytes"]

_UNIT_BYTES_MAX = 16


@dataclass(frozen=True, slots=True)
class RunTable:
    """Contiguous moves, one an index; three int64 arrays of shape `[runs]`."""

    sources: NDArray[np.int64]
    """Addresses of the first bytes to read."""
    targets: NDArray[np.int64]
    """Addresses of the first bytes to write."""
    lengths: NDArray[np.int64]
    """How many bytes each; at least one."""

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self.sources)

    def __getitem__(self, chosen: Any) -> RunTable:
        """Return the chosen runs; `chosen` is what numpy takes and keeps an array."""
        return RunTable(self.sources[chosen], self.targets[chosen], self.lengths[chosen])


def table_of(runs: Sequence[Run]) -> RunTable:
    """Return the table of single runs."""
    rows = [(run.source, run.target, run.length_bytes) for run in runs]
    columns = np.array(rows, np.int64).reshape(-1, 3).T.copy()
    return RunTable(columns[0], columns[1], columns[2])


def merge_table(table: RunTable) -> RunTable:
    """Return runs that move the same bytes, neighbours on *both* sides joined, by target.

    Raises ValueError for an empty run and where two runs write the same byte, as `merge_runs`.
    """
    if not len(table):
        return table
    smallest = min(int(table.sources.min()), int(table.targets.min()), int(table.lengths.min()) - 1)
    if smallest < 0:
        raise ValueError("a run moves nothing: it is empty or has a negative address")
    table = table[np.argsort(table.targets, kind="stable")]
    ends = table.targets + table.lengths
    if np.any(table.targets[1:] < ends[:-1]):
        raise ValueError("two runs write the same bytes")
    follows = (table.targets[1:] == ends[:-1]) & (
        table.sources[1:] == table.sources[:-1] + table.lengths[:-1]
    )
    first = np.flatnonzero(np.concatenate(([True], ~follows)))
    return RunTable(
        table.sources[first], table.targets[first], np.add.reduceat(table.lengths, first)
    )


def unit_bytes(table: RunTable) -> int:
    """Return the largest power of two, at most 16, that divides every address and length."""
    bits = int(np.bitwise_or.reduce(table.sources | table.targets | table.lengths, initial=0))
    return min(_UNIT_BYTES_MAX, bits & -bits) if bits else _UNIT_BYTES_MAX


def tile_table(table: RunTable, tile_bytes: int) -> RunTable:
    """Return runs of at most `tile_bytes` that move the same; ValueError below one."""
    if tile_bytes < 1:
        raise ValueError(f"tiles of at most {tile_bytes} bytes move nothing")
    counts = -(-table.lengths // tile_bytes)
    which = np.repeat(np.arange(len(table)), counts)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    offsets = (np.arange(len(which)) - firsts) * tile_bytes
    return RunTable(
        table.sources[which] + offsets,
        table.targets[which] + offsets,
        np.minimum(tile_bytes, table.lengths[which] - offsets),
    )
