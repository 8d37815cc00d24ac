"""Rearrangements as runs, against the CPU's transform; tests/kernels has the kernel itself."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.layout import BlockLayout, Dimension, apply_transform, plan_transform
from kvstrata.testing.cuda import FakeCudaStreams
from kvstrata.transfer.cuda.copier import RunCopier
from kvstrata.transfer.cuda.rearrange import RearrangePlan

SIZES = {"layer": 2, "kv": 2, "page": 2, "token": 4, "head": 2, "channel": 3}
ORDERS = st.permutations(sorted(SIZES))
POISON = 0xEE


def layout(order):
    return BlockLayout(tuple(Dimension(name, SIZES[name]) for name in order), "float16", 8, "test")


def piece_bytes(order, cut):
    inner = [SIZES[name] for name in order[cut:]]
    return 2 * int(np.prod(inner))


@given(ORDERS, ORDERS, st.integers(0, 5), st.integers(0, 5), st.integers(0, 99))
def test_pieces_of_either_side_may_lie_anywhere(read, write, read_cut, write_cut, seed):
    luck = np.random.default_rng(seed)
    source, target = layout(read), layout(write)
    pieces = piece_bytes(read, read_cut), piece_bytes(write, write_cut)
    plan = plan_transform(source, target)
    cut = RearrangePlan(
        plan, 2, source_piece_bytes=pieces[0], target_piece_bytes=pieces[1]
    )  # fmt: skip
    block = luck.integers(0, 256, source.block_bytes, np.uint8)
    made = bytearray(target.block_bytes)
    apply_transform(plan, block.tobytes(), made, "float16")
    places = [
        luck.permutation(size // piece) * piece
        for size, piece in zip((source.block_bytes, target.block_bytes), pieces, strict=True)
    ]
    memory = np.full(source.block_bytes + target.block_bytes, POISON, np.uint8)
    for piece, at in enumerate(places[0]):
        memory[at : at + pieces[0]] = block[piece * pieces[0] : (piece + 1) * pieces[0]]
    moves = cut.at(places[0][None, :], source.block_bytes + places[1][None, :])
    streams = FakeCudaStreams(bytearray(memory.tobytes()), Random(seed))
    copier = RunCopier(streams, tickets_max=1)
    assert copier.submit([moves], streams.stream_create()).error is None
    while streams.advance():
        pass
    got = bytes(streams.memory[source.block_bytes :])
    for piece, at in enumerate(places[1]):
        assert got[at : at + pieces[1]] == made[piece * pieces[1] : (piece + 1) * pieces[1]]
    streams.memory[: source.block_bytes] = bytes([POISON]) * source.block_bytes
    copier.poll()
    assert copier.submit([moves.back()], streams.stream_create()).error is None
    while streams.advance():
        pass
    assert bytes(streams.memory[: source.block_bytes]) == memory[: source.block_bytes].tobytes()


def test_pieces_that_cut_an_element_are_refused():
    with pytest.raises(ValueError, match="cut elements of 2"):
        RearrangePlan([], 2, source_piece_bytes=3, target_piece_bytes=4)
    empty = RearrangePlan([], 2, source_piece_bytes=2, target_piece_bytes=2)
    none = np.zeros((1, 1), np.int64)
    assert len(empty.at(none, none).runs()) == 0
