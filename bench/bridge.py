"""What re-arranging a block costs, beside copying it: the copies of vLLM's worker half.

    python bench/bridge.py

Prints GB/s of bytes moved, medians of five, for blocks of 64 tokens of a model with 32 layers, 8 KV
heads of 128 channels, in float16. `straight` is numpy's copy of the same bytes between the same
memories, page by page, as the worker half makes it where the daemon holds its own layout.
"""

from __future__ import annotations

import time
from statistics import median

import numpy as np

from kvstrata.layout import BlockLayout, Bridge, Dimension, PagedCache, Shard

BLOCKS, ROUNDS = 4, 5
SIZES = {"layer": 32, "kv": 2, "head": 8, "token": 64, "channel": 128}


def layout(*order: str) -> BlockLayout:
    """Return the layout with these axes."""
    axes = tuple(Dimension(name, SIZES[name]) for name in order)
    return BlockLayout(axes, "float16", 64, "bench", Shard())


LAYOUTS = {
    "vllm": PagedCache(32, 8, 16, 256, "float16").block_layout(64),
    "vllm-cpu-vec": PagedCache(32, 8, 32, 256, "float16", "vec").block_layout(64),
    "sglang-layer-first": layout("kv", "layer", "token", "head", "channel"),
    "transformers": layout("layer", "kv", "head", "token", "channel"),
}


def main() -> None:
    """Measure every pair both ways."""
    size = LAYOUTS["vllm"].block_bytes
    luck = np.random.default_rng(0)
    arena = luck.integers(0, 256, (BLOCKS, size), np.uint8)
    own, slots = np.empty_like(arena), list(range(BLOCKS))
    pages = own.reshape(BLOCKS, 32, 4, -1)
    held = arena.reshape(BLOCKS, 32, 4, -1)

    def straight() -> None:
        for layer in range(32):
            pages[slots, layer] = held[slots, layer]

    print(f"{'straight':>44} {speed(straight, size):6.2f}")
    for name, ours in LAYOUTS.items():
        for other, theirs in LAYOUTS.items():
            if name != other:
                bridge = Bridge(ours, theirs)
                took = speed(lambda: bridge.take(arena, slots, own), size)  # noqa: B023
                gave = speed(lambda: bridge.give(own, arena, slots), size)  # noqa: B023
                print(f"{name:>20} <-> {other:>20} load {took:6.2f} save {gave:6.2f}")


def speed(work: object, size: int) -> float:
    """Return GB/s of processor time, so that other processes count less."""
    times = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        work()  # type: ignore[operator]
        times.append(time.thread_time() - began)
    return BLOCKS * size / median(times) / 1e9


if __name__ == "__main__":
    main()
