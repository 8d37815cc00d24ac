"""Laws of the rearranging kernel under Triton's interpreter; run as a program by test_rearrange.py.

The oracle is the CPU's `plan_transform` with `apply_transform`, block by block.
"""

from __future__ import annotations

import sys

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstrata.layout import BlockLayout, Dimension, Shard, apply_transform, plan_transform
from kvstrata.layout.block import DTYPE_BYTES
from kvstrata.transfer.cuda.rearrange import RearrangePlan
from kvstrata.transfer.cuda.triton_mover import TritonRearranger

POISON = 0xEE
REARRANGER = TritonRearranger(device="cpu", programs=3)
ORDERS = {
    "nhd": ("layer", "kv", "page", "token", "head", "channel"),
    "hnd": ("layer", "page", "kv", "head", "token", "channel"),
    "kv-inside": ("layer", "page", "token", "head", "kv", "channel"),
    "cross-layer": ("page", "layer", "kv", "token", "head", "channel"),
    "packed-keys": ("layer", "kv", "page", "head", "channel", "token"),
}
seen: set[tuple[str, int, int, bool]] = set()


def layout(order, model, *, page, tensor=1, rank=0):
    sizes = {
        "layer": model["layers"],
        "kv": 2,
        "page": model["tokens"] // page,
        "token": page,
        "head": model["heads"] // tensor,
        "channel": model["channels"],
    }
    left_out = {"kv", "head"} if model["latent"] else set()
    names = [name for name in ORDERS[order] if name not in left_out]
    dimensions = tuple(Dimension(name, sizes[name]) for name in names)
    shard = Shard(rank, tensor)
    return BlockLayout(dimensions, model["dtype"], model["tokens"], "test", shard)


@st.composite
def cases(draw):
    latent = draw(st.sampled_from([False, False, True]))
    tokens = draw(st.sampled_from([16, 32, 64, 128, 256]))
    model = {
        "latent": latent,
        "layers": draw(st.integers(1, 2)),
        "heads": 1 if latent else draw(st.sampled_from([4, 4, 1])),
        "channels": draw(st.sampled_from([1, 3, 4, 8, 16, 64 if tokens < 64 else 8])),
        "tokens": tokens,
        "dtype": draw(st.sampled_from(["float8_e4m3fn", "bfloat16", "float16", "float32"])),
    }
    tensor = draw(st.sampled_from([1, 2, 4])) if model["heads"] == 4 else 1
    pages = [size for size in (16, 32, 64, 128, 256) if tokens % size == 0]
    whole = layout(draw(st.sampled_from(sorted(ORDERS))), model, page=draw(st.sampled_from(pages)))
    part = layout(
        draw(st.sampled_from(sorted(ORDERS))), model, page=draw(st.sampled_from(pages)),
        tensor=tensor, rank=draw(st.integers(0, tensor - 1)),
    )  # fmt: skip
    # Towards a part only: a part of the heads cannot fill a whole block, which other ranks share.
    pair = (whole, part) if tensor > 1 or draw(st.booleans()) else (part, whole)
    return (
        *pair,
        draw(st.booleans()),
        draw(st.sampled_from([0, 0, 1, 2, 4, 8])),
        draw(st.integers(0, 2**31)),
    )


def scattered(luck, blocks, layout, *, in_pages, shift):
    """Memory for blocks whose pieces lie in any order; returns it and each piece's offset."""
    sizes = [each.size for each in layout.dimensions]
    names = [each.name for each in layout.dimensions]
    outer = 1
    if in_pages:  # what an engine scatters: whatever is outside of a page's tokens and heads
        inner = min(names.index(name) for name in ("token", "head", "channel") if name in names)
        outer = int(np.prod(sizes[:inner])) if inner else 1
    piece = layout.block_bytes // outer
    places = luck.permutation(blocks * outer + 3)[: blocks * outer].reshape(blocks, outer)
    unit = DTYPE_BYTES[layout.dtype]
    memory = np.full((blocks * outer + 3) * piece + 64, POISON, np.uint8)
    start = -memory.ctypes.data % 16 + shift * unit  # not always aligned to what a unit could be
    return memory, places * piece + start, piece


@settings(max_examples=100, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(cases())
def rearranges(case):
    source, target, in_pages, shift, seed = case
    luck, blocks = np.random.default_rng(seed), 2
    plan = plan_transform(source, target)
    held, reads, read_piece = scattered(luck, blocks, source, in_pages=in_pages, shift=shift)
    into, writes, write_piece = scattered(luck, blocks, target, in_pages=not in_pages, shift=shift)
    held[:] = luck.integers(0, 256, len(held), np.uint8)
    expected = into.copy()
    for block in range(blocks):
        whole = b"".join(held[at : at + read_piece].tobytes() for at in reads[block])
        made = bytearray(target.block_bytes)
        apply_transform(plan, whole, made, target.dtype)
        for piece, at in enumerate(writes[block]):
            wanted = made[piece * write_piece : (piece + 1) * write_piece]
            expected[at : at + write_piece] = np.frombuffer(wanted, np.uint8)
    cut = RearrangePlan(
        plan, DTYPE_BYTES[source.dtype],
        source_piece_bytes=read_piece, target_piece_bytes=write_piece,
    )  # fmt: skip
    moves = cut.at(reads + held.ctypes.data, writes + into.ctypes.data)
    assert REARRANGER.rearrange(moves, 0) == 0
    assert np.array_equal(into, expected), (source.describe(), target.describe())
    by_runs = np.full_like(into, POISON)
    table = moves.runs()
    sources, targets = table.sources - held.ctypes.data, table.targets - into.ctypes.data
    for at, to, length in zip(sources, targets, table.lengths, strict=True):
        by_runs[to : to + length] = held[at : at + length]
    assert np.array_equal(by_runs, expected)
    for group in moves.groups:
        seen.add((source.dtype, group.unit_bytes, target.shard.tensor_size, "head" in str(source)))


rearranges()
units = {unit for _, unit, _, _ in seen}
assert {dtype for dtype, *_ in seen} == {"float8_e4m3fn", "bfloat16", "float16", "float32"}
assert units >= {1, 2, 4, 8, 16}, units
assert {tensor for *_, tensor, _ in seen} == {1, 2, 4}
assert {heads for *_, heads in seen} == {True, False}
sys.stdout.write("rearranged\n")
