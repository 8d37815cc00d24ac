"""From one block layout to another: a pure list of strided copies.

What a layout's axes mean, and which packings are known, is in `places.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, lcm
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvstrata.core.errors import LayoutError
from kvstrata.layout.block import DTYPE_BYTES, BlockLayout
from kvstrata.layout.places import Places, places_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["StridedCopy", "apply_transform", "plan_gather", "plan_transform"]


@dataclass(frozen=True, slots=True)
class StridedCopy:
    """One rectangular copy; offsets, counts and strides are in elements of the blocks' dtype."""

    source_offset: int
    """First element to read."""
    target_offset: int
    """First element to write."""
    counts: tuple[int, ...]
    """Elements along each axis, outermost first; empty for a single element."""
    source_strides: tuple[int, ...]
    """Elements from one step to the next along each axis, in the source."""
    target_strides: tuple[int, ...]
    """The same in the target."""


class _Axis(NamedTuple):
    size: int
    source: int  # stride
    target: int


def plan_transform(source: BlockLayout, target: BlockLayout) -> list[StridedCopy]:
    """Return the copies that fill a whole block of `target` from one block of `source`.

    Raises LayoutError unless `source` holds every number of `target`: same dtype, tokens, group,
    layers, heads and channels of the model, and at least the target's part of layers and heads.
    """
    return plan_gather([source], target)[0]


def plan_gather(sources: Sequence[BlockLayout], target: BlockLayout) -> list[list[StridedCopy]]:
    """Return for each source the copies that together fill a whole block of `target`.

    Sources are blocks of the same tokens from different shards, such as the four of a TP 4 engine
    for a TP 1 target. Raises LayoutError if they do not hold the same numbers, if one of them
    would be written twice, or if a part of the target is in none of them.
    """
    targets = places_of(target)
    plans: list[list[StridedCopy]] = []
    filled: list[list[tuple[range, range]]] = [[] for _ in targets]
    for source in sources:
        parts_held = places_of(source)
        _refuse_other_numbers(source, target)
        plan: list[StridedCopy] = []
        for held in parts_held:
            for into, parts in zip(targets, filled, strict=True):
                _refuse_other_model(held, into)
                layers, heads = _meet(held.layers, into.layers), _meet(held.heads, into.heads)
                if layers and heads:
                    parts.append((layers, heads))
                plan += _copies(held, into, layers, heads, target.block_tokens)
        plans.append(plan)
    for into, parts in zip(targets, filled, strict=True):
        _refuse_gaps(parts, into)
    return plans


def apply_transform(
    copies: Sequence[StridedCopy],
    source: memoryview | bytes,
    target: memoryview | bytearray,
    dtype: str,
) -> None:
    """Carry out `copies` between two blocks' bytes; `target` must be writable.

    Raises ValueError for a copy that would leave either block; nothing is written then.
    """
    unit = np.dtype(f"u{DTYPE_BYTES[dtype]}")  # bits are moved, whatever they mean
    read, write = np.frombuffer(source, unit), np.frombuffer(target, unit)
    for copy in copies:
        _refuse_outside(copy.source_offset, copy.counts, copy.source_strides, len(read))
        _refuse_outside(copy.target_offset, copy.counts, copy.target_strides, len(write))
    for copy in copies:
        _view(write, copy.target_offset, copy.counts, copy.target_strides)[...] = _view(
            read, copy.source_offset, copy.counts, copy.source_strides
        )


def _refuse_other_numbers(source: BlockLayout, target: BlockLayout) -> None:
    for what, ours, theirs in (
        ("element types", source.dtype, target.dtype),
        ("tokens in a block", source.block_tokens, target.block_tokens),
        ("cache groups", source.shard.group, target.shard.group),
    ):
        if ours != theirs:
            raise LayoutError(
                f"{what} differ: {ours} in the source, {theirs} in the target",
                hint="a transform moves numbers and changes none",
            )


def _refuse_other_model(source: Places, target: Places) -> None:
    for what, ours, theirs in (
        ("layers of the model", source.layers_total, target.layers_total),
        ("KV heads of the model", source.heads_total, target.heads_total),
        ("channels of a head", source.channels, target.channels),
        ("kinds of numbers", source.kv, target.kv),
    ):
        if ours != theirs:
            raise LayoutError(
                f"{what} differ: {ours} in the source, {theirs} in the target",
                hint="only layouts of one model can be transformed; heads that several workers "
                "hold, and uneven shards, are not known here",
            )


def _refuse_gaps(parts: Sequence[tuple[range, range]], target: Places) -> None:
    """Each (layer, head) of the target must come from exactly one source."""
    for index, (layers, heads) in enumerate(parts):
        for other_layers, other_heads in parts[:index]:
            if _meet(layers, other_layers) and _meet(heads, other_heads):
                raise LayoutError(
                    f"two sources hold layers {layers} and heads {heads}",
                    hint="give each shard once",
                )
    held = sum(len(layers) * len(heads) for layers, heads in parts)
    if held != len(target.layers) * len(target.heads):
        raise LayoutError(
            f"the sources hold {held} of the target's "
            f"{len(target.layers) * len(target.heads)} heads of all layers",
            hint="give every shard that the target's layers and heads lie in",
        )


