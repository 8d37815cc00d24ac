"""The worker half over blocks of another layout, and the packings that we say we know."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from kvstrata.layout import (
    BlockLayout,
    Dimension,
    PagedCache,
    apply_transform,
    plan_transform,
)

pytestmark = pytest.mark.engine

LAYERS, HEADS, CHANNELS, PAGE, TOKENS, PAGES = 3, 4, 8, 4, 8, 6
PLAIN = BlockLayout(
    tuple(
        Dimension(name, size)
        for name, size in (
            ("layer", LAYERS), ("kv", 2), ("head", HEADS), ("token", TOKENS), ("channel", CHANNELS),
        )
    ),
    "float32",
    TOKENS,
    "transformers-dynamic",
)  # fmt: skip


def caches(cache, seed):
    """Tensors of each layer, as vLLM registers them."""
    import torch

    luck = torch.Generator().manual_seed(seed)
    shape = PAGES, cache.heads, cache.page_tokens, cache.channels
    return {f"l{n}": torch.rand(shape, generator=luck) for n in range(LAYERS)}


def workers(cache, arena, seed):
    """A worker half for each rank, over its own pages and the same arena."""
    from kvstrata.connectors.vllm.metadata import StepPlan
    from kvstrata.connectors.vllm.worker import WorkerHalf

    made = []
    for rank in range(cache.ranks):
        half, layers = WorkerHalf(cache, cache.block_layout(TOKENS)), caches(cache, seed + rank)
        half.register(layers, list(layers), rank)
        half.load(StepPlan(epoch=1, arena=arena.address, layout=PLAIN))
        made.append(SimpleNamespace(half=half, layers=layers))
    return made


def plan(arena, slots, pages, kind):
    """A step that saves into, or loads from, whole blocks of two pages each."""
    from kvstrata.connectors.vllm.metadata import LoadJob, PageCopy, SaveJob, StepPlan

    rows = [slot for slot in slots for _ in range(2)]
    copy = PageCopy(rows, [0, 1] * len(slots), pages)
    step = StepPlan(epoch=1, arena=arena.address, layout=PLAIN)
    if kind == "save":
        step.saves.append(SaveJob("s", 1, copy, slots))
    else:
        generations = [arena.generations[slot] for slot in rows]
        step.loads.append(LoadJob("r", 1, copy, generations))
    return step


@pytest.fixture
def arena():
    from kvstrata.storage.arena import Arena

    made = Arena.create(1 << 20, PLAIN)
    made.region.view[made.grid.base_bytes :] = b"\xaa" * (
        len(made.region.view) - made.grid.base_bytes
    )
    yield made
    made.close()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("packing", ["", "vec"])
def test_workers_write_and_read_blocks_of_another_layout(arena, ranks, packing, monkeypatch):
    from kvstrata.connectors.vllm import bridged

    cache = PagedCache(LAYERS, HEADS // ranks, PAGE, 2 * CHANNELS, "float32", packing, ranks)
    monkeypatch.setattr(bridged, "_BUFFER_BYTES", PLAIN.block_bytes)  # a batch is a few blocks
    writers, slots, pages = workers(cache, arena, 1), [5, 2], [3, 0, 1, 4]
    for worker in writers:
        worker.half.save(plan(arena, slots, pages, "save"))
        assert [job.slots for job in worker.half.take_report().saved] == [slots]
    own = cache.block_layout(TOKENS)
    for place, slot in enumerate(slots):
        chosen = pages[2 * place : 2 * place + 2]
        block = b"".join(
            layer[chosen].numpy().tobytes()
            for worker in writers
            for layer in worker.layers.values()
        )
        expected = bytearray(PLAIN.block_bytes)
        apply_transform(plan_transform(own, PLAIN), block, expected, "float32")
        assert bytes(arena.slot(slot)) == bytes(expected)
    assert set(arena.slot(3)) == {0xAA}, "other slots stay as they were"
    readers, back = workers(cache, arena, 50), [5, 4, 3, 2]
    for reader, writer in zip(readers, writers, strict=True):
        untouched = {name: layer[:2].clone() for name, layer in reader.layers.items()}
        reader.half.load(plan(arena, slots, back, "load"))
        assert reader.half.take_failed_pages() == set()
        for name, layer in reader.layers.items():
            assert layer[back].equal(writer.layers[name][pages])
            assert layer[:2].equal(untouched[name])
    for worker in (*writers, *readers):
        worker.half.close()


def test_a_slot_that_is_given_away_is_failed_pages(arena):
    cache = PagedCache(LAYERS, HEADS, PAGE, 2 * CHANNELS, "float32")
    (worker,) = workers(cache, arena, 1)
    step = plan(arena, [5, 2], [3, 0, 1, 4], "load")
    arena.generations[2] += 1
    worker.half.load(step)
    assert worker.half.take_failed_pages() == {1, 4}
    worker.half.close()


def test_a_block_with_holes_is_not_saved(arena):
    cache = PagedCache(LAYERS, HEADS, PAGE, 2 * CHANNELS, "float32")
    (worker,) = workers(cache, arena, 1)
    step = plan(arena, [5], [3, 0], "save")
    step.saves[0].copy.places[1] = 0
    worker.half.save(step)
    report = worker.half.take_report()
    assert (len(report.saved), len(report.unsaved)) == (0, 1)
    assert set(arena.slot(5)) == {0xAA}
    worker.half.close()


def test_a_layout_that_cannot_be_bridged_maps_nothing(arena, caplog):
    from kvstrata.connectors.vllm.metadata import StepPlan
    from kvstrata.connectors.vllm.worker import WorkerHalf

    cache = PagedCache(LAYERS, HEADS, PAGE, 2 * CHANNELS, "float32", "amx")
    half, layers = WorkerHalf(cache, cache.block_layout(TOKENS)), caches(cache, 1)
    half.register(layers, list(layers), 0)
    half.save(plan(arena, [5], [3, 0], "save"))
    assert len(half.take_report().unsaved) == 1
    assert "cannot map" in caplog.text
    half.load(StepPlan())
    assert set(arena.slot(5)) == {0xAA}
    half.close()


@pytest.mark.parametrize(("packing", "page", "channels"), [
    ("vec", 32, 64), ("vec", 128, 32), ("vec16", 16, 64), ("vec16", 32, 80),
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pages_of_vllms_kernel_are_what_a_transform_says(dtype, packing, page, channels):
    """vLLM's own kernel writes a page; through the transform every number is where it belongs."""
    import torch
    from vllm import _custom_ops as ops

    kind, heads = getattr(torch, dtype), 2
    numbers = torch.arange(2 * heads * page * channels, dtype=torch.int32)
    numbers = numbers.view(torch.float32) if dtype == "float32" else numbers.to(torch.int16)
    kv = numbers.view(kind).reshape(2, heads, page, channels)
    pages = torch.zeros(3, heads, 2 * page, channels, dtype=kind)
    keys, values = pages.chunk(2, dim=2)
    given = [part.permute(1, 0, 2).contiguous() for part in kv]
    slots = torch.arange(page, 2 * page)
    ops.cpu_attn_reshape_and_cache(*given, keys, values, slots, packing)
    source = PagedCache(1, heads, page, 2 * channels, dtype, packing).block_layout(page)
    axes = (("layer", 1), ("kv", 2), ("head", heads), ("token", page), ("channel", channels))
    target = BlockLayout(tuple(Dimension(*each) for each in axes), dtype, page, "plain")
    written = bytearray(target.block_bytes)
    stored = pages[1].contiguous().view(torch.uint8).numpy().tobytes()
    apply_transform(plan_transform(source, target), stored, written, dtype)
    bits = np.frombuffer(written, np.uint8)
    assert np.array_equal(bits, kv.contiguous().reshape(-1).view(torch.uint8).numpy())
