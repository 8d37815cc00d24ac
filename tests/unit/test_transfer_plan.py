"""The planner against the obvious plan: one move a slot, on every tiny world."""

from __future__ import annotations

from itertools import pairwise, permutations, product

import pytest

from kvstrata.storage.base import SlotGrid
from kvstrata.transfer.base import CopyOp
from kvstrata.transfer.plan import OP_BYTES_MAX, plan_copy

SLOTS = 4
GAPLESS = SlotGrid(base_bytes=0, stride_bytes=4, block_bytes=4, slots=SLOTS)
GAPLESS_LATER = SlotGrid(base_bytes=12, stride_bytes=4, block_bytes=4, slots=SLOTS)
GAPS = SlotGrid(base_bytes=8, stride_bytes=6, block_bytes=4, slots=SLOTS)
MEMORY_BYTES = 64


def worlds(pairs_max=SLOTS):
    """Every list of at most `pairs_max` pairs that uses no slot of a side twice."""
    for count in range(pairs_max + 1):
        sources = permutations(range(SLOTS), count)
        yield from (
            list(zip(*sides, strict=True))
            for sides in product(sources, permutations(range(SLOTS), count))
        )


def moved(ops, source_bytes):
    target = bytearray(MEMORY_BYTES)
    for op in ops:
        piece = source_bytes[op.source_offset : op.source_offset + op.length]
        assert len(piece) == op.length, "an op reaches outside the source"
        target[op.target_offset : op.target_offset + op.length] = piece
    assert len(target) == MEMORY_BYTES, "an op reaches outside the target"
    return bytes(target)


def naive(pairs, source, target):
    return [
        CopyOp(
            source.base_bytes + one * source.stride_bytes,
            target.base_bytes + other * target.stride_bytes,
            source.block_bytes,
            index,
        )
        for index, (one, other) in enumerate(pairs)
    ]


GRIDS = [(GAPLESS, GAPLESS_LATER), (GAPLESS, GAPS), (GAPS, GAPLESS), (GAPS, GAPS)]


@pytest.mark.parametrize(("source", "target"), GRIDS)
@pytest.mark.parametrize("op_bytes_max", [1, 4, 8, 11, 1000])
def test_every_small_plan_moves_what_the_naive_one_moves(source, target, op_bytes_max):
    memory = bytes(range(1, MEMORY_BYTES + 1))
    gapless = source.stride_bytes == target.stride_bytes == 4
    for pairs in worlds():
        ops = plan_copy(pairs, source, target, op_bytes_max=op_bytes_max)
        plain = naive(pairs, source, target)
        assert moved(ops, memory) == moved(plain, memory), f"{pairs=}"
        covered = [index for op in ops for index in range(op.first, op.first + op.count)]
        assert covered == list(range(len(pairs))), f"{pairs=}: each pair once, in order"
        for op in ops:
            assert op.source_offset == plain[op.first].source_offset
            assert op.target_offset == plain[op.first].target_offset
            assert op.length == op.count * 4 <= max(op_bytes_max, 4)
        if not gapless:
            assert ops == plain, f"{pairs=}: a gap must not be carried along"


@pytest.mark.parametrize("op_bytes_max", [4, 8, 12, 1000])
def test_neighbours_on_both_sides_are_merged_as_far_as_allowed(op_bytes_max):
    for pairs in worlds():
        ops = plan_copy(pairs, GAPLESS, GAPLESS_LATER, op_bytes_max=op_bytes_max)
        for left, right in pairwise(ops):
            touching = (left.source_offset + left.length, left.target_offset + left.length) == (
                right.source_offset,
                right.target_offset,
            )
            assert not touching or left.length + 4 > op_bytes_max, f"{pairs=}: could be longer"


def test_one_side_adjacent_is_not_enough():
    assert len(plan_copy([(0, 0), (1, 2)], GAPLESS, GAPLESS)) == 2
    assert len(plan_copy([(0, 0), (2, 1)], GAPLESS, GAPLESS)) == 2
    assert plan_copy([(0, 1), (1, 2)], GAPLESS, GAPLESS) == [CopyOp(0, 4, 8, 0, 2)]


def test_descending_neighbours_are_not_merged():
    assert len(plan_copy([(1, 1), (0, 0)], GAPLESS, GAPLESS)) == 2


def test_a_block_longer_than_the_limit_moves_alone():
    length = OP_BYTES_MAX + 1
    grid = SlotGrid(base_bytes=0, stride_bytes=length, block_bytes=length, slots=2)
    ops = plan_copy([(0, 0), (1, 1)], grid, grid)
    assert [(op.length, op.first, op.count) for op in ops] == [(length, 0, 1), (length, 1, 1)]


def test_blocks_of_different_lengths_are_refused():
    other = SlotGrid(base_bytes=0, stride_bytes=4, block_bytes=3, slots=SLOTS)
    with pytest.raises(ValueError, match="blocks of 4 and 3 bytes differ"):
        plan_copy([(0, 0)], GAPLESS, other)
