"""Laws of layout transforms, against an oracle that names every element by its coordinates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.core.errors import LayoutError
from kvstrata.layout import (
    BlockLayout,
    Dimension,
    PagedCache,
    Shard,
    StridedCopy,
    apply_transform,
    plan_gather,
    plan_transform,
)

FUSED = "vllm-paged-fused-kv"
VEC = "vllm-cpu-vec"


@dataclass(frozen=True)
class Model:
    """What the numbers are, wherever they lie."""

    layers: int
    heads: int
    tokens: int
    channels: int
    kv: bool = True
    dtype: str = "int32"

    def layout(
        self,
        order: Sequence[str],
        *,
        page: int | None = None,
        writer: str = "test",
        shard: Shard | None = None,
        ranks: int = 1,
    ) -> BlockLayout:
        """The layout whose axes lie in `order`; axes that it does not have are left out."""
        shard = shard or Shard()
        page = page or self.tokens
        sizes = {
            "layer": self.layers // shard.pipeline_size,
            "head": self.heads // shard.tensor_size // ranks,
            "page": self.tokens // page,
            "token": page,
            "channel": self.channels * (1 if writer == "test" else 2),
        }
        if self.kv and writer == "test":
            sizes["kv"] = 2
        names = [name for name in order if name in sizes]
        if ranks > 1:
            sizes["rank"] = ranks
            names = ["rank", *names]
        if writer == VEC:  # it packs tokens and channels, so they lie innermost
            names = [
                *(each for each in names if each not in {"token", "channel"}),
                "token",
                "channel",
            ]
        return BlockLayout(
            tuple(Dimension(name, sizes[name]) for name in names),
            self.dtype,
            self.tokens,
            writer=writer,
            shard=shard,
        )


def block(model: Model, layout: BlockLayout) -> bytes:
    """The bytes of a block, element by element: each is the number of its coordinates."""
    names = [each.name for each in layout.dimensions]
    shape = [each.size for each in layout.dimensions]
    sizes = dict(zip(names, shape, strict=True))
    elements = np.empty(shape, layout.dtype)
    for index in itertools.product(*map(range, shape)):
        at = dict(zip(names, index, strict=True))
        layer = layout.shard.pipeline_rank * sizes["layer"] + at["layer"]
        worker = layout.shard.tensor_rank + at.get("rank", 0)
        head = worker * sizes.get("head", 1) + at.get("head", 0)
        token = at.get("page", 0) * sizes["token"] + at["token"]
        channel, kv = at["channel"], at.get("kv", 0)
        if layout.writer == FUSED:
            kv, channel = divmod(channel, model.channels)
        if layout.writer == VEC:  # keys [channel, token], then values [token, channel]
            page = sizes["token"]
            place = at["token"] * sizes["channel"] + channel
            kv, place = divmod(place, page * model.channels)
            token -= at["token"]
            channel, inner = divmod(place, page) if kv == 0 else divmod(place, model.channels)[::-1]
            token += inner
        number = layer
        for part, size in (
            (kv, 2), (head, model.heads), (token, model.tokens), (channel, model.channels),
        ):  # fmt: skip
            number = number * size + part
        elements[index] = number + 1  # 0 is what nobody wrote
    return elements.tobytes()


def moved(
    plans: Sequence[Sequence[StridedCopy]], sources: Sequence[bytes], target: BlockLayout
) -> bytes:
    written = bytearray(target.block_bytes)
    for plan, source in zip(plans, sources, strict=True):
        apply_transform(plan, source, written, target.dtype)
    return bytes(written)


ORDERS = st.permutations(["layer", "kv", "page", "head", "token", "channel"])
MODELS = st.builds(
    Model,
    layers=st.sampled_from([1, 2, 4]),
    heads=st.sampled_from([1, 2, 4]),
    tokens=st.sampled_from([4, 12]),
    channels=st.integers(1, 3),
    dtype=st.sampled_from(["int32", "int64", "int16", "float32"]),
)


@st.composite
def layouts(
    draw: st.DrawFn, model: Model, *, shard: bool = True, ranks: bool = False
) -> BlockLayout:
    writers = ["test", FUSED] if model.kv else ["test"]
    if model.kv and model.dtype == "float32":
        writers.append(VEC)
    pages = [size for size in range(1, model.tokens + 1) if model.tokens % size == 0]
    part, workers = Shard(), 1
    if ranks:
        workers = draw(st.sampled_from([n for n in (1, 2, 4) if model.heads % n == 0]))
    if shard:
        tensor = draw(st.sampled_from([n for n in (1, 2, 4) if model.heads % n == 0]))
        pipeline = draw(st.sampled_from([n for n in (1, 2) if model.layers % n == 0]))
        part = Shard(
            draw(st.integers(0, tensor - 1)),
            tensor,
            draw(st.integers(0, pipeline - 1)),
            pipeline,
        )
    return model.layout(
        draw(ORDERS),
        page=draw(st.sampled_from(pages)),
        writer=draw(st.sampled_from(writers)),
        shard=part,
        ranks=workers,
    )


def shards(layout: BlockLayout, tensor: int, pipeline: int, model: Model) -> list[BlockLayout]:
    """The layouts in which so many workers hold what `layout` holds whole."""
    parts = []
    for tensor_rank, pipeline_rank in itertools.product(range(tensor), range(pipeline)):
        sizes = {"layer": model.layers // pipeline, "head": model.heads // tensor}
        dimensions = tuple(
            Dimension(each.name, sizes.get(each.name, each.size)) for each in layout.dimensions
        )
        shard = Shard(tensor_rank, tensor, pipeline_rank, pipeline)
        parts.append(replace(layout, dimensions=dimensions, shard=shard))
    return parts


@given(st.data(), MODELS, st.booleans())
def test_every_element_arrives_at_its_coordinates(data, model, kv):
    model = replace(model, kv=kv)
    whole = data.draw(layouts(model, shard=False))
    tensor = data.draw(st.sampled_from([n for n in (1, 2, 4) if model.heads % n == 0]))
    pipeline = data.draw(st.sampled_from([n for n in (1, 2) if model.layers % n == 0]))
    sources = data.draw(st.permutations(shards(whole, tensor, pipeline, model)))
    target = data.draw(layouts(model))
    plans = plan_gather(sources, target)
    got = moved(plans, [block(model, source) for source in sources], target)
    assert got == block(model, target)


@given(st.data(), MODELS)
def test_there_and_back_changes_no_byte(data, model):
    one = data.draw(layouts(model, shard=False, ranks=True))
    other = data.draw(layouts(model, shard=False, ranks=True))
    original = block(model, one)
    there = moved([plan_transform(one, other)], [original], other)
    assert moved([plan_transform(other, one)], [there], one) == original


@given(st.data(), MODELS)
def test_two_steps_are_one(data, model):
    first, second = (data.draw(layouts(model, shard=False, ranks=True)) for _ in range(2))
    last = data.draw(layouts(model))
    start = block(model, first)
    between = moved([plan_transform(first, second)], [start], second)
    assert moved([plan_transform(second, last)], [between], last) == moved(
        [plan_transform(first, last)], [start], last
    )


@given(st.data(), MODELS)
def test_no_element_is_written_twice(data, model):
    """Every byte is right above; here the copies say how many they move, and it is just enough."""
    source = data.draw(layouts(model, shard=False))
    target = data.draw(layouts(model))
    elements = sum(int(np.prod(copy.counts)) for copy in plan_transform(source, target))
    assert elements == int(np.prod([each.size for each in target.dimensions]))


def test_tensor_sizes_4_1_2():
    model = Model(layers=2, heads=4, tokens=8, channels=4, dtype="float16")
    nhd = model.layout(["layer", "kv", "page", "token", "head", "channel"], page=2)
    hnd = model.layout(["page", "layer", "kv", "head", "token", "channel"], page=8)
    four = shards(nhd, 4, 1, model)
    one = moved(plan_gather(four, hnd), [block(model, each) for each in four], hnd)
    assert one == block(model, hnd)
    for half in shards(nhd, 2, 1, model):
        assert moved([plan_transform(hnd, half)], [one], half) == block(model, half)


def test_a_fused_block_as_separate_k_and_v():
    """The layout of a paged cache whose axes say it all, as the transformers connector's."""
    cache = PagedCache(layers=2, heads=2, page_tokens=4, channels=6, dtype="float32")
    model = Model(layers=2, heads=2, tokens=8, channels=3, dtype="float32")
    source = cache.block_layout(8)
    target = model.layout(["layer", "kv", "head", "token", "channel"])
    # [layer, page, head, token, K|V], written down once more without the oracle.
    numbers = np.arange(2 * 2 * 2 * 4 * 6, dtype="float32").reshape(2, 2, 2, 4, 2, 3)
    got = moved([plan_transform(source, target)], [numbers.tobytes()], target)
    expected = numbers.transpose(0, 4, 2, 1, 3, 5)
    assert got == np.ascontiguousarray(expected).tobytes()


