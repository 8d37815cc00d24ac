"""From one block layout to another: a pure list of strided copies.

Two layouts hold the same numbers if they agree on what the numbers are and differ only in where
each of them lies. Every element has five coordinates, whatever the order of the axes in memory:

    layer      of the whole model; a pipeline shard holds a range of them
    kv         0 for K, 1 for V
    head       of the whole model; a tensor shard holds a range of them
    token      of the block; pages cut this range, `token = page * page tokens + place`
    channel    of one head's K or V

A layout without a `kv` axis has K and V in the page of a head in a way that its writer knows:

    vllm-paged-fused-kv   [token, K channels then V channels], as its axes say
    vllm-cpu-vec          [K channel, token], then [V token, channel]

Of any other writer the axes are believed; without `kv` it has one number where others have two, as
multi-head latent attention. Packings of vLLM that are not in the table are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, lcm
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvstrata.core.errors import LayoutError
from kvstrata.layout.block import DTYPE_BYTES, BlockLayout

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["StridedCopy", "apply_transform", "plan_gather", "plan_transform"]

_FUSED: Final = "vllm-paged-fused-kv"
_CPU_VEC: Final = "vllm-cpu-vec"
_KNOWN_AXES: Final = frozenset({"layer", "kv", "page", "head", "token", "channel"})
_NEEDED_AXES: Final = frozenset({"layer", "token", "channel"})


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


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the coordinates of one layout lie: strides in elements, and ranges of the model."""

    kv: str
    """`pair` for K and V, on an axis or fused; `single` for neither."""
    strides: dict[str, int]
    """Elements from one step to the next, of K: layer, page, head, token, channel."""
    value_strides: dict[str, int]
    """The same of V."""
    value_offset: int
    """Elements from the first of K to the first of V."""
    layers: range
    """Layers of the model that the block holds."""
    layers_total: int
    """Layers of the model."""
    heads: range
    """KV heads of the model that the block holds."""
    heads_total: int
    """KV heads of the model."""
    page_tokens: int
    """Tokens in one page."""
    channels: int
    """Channels of K, or of V, or of the single number."""


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
    into = _places(target)
    plans, parts = [], []
    for source in sources:
        held = _places(source)
        _refuse_other_numbers(source, target)
        _refuse_other_model(held, into)
        layers, heads = _meet(held.layers, into.layers), _meet(held.heads, into.heads)
        if layers and heads:
            parts.append((layers, heads))
        plans.append(_copies(held, into, layers, heads, target.block_tokens))
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


# -- what a layout means --------------------------------------------------------------------------


def _places(layout: BlockLayout) -> _Places:
    sizes = {each.name: each.size for each in layout.dimensions}
    unknown, absent = set(sizes) - _KNOWN_AXES, _NEEDED_AXES - set(sizes)
    if unknown or absent:
        raise LayoutError(
            f"{layout.describe()}: axes {sorted(unknown | absent)} are unknown or absent",
            hint=f"a transform knows {', '.join(sorted(_KNOWN_AXES))}",
        )
    strides, step = dict.fromkeys(_KNOWN_AXES, 0), 1
    for each in reversed(layout.dimensions):
        strides[each.name] = step
        step *= each.size
    if sizes.get("page", 1) * sizes["token"] != layout.block_tokens:
        raise LayoutError(
            f"{layout.describe()}: its pages do not hold {layout.block_tokens} tokens",
            hint="page * token must be the tokens of the block",
        )
    channels, (values, value_offset) = _split_kv(layout, sizes, strides)
    _refuse_ranks(layout)
    shard, heads, layers = layout.shard, sizes.get("head", 1), sizes["layer"]
    return _Places(
        kv="pair" if value_offset else "single",
        strides=strides,
        value_strides=values,
        value_offset=value_offset,
        layers=range(shard.pipeline_rank * layers, (shard.pipeline_rank + 1) * layers),
        layers_total=layers * shard.pipeline_size,
        heads=range(shard.tensor_rank * heads, (shard.tensor_rank + 1) * heads),
        heads_total=heads * shard.tensor_size,
        page_tokens=sizes["token"],
        channels=channels,
    )


def _split_kv(
    layout: BlockLayout, sizes: dict[str, int], strides: dict[str, int]
) -> tuple[int, tuple[dict[str, int], int]]:
    """Return the channels of K, and strides and start of V; corrects the strides of K."""
    channels = sizes["channel"]
    if layout.writer not in {_FUSED, _CPU_VEC}:
        if layout.writer.startswith("vllm-"):
            raise LayoutError(
                f"{layout.describe()}: the engine packs its pages in a way that is not known here",
                hint="only blocks of the same writer can be used for them",
            )
        if sizes.get("kv", 2) != 2:  # noqa: PLR2004  # K and V
            raise LayoutError(
                f"{layout.describe()}: a kv axis is K and V",
                hint="give the axis a size of 2, or leave it out",
            )
        return channels, (strides, strides["kv"])
    if "kv" in sizes or channels % 2:
        raise LayoutError(
            f"{layout.describe()}: {channels} channels are not K and V of equal size",
            hint="a writer of fused K and V has no kv axis, and K and V of one size",
        )
    half = channels // 2
    if layout.writer == _FUSED:
        return half, (strides, half * strides["channel"])
    names = [each.name for each in layout.dimensions]
    if names[-2:] != ["token", "channel"] or layout.dtype != "float32":
        raise LayoutError(
            f"{layout.describe()}: this packing is known for float32 only, with tokens and "
            "channels innermost",
            hint="only blocks of the same writer can be used for it",
        )
    values = strides | {"token": half, "channel": 1}
    strides |= {"token": 1, "channel": sizes["token"]}
    return half, (values, sizes["token"] * half)


def _refuse_ranks(layout: BlockLayout) -> None:
    shard = layout.shard
    if not (0 <= shard.tensor_rank < shard.tensor_size) or not (
        0 <= shard.pipeline_rank < shard.pipeline_size
    ):
        raise LayoutError(
            f"{layout.describe()}: a rank is not below its size",
            hint="ranks count from 0",
        )
    if all(each.name != "head" for each in layout.dimensions) and shard.tensor_size > 1:
        raise LayoutError(
            f"{layout.describe()}: there are no heads that {shard.tensor_size} workers could split",
            hint="what every worker holds is stored once, as the whole",
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


def _refuse_other_model(source: _Places, target: _Places) -> None:
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


def _refuse_gaps(parts: Sequence[tuple[range, range]], target: _Places) -> None:
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
    source: _Places, target: _Places, layers: range, heads: range, tokens: int
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


def _start(places: _Places, layers: range, heads: range) -> int:
    return (layers.start - places.layers.start) * places.strides["layer"] + (
        heads.start - places.heads.start
    ) * places.strides["head"]


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
