"""Laws of a bridge: every bit there and back, nothing else touched, whatever the layouts are."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.core.errors import LayoutError
from kvstrata.layout import (
    BlockLayout,
    Bridge,
    Dimension,
    PagedCache,
    Shard,
    apply_transform,
    check_bridge,
    model_geometry,
    parse_layout,
    plan_transform,
    rank_part,
)

DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
ORDERS = list(permutations(["layer", "kv", "page", "head", "token", "channel"]))
SLOTS = 5


@st.composite
def pairs(draw: st.DrawFn) -> tuple[BlockLayout, BlockLayout]:
    """Two layouts of one model: fused, packed or plain axes, any ranks, any pages."""
    layers, heads, tokens, channels = (
        draw(st.sampled_from(sizes)) for sizes in ([1, 2, 3], [1, 2, 4], [4, 12], [1, 2, 5])
    )
    dtype = draw(st.sampled_from(sorted(DTYPES)))

    def layout() -> BlockLayout:
        page = draw(st.sampled_from([n for n in range(1, tokens + 1) if tokens % n == 0]))
        ranks = draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0]))
        kind = draw(st.sampled_from(["paged", "vec", "vec16", "plain"]))
        if kind != "plain":
            packing = "" if kind == "paged" else kind
            cache = PagedCache(layers, heads // ranks, page, 2 * channels, dtype, packing, ranks)
            return cache.block_layout(tokens)
        sizes = {
            "layer": layers, "kv": 2, "page": tokens // page, "head": heads // ranks,
            "token": page, "channel": channels,
        }  # fmt: skip
        first = (Dimension("rank", ranks),) if ranks > 1 else ()
        axes = tuple(Dimension(name, sizes[name]) for name in draw(st.sampled_from(ORDERS)))
        return BlockLayout(first + axes, dtype, tokens, "plain")

    return layout(), layout()


def luck(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@given(pairs(), st.integers(0, 1 << 30))
def test_every_worker_writes_its_part_and_the_whole_is_the_transform(pair, seed):
    own, held = pair
    ranks = own.dimensions[0].size if own.dimensions[0].name == "rank" else 1
    size, sent = own.block_bytes // ranks, luck(seed, 2, own.block_bytes)
    arena = luck(seed + 1, SLOTS, held.block_bytes)
    before, slots = arena.copy(), [3, 1]
    for rank in range(ranks):
        part = np.ascontiguousarray(sent[:, rank * size : (rank + 1) * size])
        Bridge(rank_part(own, rank), held).give(part, arena, slots)
    for row, slot in enumerate(slots):
        expected = bytearray(held.block_bytes)
        apply_transform(plan_transform(own, held), sent[row].tobytes(), expected, own.dtype)
        assert arena[slot].tobytes() == bytes(expected)
    rest = [slot for slot in range(SLOTS) if slot not in slots]
    assert np.array_equal(arena[rest], before[rest]), "other slots stay as they were"
    for rank in range(ranks):
        back = luck(seed + 2, 2, size)
        Bridge(rank_part(own, rank), held).take(arena, slots, back)
        assert np.array_equal(back, sent[:, rank * size : (rank + 1) * size])


@given(pairs(), st.integers(0, 1 << 30))
def test_a_part_writes_no_byte_of_the_others(pair, seed):
    own, held = pair
    part = rank_part(own, 0)
    block = np.full((1, held.block_bytes), 255, np.uint8)
    Bridge(part, held).give(luck(seed, 1, part.block_bytes) & 127, block, [0])  # none is 255
    assert np.count_nonzero(block != 255) == part.block_bytes


@given(pairs())
def test_layouts_that_can_be_bridged_are_one_geometry(pair):
    own, held = pair
    check_bridge(own, held)
    assert model_geometry(own) == model_geometry(held)
    assert parse_layout(own.describe(), own.fingerprint) == own


@given(pairs(), st.data())
def test_slots_in_memory_that_is_not_dense(pair, data):
    """The arena rounds each slot up to a page, so slots do not lie one behind the other."""
    own, held = pair
    gap = data.draw(st.integers(1, 4)) * 8
    memory = luck(1, SLOTS, held.block_bytes + gap)
    sent = luck(2, 1, rank_part(own, 0).block_bytes)
    bridge, before = Bridge(rank_part(own, 0), held), memory.copy()
    bridge.give(sent, memory[:, : held.block_bytes], [2])
    back = np.zeros_like(sent)
    bridge.take(memory[:, : held.block_bytes], [2], back)
    assert np.array_equal(back, sent)
    assert np.array_equal(memory[:, held.block_bytes :], before[:, held.block_bytes :])


PAGED = PagedCache(2, 2, 8, 4, "float32")
PLAIN = PAGED.block_layout(8)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (PagedCache(2, 2, 8, 4, "float16").block_layout(8), "element types differ"),
        (PAGED.block_layout(16), "tokens in a block differ"),
        (PagedCache(3, 2, 8, 4, "float32").block_layout(8), "layers of the model differ"),
        (PagedCache(2, 4, 8, 4, "float32").block_layout(8), "KV heads of the model differ"),
        (PagedCache(2, 2, 8, 8, "float32").block_layout(8), "channels of a head differ"),
        (PagedCache(2, 2, 8, 4, "float32", "amx").block_layout(8), "not known here"),
        (replace(PLAIN, shard=Shard(group=1)), "cache groups differ"),
        (replace(PLAIN, shard=Shard(0, 2)), "KV heads of the model differ"),
        (
            BlockLayout(
                (Dimension("layer", 2), Dimension("token", 8), Dimension("channel", 8)),
                "float32", 8, "latent",
            ),
            "differ",
        ),
        (BlockLayout((Dimension("axis0", 64),), "float32", 8, "array"), "unknown or absent"),
    ],
)  # fmt: skip
def test_what_is_not_the_same_numbers_is_refused_both_ways(other, said):
    for pair in ((PLAIN, other), (other, PLAIN)):
        with pytest.raises(LayoutError, match=said):
            check_bridge(*pair)
    assert model_geometry(other) != model_geometry(PLAIN) or said in {
        "element types differ",  # the namespace names it apart, as the tokens of a block
        "tokens in a block differ",
    }


def test_equal_layouts_need_no_bridge_whatever_they_are():
    amx = PagedCache(2, 2, 8, 4, "bfloat16", "amx").block_layout(8)
    check_bridge(amx, amx)


def test_half_of_the_heads_is_no_whole():
    whole = PagedCache(2, 2, 8, 4, "float32").block_layout(8)
    half = rank_part(PagedCache(2, 1, 8, 4, "float32", ranks=2).block_layout(8), 1)
    with pytest.raises(LayoutError, match="hold"):
        check_bridge(half, whole)
    Bridge(half, whole)  # one worker's part goes in and out of a whole block


@pytest.mark.parametrize(
    "text",
    [
        "x", "", "a [] float32 8 tokens tp=0/1 pp=0/1 group=0",
        "a [layer] float32 8 tokens tp=0/1 pp=0/1 group=0",
        "a [layer=1=2] float32 8 tokens tp=0/1 pp=0/1 group=0",
        "a [layer=x] float32 8 tokens tp=0/1 pp=0/1 group=0",
    ],
)  # fmt: skip
def test_a_text_that_is_no_description_is_no_layout(text):
    from hashlib import sha256

    assert parse_layout(text, sha256(text.encode()).digest()[:16]) is None
    assert parse_layout(PLAIN.describe(), bytes(16)) is None, "of another fingerprint"
