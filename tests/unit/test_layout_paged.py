"""Pages of an engine's cache: what is read, and what is refused rather than guessed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvstrata.core.errors import LayoutError
from kvstrata.layout import Dimension, PagedCache, page_view

CACHE = PagedCache(layers=2, heads=3, page_tokens=4, channels=10, dtype="float16")
PAGES = 7


def strided(array):
    """Return the shape and the strides in elements, as torch counts them."""
    return array.shape, tuple(stride // array.itemsize for stride in array.strides)


def whole(cache=CACHE):
    return np.zeros((PAGES, cache.heads, cache.page_tokens, cache.channels), np.float16)


def test_numbers() -> None:
    assert CACHE.page_bytes == 3 * 4 * 10 * 2
    assert CACHE.pages_per_block(4) == 1
    assert CACHE.pages_per_block(16) == 4
    layout = CACHE.block_layout(16)
    assert layout.dimensions == (
        Dimension("layer", 2),
        Dimension("page", 4),
        Dimension("head", 3),
        Dimension("token", 4),
        Dimension("channel", 10),
    )
    assert (layout.dtype, layout.block_tokens) == ("float16", 16)
    assert layout.writer == "vllm-paged-fused-kv"
    packed = replace(CACHE, packing="amx").block_layout(8)
    assert packed.writer == "vllm-cpu-amx"
    assert packed.fingerprint != layout.fingerprint
    assert layout.block_bytes == 2 * 4 * CACHE.page_bytes


@pytest.mark.parametrize("block_tokens", [1, 2, 6, 17])
def test_a_fraction_of_a_page_is_refused(block_tokens) -> None:
    for refuse in (CACHE.pages_per_block, CACHE.block_layout):
        with pytest.raises(LayoutError, match="block_tokens") as caught:
            refuse(block_tokens)
        assert "multiple of 4" in caught.value.hint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_page_view_counts_in_bytes(dtype) -> None:
    cache = PagedCache(2, 3, 4, 10, dtype)
    assert page_view(cache, *strided(whole()), name="l") == (PAGES, cache.page_bytes)


def test_contiguous_pages() -> None:
    assert page_view(CACHE, *strided(whole()), name="l") == (PAGES, 240)


def test_padded_and_interleaved_pages() -> None:
    padded = np.zeros((PAGES, 5, 4, 10), np.float16)[:, :3]
    assert page_view(CACHE, *strided(padded), name="l") == (PAGES, 5 * 4 * 10 * 2)
    every_second = np.zeros((PAGES * 2, 3, 4, 10), np.float16)[::2]
    assert page_view(CACHE, *strided(every_second), name="l") == (PAGES, 480)
    layers_inside = np.zeros((PAGES, 2, 3, 4, 10), np.float16)[:, 1]
    assert page_view(CACHE, *strided(layers_inside), name="l") == (PAGES, 480)


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("stride", [0, 1, 77, 10**9])
def test_a_size_of_one_may_carry_any_stride(axis, stride) -> None:
    sizes = [3, 4, 10]
    sizes[axis - 1] = 1
    cache = PagedCache(2, *sizes, "float16")
    shape, strides = strided(whole(cache))
    odd = [*strides[:axis], stride, *strides[axis + 1 :]]
    assert page_view(cache, shape, odd, name="l") == (PAGES, cache.page_bytes)


REFUSED = {
    "tokens before heads": np.zeros((PAGES, 4, 3, 10), np.float16),
    "transposed view": np.zeros((PAGES, 4, 3, 10), np.float16).transpose(0, 2, 1, 3),
    "channels before tokens": np.zeros((PAGES, 3, 10, 4), np.float16).transpose(0, 1, 3, 2),
    "pages inside": np.zeros((3, PAGES, 4, 10), np.float16).transpose(1, 0, 2, 3),
    "gaps between heads": np.zeros((PAGES, 6, 4, 10), np.float16)[:, ::2],
    "gaps between tokens": np.zeros((PAGES, 3, 8, 10), np.float16)[:, :, ::2],
    "gaps between channels": np.zeros((PAGES, 3, 4, 20), np.float16)[..., ::2],
    "padded tokens": np.zeros((PAGES, 3, 4, 16), np.float16)[..., :10],
    "heads backwards": np.zeros((PAGES, 3, 4, 10), np.float16)[:, ::-1],
    "pages backwards": np.zeros((PAGES, 3, 4, 10), np.float16)[::-1],
    "one page many times": np.broadcast_to(np.zeros((1, 3, 4, 10), np.float16), (PAGES, 3, 4, 10)),
    "pages that overlap": np.lib.stride_tricks.as_strided(
        np.zeros(2000, np.float16), (PAGES, 3, 4, 10), (238, 80, 20, 2)
    ),
    "3-D": np.zeros((PAGES, 3, 40), np.float16),
    "5-D": np.zeros((2, PAGES, 3, 4, 10), np.float16),
    "K and V apart": np.zeros((PAGES, 2, 3, 4, 5), np.float16),
    "other heads": np.zeros((PAGES, 4, 4, 10), np.float16),
    "other page size": np.zeros((PAGES, 3, 5, 10), np.float16),
    "other channels": np.zeros((PAGES, 3, 4, 11), np.float16),
    "no axes": np.zeros((), np.float16),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case) -> None:
    shape, strides = strided(REFUSED[case])
    with pytest.raises(LayoutError) as caught:
        page_view(CACHE, shape, strides, name="model.layers.3")
    assert "model.layers.3" in caught.value.message
    assert str(tuple(shape)) in caught.value.message
    assert caught.value.hint