def test_equal_layouts_are_one_run():
    layout = Model(2, 2, 8, 4).layout(["layer", "kv", "page", "head", "token", "channel"], page=4)
    (copy,) = plan_transform(layout, layout)
    assert copy == StridedCopy(0, 0, (2 * 2 * 2 * 8 * 4,), (1,), (1,))


def test_pages_that_do_not_divide_each_other():
    model = Model(layers=1, heads=2, tokens=12, channels=2)
    order = ["layer", "page", "kv", "head", "token", "channel"]
    four, six = model.layout(order, page=4), model.layout(order, page=6)
    assert moved([plan_transform(four, six)], [block(model, four)], six) == block(model, six)


HND = ["layer", "kv", "page", "head", "token", "channel"]
MODEL = Model(layers=2, heads=4, tokens=8, channels=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: replace(MODEL, dtype="float32").layout(HND), "element types differ"),
        (lambda: replace(MODEL, tokens=4).layout(HND), "tokens in a block differ"),
        (lambda: replace(MODEL, layers=4).layout(HND), "layers of the model differ"),
        (lambda: replace(MODEL, heads=2).layout(HND), "KV heads of the model differ"),
        (lambda: replace(MODEL, channels=4).layout(HND), "channels of a head differ"),
        (lambda: replace(MODEL, kv=False).layout(HND), "kinds of numbers differ"),
        (lambda: replace(MODEL.layout(HND), shard=Shard(group=1)), "cache groups differ"),
        (lambda: replace(MODEL.layout(HND), shard=Shard(tensor_rank=1)), "not below its size"),
        (lambda: MODEL.layout(["layer", "kv", "token", "channel"]), "heads of the model differ"),
        (lambda: replace(MODEL.layout(HND), block_tokens=16), "do not hold 16 tokens"),
        (lambda: PagedCache(2, 4, 8, 4, "int32", "amx").block_layout(8), "not known here"),
        (lambda: PagedCache(2, 4, 8, 4, "int32", "vec").block_layout(8), "float32 only"),
        (
            lambda: replace(
                PagedCache(2, 2, 8, 4, "int32", ranks=2).block_layout(8), shard=Shard(0, 2)
            ),
            "not the outermost axis of a whole block",
        ),
        (lambda: replace(MODEL.layout(HND), writer=FUSED), "not K and V of equal size"),
        (lambda: MODEL.layout(["layer", "kv", "page", "head", "channel"]), "unknown or absent"),
        (
            lambda: BlockLayout((Dimension("axis0", 64),), "int32", 8, writer="array"),
            "unknown or absent",
        ),
        (
            lambda: PagedCache(2, 4, 8, 3, "int32").block_layout(8),
            "not K and V of equal size",
        ),
    ],
)
def test_other_numbers_are_refused(change: Callable[[], BlockLayout], message: str):
    layout = change()
    with pytest.raises(LayoutError, match=message):
        plan_transform(layout, MODEL.layout(HND))
    with pytest.raises(LayoutError, match=message):
        plan_transform(MODEL.layout(HND), layout)