# -- where it lies --------------------------------------------------------------------------------


def _copies(
    source: Places, target: Places, layers: range, heads: range, tokens: int
) -> list[StridedCopy]:
    """Return the copies of these layers and heads, which both hold."""
    if not layers or not heads:
        return []
    source_start = _start(source, layers, heads)
    target_start = _start(target, layers, heads)
    if source.strides == source.value_strides and target.strides == target.value_strides:
        pair = _Axis(2 if source.kv == "pair" else 1, source.value_offset, target.value_offset)
        parts = [(0, 0, source.strides, target.strides, pair)]
    else:  # K and V are each a rectangle, but not together
        alone = _Axis(1, 0, 0)
        parts = [
            (0, 0, source.strides, target.strides, alone),
            (
                source.value_offset,
                target.value_offset,
                source.value_strides,
                target.value_strides,
                alone,
            ),
        ]
    copies = []
    for source_part, target_part, read, write, pair in parts:
        outer = [
            _Axis(len(layers), read["layer"], write["layer"]),
            _Axis(len(heads), read["head"], write["head"]),
            pair,
            _Axis(source.channels, read["channel"], write["channel"]),
        ]
        pages = source.page_tokens, target.page_tokens
        copies += [
            _copy(
                source_start + source_part + source_at,
                target_start + target_part + target_at,
                [*outer, *axes],
            )
            for source_at, target_at, axes in _token_runs(pages, read, write, tokens)
        ]
    return copies


def _token_runs(
    pages: tuple[int, int], read: dict[str, int], write: dict[str, int], tokens: int
) -> list[tuple[int, int, list[_Axis]]]:
    """Return the axes of the block's tokens, as (source offset, target offset, axes).

    Both page sizes repeat after their least common multiple, and no page of either is cut within
    `run` tokens, their greatest common divisor:

        source  |    page 0     |    page 1     |    page 2     | ...     pages of 4 tokens
        target  |        page 0         |        page 1         | ...     pages of 6
        runs    |   0   |   1   |   2   |   3   |   4   |   5   | ...     of 2; period 12
    """
    period, run = lcm(*pages), gcd(*pages)

    def start(token: int) -> tuple[int, int]:
        return _token_at(pages[0], read, token), _token_at(pages[1], write, token)

    common = [
        _Axis(tokens // period, *start(period)),
        _Axis(run, read["token"], write["token"]),
    ]
    starts = [start(token) for token in range(0, period, run)]
    if period in pages:  # the runs are evenly spaced in both
        first, second = starts[0], starts[1] if len(starts) > 1 else (0, 0)
        runs = _Axis(len(starts), second[0] - first[0], second[1] - first[1])
        return [(0, 0, [*common, runs])]
    return [(*each, common) for each in starts]


def _token_at(page_tokens: int, strides: dict[str, int], token: int) -> int:
    page, place = divmod(token, page_tokens)
    return page * strides["page"] + place * strides["token"]


def _start(places: Places, layers: range, heads: range) -> int:
    return (
        places.offset
        + (layers.start - places.layers.start) * places.strides["layer"]
        + (heads.start - places.heads.start) * places.strides["head"]
    )


def _copy(source_offset: int, target_offset: int, axes: Sequence[_Axis]) -> StridedCopy:
    """Return one copy: written in the target's order, neighbours in both joined to long runs."""
    joined: list[_Axis] = []
    for axis in sorted((a for a in axes if a.size > 1), key=lambda a: (-a.target, -a.source)):
        if joined:
            last = joined[-1]
            whole = axis.size * axis.source, axis.size * axis.target
            if whole == (last.source, last.target):
                joined[-1] = _Axis(last.size * axis.size, axis.source, axis.target)
                continue
        joined.append(axis)
    counts, source, target = zip(*joined, strict=True) if joined else ((), (), ())
    return StridedCopy(source_offset, target_offset, counts, source, target)


def _meet(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


# -- carrying it out ------------------------------------------------------------------------------


def _refuse_outside(
    offset: int, counts: Sequence[int], strides: Sequence[int], elements: int
) -> None:
    last = offset + sum((n - 1) * step for n, step in zip(counts, strides, strict=True))
    if offset < 0 or last >= elements or any(step < 0 for step in strides):
        raise ValueError(f"elements {offset} to {last} are not in a block of {elements}")


def _view(
    elements: NDArray[np.unsignedinteger],
    offset: int,
    counts: Sequence[int],
    strides: Sequence[int],
) -> NDArray[np.unsignedinteger]:
    size = elements.itemsize
    steps = tuple(step * size for step in strides)
    return np.lib.stride_tricks.as_strided(elements[offset:], tuple(counts), steps)
