"""A layout that exists can be stored, and two that differ never share a fingerprint."""

from __future__ import annotations

import dataclasses

import pytest

from kvstrata.core.errors import LayoutError
from kvstrata.layout import BlockLayout, Dimension, Shard
from kvstrata.layout.block import DTYPE_BYTES

AXES = (Dimension("layer", 2), Dimension("head", 3))
LAYOUT = BlockLayout(AXES, "float16", 4, "array")
ONE = (Dimension("a", 1),)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_every_known_dtype_makes_a_block(dtype) -> None:
    assert BlockLayout(AXES, dtype, 4, "array").block_bytes == 6 * DTYPE_BYTES[dtype]


def test_the_limits_themselves_are_accepted() -> None:
    assert BlockLayout(ONE, "int8", 1, "array").block_bytes == 1
    assert BlockLayout((Dimension("a", 1 << 30),), "int8", 1, "array").block_bytes == 1 << 30


@pytest.mark.parametrize(
    ("axes", "dtype", "block_tokens", "field"),
    [
        (ONE, "float12", 4, "dtype"),
        (ONE, "", 4, "dtype"),
        (ONE, "Float16", 4, "dtype"),
        ((), "int8", 4, "dimensions"),
        ((Dimension("a b", 2),), "int8", 4, "dimensions"),
        ((Dimension("a=2 b", 2),), "int8", 4, "dimensions"),
        ((Dimension("", 2),), "int8", 4, "dimensions"),
        ((Dimension("a", 2), Dimension("a", 3)), "int8", 4, "dimensions"),
        ((Dimension("a", 0),), "int8", 4, "dimensions"),
        ((Dimension("a", -1),), "int8", 4, "dimensions"),
        ((Dimension("a", -2), Dimension("b", -2)), "int8", 4, "dimensions"),
        (ONE, "int8", 0, "block of 0 tokens"),
        (ONE, "int8", -4, "block of -4 tokens"),
        ((Dimension("a", (1 << 30) + 1),), "int8", 4, "bytes is out of range"),
        ((Dimension("a", 1 << 29),), "float32", 4, "bytes is out of range"),
    ],
)
def test_refused(axes, dtype, block_tokens, field) -> None:
    with pytest.raises(LayoutError) as caught:
        BlockLayout(axes, dtype, block_tokens, "array")
    assert field in caught.value.message
    assert caught.value.hint


OTHERS = {
    "dimensions": [
        AXES[::-1],
        (*AXES, Dimension("token", 1)),
        (Dimension("layer", 3), Dimension("head", 2)),
        (Dimension("Layer", 2), Dimension("head", 3)),
    ],
    "dtype": ["bfloat16", "int16"],
    "block_tokens": [8, 1],
    "writer": ["vllm-paged-fused-kv", "Array"],
    "shard": [
        *(Shard(tensor_size=2), Shard(tensor_rank=1), Shard(pipeline_rank=1)),
        *(Shard(pipeline_size=2), Shard(group=1), Shard(1, 2), Shard(0, 1, 1, 2)),
    ],
}


def test_the_table_of_others_is_complete() -> None:
    assert set(OTHERS) == {field.name for field in dataclasses.fields(BlockLayout)}


def test_every_difference_is_another_fingerprint_and_another_line() -> None:
    layouts = [LAYOUT] + [
        dataclasses.replace(LAYOUT, **{field: value})
        for field, values in OTHERS.items()
        for value in values
    ]
    assert len({each.fingerprint for each in layouts}) == len(layouts)
    assert len({each.describe() for each in layouts}) == len(layouts)
    assert {len(each.fingerprint) for each in layouts} == {16}


@pytest.mark.parametrize("writer", ["", "two words", "a[b]", "1st"])
def test_a_writer_that_is_no_name_is_refused(writer) -> None:
    with pytest.raises(LayoutError, match="writer: ") as caught:
        dataclasses.replace(LAYOUT, writer=writer)
    assert caught.value.hint


def test_equal_layouts_share_a_fingerprint() -> None:
    again = BlockLayout(tuple(Dimension(d.name, d.size) for d in AXES), "float16", 4, "array")
    assert again == LAYOUT
    assert again.fingerprint == LAYOUT.fingerprint


def test_fingerprint_is_pinned() -> None:
    """It stands in every slab's superblock: another one makes every slab unreadable."""
    assert LAYOUT.fingerprint.hex() == "f46ea60e23d30556ac24077729247bf4"


def test_geometry_ignores_the_order_and_nothing_else() -> None:
    turned = dataclasses.replace(LAYOUT, dimensions=AXES[::-1])
    assert turned.geometry == LAYOUT.geometry
    wider = dataclasses.replace(LAYOUT, dimensions=(Dimension("layer", 2), Dimension("head", 4)))
    shards = [dataclasses.replace(LAYOUT, shard=shard) for shard in OTHERS["shard"]]
    found = {each.geometry for each in [LAYOUT, wider, *shards]}
    assert len(found) == 2 + len(shards)


def test_describe() -> None:
    assert LAYOUT.describe() == ("array [layer=2 head=3] float16 4 tokens tp=0/1 pp=0/1 group=0")