def test_missing_and_doubled_parts_are_refused():
    whole = MODEL.layout(HND)
    parts = shards(whole, 2, 2, MODEL)
    for missing in range(4):
        rest = parts[:missing] + parts[missing + 1 :]
        with pytest.raises(LayoutError, match="hold 6 of the target"):
            plan_gather(rest, whole)
        with pytest.raises(LayoutError, match="two sources hold"):
            plan_gather([*parts, parts[missing]], whole)
    with pytest.raises(LayoutError, match="hold 0 of"):
        plan_gather([], whole)
    with pytest.raises(LayoutError, match="hold 0 of"):
        plan_transform(parts[0], parts[3])


def test_copies_that_leave_a_block_are_refused_and_write_nothing():
    layout = MODEL.layout(HND)
    plan = plan_transform(layout, layout)
    source, target = block(MODEL, layout), bytearray(layout.block_bytes)
    with pytest.raises(ValueError, match="not in a block"):
        apply_transform(plan, source[:-4], target, layout.dtype)
    with pytest.raises(ValueError, match="not in a block"):
        apply_transform(plan, source, target[:-4], layout.dtype)
    outside = replace(plan[0], source_offset=-1)
    with pytest.raises(ValueError, match="not in a block"):
        apply_transform([*plan, outside], source, target, layout.dtype)
    assert not any(target)
