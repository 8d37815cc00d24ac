"""At registration made-up bytes go from the engine's pages to a slot and back, before any block."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvstrata.core.errors import LayoutError
from kvstrata.layout import GroupedCache, LayerGroup, PagedCache

pytestmark = pytest.mark.engine

TOKENS = 8
PAGED = PagedCache(2, 2, 4, 6, "float32", ranks=2)


def tensors(names, pages, seed=0):
    """Pages of each layer, full of numbers, each behind a gap as a padded cache has it."""
    import torch

    luck = torch.Generator().manual_seed(seed)
    shape, strides = (pages, 2, 4, 6), (60, 24, 6, 1)
    return {
        name: torch.rand(60 * pages, generator=luck).as_strided(shape, strides) for name in names
    }


def register(caches, groups, cache, rank=1):
    from kvstrata.connectors.vllm.worker import WorkerHalf

    half = WorkerHalf(cache, cache.block_layout(TOKENS))
    half.register(caches, groups, rank)
    half.close()


@pytest.mark.parametrize("pages", [2, 3, 4, 9])
def test_pages_are_left_as_they_were(pages):
    caches = tensors(["l0", "l1"], pages)
    before = {name: each.clone() for name, each in caches.items()}
    register(caches, [["l0", "l1"]], GroupedCache((LayerGroup(PAGED, (0, 1)),)))
    assert all(each.equal(before[name]) for name, each in caches.items())


def test_groups_whose_layers_share_memory():
    """vLLM gives layers of several groups one tensor; which pages are whose its tables say."""
    caches = tensors(["l0", "l2"], 9)
    caches |= {"l1": caches["l0"], "l3": caches["l2"]}
    before = {name: each.clone() for name, each in caches.items()}
    groups = LayerGroup(PAGED, (0, 2)), LayerGroup(PAGED, (1, 3), window_tokens=16)
    register(caches, [["l0", "l2"], ["l1", "l3"]], GroupedCache(groups))
    assert all(each.equal(before[name]) for name, each in caches.items())


def _other_order(real, self, copy):
    return real(self, replace(copy, pages=sorted(copy.pages)))


def _one_layer_less(real, self, copy):
    layers, self._layers = self._layers, [each[:-1] for each in self._layers]
    try:
        return real(self, copy)
    finally:
        self._layers = layers


def _beside(real, self, copy):
    done = real(self, copy)
    for pages, _ in self._layers[0]:
        pages[max(copy.pages) + 1, 0] ^= 1
    return done


def _another_slot(real, self, copy):
    del real
    for pages, slots in self._layers[0]:
        pages[copy.pages] = slots[0, copy.places]
    return True


@pytest.mark.parametrize(
    ("call", "fault", "said"),
    [
        ("save", _other_order, "other bytes"),
        ("load", _other_order, "other bytes"),
        ("save", _one_layer_less, "other bytes"),
        ("load", _one_layer_less, "other bytes"),
        ("load", _another_slot, "other bytes"),
        ("load", _beside, "not asked for"),
        ("save", lambda *_: False, "could not be stored"),
    ],
)
def test_copies_that_are_wrong_are_found(monkeypatch, call, fault, said):
    from kvstrata.connectors.vllm.grouped import GroupedPages

    real = getattr(GroupedPages, call)
    monkeypatch.setattr(GroupedPages, call, lambda self, copy: fault(real, self, copy))
    caches = tensors(["l0", "l1"], 9)
    before = {name: each.clone() for name, each in caches.items()}
    with pytest.raises(LayoutError, match=f"canary: .*{said}") as caught:
        register(caches, [["l0", "l1"]], GroupedCache((LayerGroup(PAGED, (0, 1)),)))
    assert "without the connector" in caught.value.hint
    assert all(each.equal(before[name]) for name, each in caches.items())


def test_an_engine_whose_pages_lie_otherwise_is_refused_at_start(engine_on, monkeypatch):
    """Same shapes, same strides, and other places: as a later vLLM might have it."""
    from kvstrata.connectors.vllm import worker

    real = worker._view

    def view(cache, name, tensor):
        return real(cache, name, tensor)[::-1]

    monkeypatch.setattr(worker, "_view", view)
    with (
        pytest.raises(LayoutError, match="canary: pages that were stored and loaded came back"),
        engine_on({"tiers": "host:64MiB"}),
    ):
        pass
