"""What vLLM stores is, after a transform, the KV that transformers computes for the same tokens."""

from __future__ import annotations

import random

import pytest

from kvstrata.layout import BlockLayout, Dimension, apply_transform, plan_transform

pytestmark = pytest.mark.engine


def test_vllm_blocks_are_transformers_kv(engine_on, tiny_model):
    import numpy as np
    import torch
    from transformers import DynamicCache, LlamaForCausalLM

    luck = random.Random(3)
    prompt = [luck.randrange(3, 512) for _ in range(200)]
    with engine_on({"tiers": "host:64MiB"}) as engine:
        (answer,) = engine.ask([prompt])
        engine.wait_idle()
        source, blocks = engine.stored(prompt)
    assert len(blocks) == 3
    model = LlamaForCausalLM.from_pretrained(tiny_model).eval()
    sizes = {"layer": 4, "kv": 2, "head": 2, "token": 64, "channel": 32}
    dimensions = tuple(Dimension(name, size) for name, size in sizes.items())
    target = BlockLayout(dimensions, "float32", 64, writer="transformers-dynamic")
    plan = plan_transform(source, target)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([prompt]), past_key_values=cache)
    loaded = []
    for number, block in enumerate(blocks):
        written = bytearray(target.block_bytes)
        apply_transform(plan, block, written, "float32")
        kv = torch.from_numpy(np.frombuffer(written, np.float32).reshape(list(sizes.values())))
        loaded.append(kv)
        for layer, (ours, theirs) in enumerate(zip(kv, cache.layers, strict=True)):
            tokens = slice(number * 64, number * 64 + 64)
            for part, whole in ((ours[0], theirs.keys), (ours[1], theirs.values)):
                expected = whole[0, :, tokens]
                difference = float((part - expected).abs().max() / expected.abs().max())
                assert difference < 1e-4, (number, layer)
    past = DynamicCache(config=model.config)
    for layer, kv in enumerate(torch.cat(loaded, dim=3)):
        past.update(kv[0][None], kv[1][None], layer)
    said = model.generate(
        torch.tensor([prompt]), past_key_values=past, max_new_tokens=16, min_new_tokens=16,
        do_sample=False,
    )  # fmt: skip
    assert tuple(said[0, 200:].tolist()) == answer.tokens, "transformers goes on where vLLM was"
