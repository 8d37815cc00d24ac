"""What `layout.plan_transform` describes, for many blocks at once, as addresses. Pure.

Either side of a block may lie in pieces of one length, as an engine's pages do, so a copy of the
plan is cut until each part lies in one piece on both sides:

    source  | K and V of token 0 | token 1 | ...          one piece: a page of a layer, NHD
    target  | head 0: K of token 0, 1, ... | head 1 ...    one piece: the whole block, HND

Parts of equal counts and strides make a group, which one launch of a kernel moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvstrata.layout import StridedCopy
from kvstrata.transfer.cuda.tables import RunTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["AXES", "RearrangePlan", "Rearrangement", "RowGroup"]

AXES: Final = 4
"""Axes of a group's rows; further ones are written out as rows of addresses."""

_UNIT_BYTES_MAX: Final = 16


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rectangular moves that differ only in where they begin; all lengths in bytes."""

    sources: NDArray[np.int64]
    """Addresses of the first bytes to read, one a move."""
    targets: NDArray[np.int64]
    """Addresses of the first bytes to write."""
    counts: tuple[int, int, int, int]
    """Rows along each axis, outermost first; 1 for axes that are not there."""
    source_strides: tuple[int, int, int, int]
    """From one row to the next along each axis, in the source."""
    target_strides: tuple[int, int, int, int]
    """The same in the target."""
    width: int
    """Units in one row."""
    unit_bytes: int
    """Length of a unit: it is contiguous and aligned on both sides; a power of two, at most 16."""
    source_step: int
    """From one unit of a row to the next, in the source; `unit_bytes` if it is contiguous."""
    target_step: int
    """The same in the target."""

    @property
    def rows(self) -> int:
        """Rows of one move."""
        return prod(self.counts)


@dataclass(frozen=True, slots=True)
class Rearrangement:
    """All that is moved at once."""

    groups: tuple[RowGroup, ...]
    """No byte is written by two of them."""

    def back(self) -> Rearrangement:
        """Return the way back: what was a source is a target.

        Only of a rearrangement that reads no byte twice, as those of a transform.
        """
        return Rearrangement(
            tuple(
                RowGroup(
                    sources=group.targets,
                    targets=group.sources,
                    counts=group.counts,
                    source_strides=group.target_strides,
                    target_strides=group.source_strides,
                    width=group.width,
                    unit_bytes=group.unit_bytes,
                    source_step=group.target_step,
                    target_step=group.source_step,
                )
                for group in self.groups
            )
        )

    def runs(self) -> RunTable:
        """Return the same as contiguous runs, for copiers that know nothing else."""
        tables = [_runs(group) for group in self.groups]
        if not tables:
            none = np.zeros(0, np.int64)
            return RunTable(none, none, none)
        sources = np.concatenate([each.sources for each in tables])
        targets = np.concatenate([each.targets for each in tables])
        return RunTable(sources, targets, np.concatenate([each.lengths for each in tables]))


class _Axis(NamedTuple):
    size: int
    source: int  # stride in bytes
    target: int


class _Shape(NamedTuple):
    """What parts of one group have in common."""

    axes: tuple[_Axis, ...]  # outermost first, without the row
    row: _Axis
    element_bytes: int


class RearrangePlan:
    """A transform cut along the pieces of both sides; holds no addresses, so it is made once."""

    def __init__(
        self,
        plan: Sequence[StridedCopy],
        element_bytes: int,
        *,
        source_piece_bytes: int,
        target_piece_bytes: int,
    ) -> None:
        """Cut `plan`, whose offsets and strides are in elements.

        Raises ValueError if a piece does not hold whole elements.
        """
        self._pieces = source_piece_bytes, target_piece_bytes
        if any(piece < 1 or piece % element_bytes for piece in self._pieces):
            raise ValueError(f"pieces of {self._pieces} bytes cut elements of {element_bytes}")
        parts: dict[_Shape, list[tuple[int, int]]] = {}
        for copy in plan:
            axes = [
                _Axis(size, source * element_bytes, target * element_bytes)
                for size, source, target in zip(
                    copy.counts, copy.source_strides, copy.target_strides, strict=True
                )
            ]
            at = copy.source_offset * element_bytes, copy.target_offset * element_bytes
            for start, left in self._cut(at, axes):
                for begin, shape in _shaped(start, left, element_bytes):
                    parts.setdefault(shape, []).append(begin)
        self._parts = {shape: np.array(starts, np.int64) for shape, starts in parts.items()}

    def at(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> Rearrangement:
        """Return the moves of blocks whose pieces lie at these addresses, `[blocks, pieces]`."""
        groups = []
        for shape, starts in self._parts.items():
            begins = [
                (table[:, starts[:, side] // piece] + starts[:, side] % piece).ravel()
                for side, (table, piece) in enumerate(
                    zip((sources, targets), self._pieces, strict=True)
                )
            ]
            groups.append(_group(shape, begins[0], begins[1]))
        return Rearrangement(tuple(groups))

    def _cut(
        self, start: tuple[int, int], axes: list[_Axis]
    ) -> Iterator[tuple[tuple[int, int], list[_Axis]]]:
        """Yield parts of a rectangle, each in one piece of either side."""
        for side, piece in enumerate(self._pieces):
            strides = [axis[1 + side] for axis in axes]
            extent = sum((axis.size - 1) * step for axis, step in zip(axes, strides, strict=True))
            if start[side] // piece == (start[side] + extent) // piece:
                continue
            which = max(range(len(axes)), key=lambda index: strides[index])
            axis, rest = axes[which], [*axes[:which], *axes[which + 1 :]]
            fits = max(1, piece // axis[1 + side]) if start[side] % piece == 0 else 1
            inner = fits if axis.size % fits == 0 and fits < axis.size else 1
            few = [_Axis(inner, axis.source, axis.target)] if inner > 1 else []
            for index in range(0, axis.size, inner):
                begin = start[0] + index * axis.source, start[1] + index * axis.target
                yield from self._cut(begin, [*rest[:which], *few, *rest[which:]])
            return
        yield start, axes


def _shaped(
    start: tuple[int, int], axes: list[_Axis], element_bytes: int
) -> Iterator[tuple[tuple[int, int], _Shape]]:
    """Yield the part with its axes in order, the row last, axes beyond `AXES` written out."""
    ordered = sorted(
        (axis for axis in axes if axis.size > 1), key=lambda axis: (-axis.target, -axis.source)
    )
    row = ordered.pop() if ordered else _Axis(1, element_bytes, element_bytes)
    outer, kept = ordered[: max(0, len(ordered) - AXES)], ordered[-AXES:]
    for index in product(*(range(axis.size) for axis in outer)):
        begin = [
            start[side] + sum(at * axis[1 + side] for at, axis in zip(index, outer, strict=True))
            for side in (0, 1)
        ]
        yield (begin[0], begin[1]), _Shape(tuple(kept), row, element_bytes)


def _group(shape: _Shape, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> RowGroup:
    """Return the moves with the longest unit that everything is a multiple of."""
    element, row = shape.element_bytes, shape.row
    unit, width = element, row.size
    if row.source == row.target == element:
        bits = int(np.bitwise_or.reduce(sources | targets, initial=0)) | element * row.size
        for axis in shape.axes:
            bits |= axis.source | axis.target
        unit = min(_UNIT_BYTES_MAX, bits & -bits)
        width = element * row.size // unit
    padded = [*(_Axis(1, 0, 0),) * (AXES - len(shape.axes)), *shape.axes]
    counts, source_strides, target_strides = zip(*padded, strict=True)
    is_run = row.source == row.target == element
    return RowGroup(
        sources,
        targets,
        counts,
        source_strides,
        target_strides,
        width,
        unit,
        unit if is_run else row.source,
        unit if is_run else row.target,
    )


def _runs(group: RowGroup) -> RunTable:
    offsets = [np.zeros(1, np.int64), np.zeros(1, np.int64)]
    is_run = group.source_step == group.target_step == group.unit_bytes
    axes = list(zip(group.counts, group.source_strides, group.target_strides, strict=True))
    if not is_run:
        axes.append((group.width, group.source_step, group.target_step))
    for size, *strides in axes:
        steps = np.arange(size)
        offsets = [
            (each[:, None] + steps * stride).ravel()
            for each, stride in zip(offsets, strides, strict=True)
        ]
    sources = (group.sources[:, None] + offsets[0]).ravel()
    targets = (group.targets[:, None] + offsets[1]).ravel()
    length = group.unit_bytes * (group.width if is_run else 1)
    return RunTable(sources, targets, np.full(len(sources), length, np.int64))
