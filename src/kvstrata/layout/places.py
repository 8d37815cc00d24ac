"""What the axes of a block layout mean: where each number of the model lies in it. Pure.

Two layouts hold the same numbers if they agree on what the numbers are and differ only in where
each of them lies. Every element has five coordinates, whatever the order of the axes in memory:

    layer      of the whole model; a pipeline shard holds a range of them
    kv         0 for K, 1 for V
    head       of the whole model; a tensor shard holds a range of them
    token      of the block; pages cut this range, `token = page * page tokens + place`
    channel    of one head's K or V

A `rank` axis, outermost, has the parts of workers that split the heads, one behind the other.
A layout without a `kv` axis has K and V in the page of a head in a way that its writer knows:

    vllm-paged-fused-kv              [token, K channels then V channels], as its axes say
    vllm-cpu-vec, vllm-cpu-vec16     [K channel, token], then [V token, channel]

Of any other writer the axes are believed; without `kv` it has one number where others have two, as
multi-head latent attention. Packings of vLLM that are not in the table are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Final

from kvstrata.core.errors import LayoutError
from kvstrata.layout.block import BlockLayout, Shard

__all__ = ["Places", "model_geometry", "places_of", "rank_part"]

_FUSED: Final = "vllm-paged-fused-kv"
_CPU_VEC: Final = frozenset({"vllm-cpu-vec", "vllm-cpu-vec16"})
_VEC_DTYPES: Final = frozenset({"float32", "float16", "bfloat16"})  # tried against vLLM's kernel
_KNOWN_AXES: Final = frozenset({"rank", "layer", "kv", "page", "head", "token", "channel"})
_NEEDED_AXES: Final = frozenset({"layer", "token", "channel"})


@dataclass(frozen=True, slots=True)
class Places:
    """Where the coordinates of one layout lie: strides in elements, and ranges of the model."""

    offset: int
    """First element of this part in the block; parts are those of the ranks, else there is one."""
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


def places_of(layout: BlockLayout) -> list[Places]:
    """Return where the numbers lie, part by part: one for each rank of a `rank` axis, else one.

    Raises LayoutError for axes, packings or shards whose meaning is not known here.
    """
    sizes = {each.name: each.size for each in layout.dimensions}
    unknown, absent = set(sizes) - _KNOWN_AXES, _NEEDED_AXES - set(sizes)
    if unknown or absent:
        raise LayoutError(
            f"{layout.describe()}: axes {sorted(unknown | absent)} are unknown or absent",
            hint=f"a transform knows {', '.join(sorted(_KNOWN_AXES))}",
        )
    if "rank" not in sizes:
        return [_part(layout, 0)]
    parts = [rank_part(layout, rank) for rank in range(sizes["rank"])]
    return [_part(part, rank * _elements(part)) for rank, part in enumerate(parts)]


def rank_part(layout: BlockLayout, rank: int) -> BlockLayout:
    """Return the layout of one worker's part of a block; of the whole if no workers split it.

    Raises LayoutError for ranks that are not the outermost axis, or that a shard counts too.
    """
    first = layout.dimensions[0]
    if all(each.name != "rank" for each in layout.dimensions):
        return layout
    if first.name != "rank" or layout.shard.tensor_size != 1:
        raise LayoutError(
            f"{layout.describe()}: its ranks are not the outermost axis of a whole block",
            hint="put the ranks first, and leave them out of the shard",
        )
    shard = replace(layout.shard, tensor_rank=rank, tensor_size=first.size)
    return replace(layout, dimensions=layout.dimensions[1:], shard=shard)


def model_geometry(layout: BlockLayout) -> str:
    """Return what the numbers are wherever they lie: equal for layouts that can be bridged.

    Of a layout whose packing is not known here all of it is in the text, the writer included:
    nothing else has its numbers.
    """
    try:
        first = places_of(layout)[0]
    except LayoutError:
        return f"{layout.geometry};writer={layout.writer}"
    shard = "" if layout.shard == Shard() else f";shard={layout.shard}"
    return (
        f"layers={first.layers_total};heads={first.heads_total};channels={first.channels};"
        f"kv={first.kv}{shard}"
    )


# -- private ---------------------------------------------------------------------------------------


def _elements(layout: BlockLayout) -> int:
    return prod(each.size for each in layout.dimensions)


def _part(layout: BlockLayout, offset: int) -> Places:
    """Return the places of a layout without ranks, `offset` elements behind the block's start."""
    sizes = {each.name: each.size for each in layout.dimensions}
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
    return Places(
        offset=offset,
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
    if layout.writer not in {_FUSED, *_CPU_VEC}:
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
    if names[-2:] != ["token", "channel"] or layout.dtype not in _VEC_DTYPES:
        raise LayoutError(
            f"{layout.describe()}: this packing is known for {', '.join(sorted(_VEC_DTYPES))} "
            "only, with tokens and channels innermost",
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
