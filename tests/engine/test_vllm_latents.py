"""MLA: blocks of latents, one vector a token, from which K and V are computed anew.

vLLM's CPU kernel that attends over a prefix of latents needs AMX. On other machines vLLM turns
prefix caching off for such models; then the connector must keep out of the way, and that is tested.
"""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from kvstrata.core.errors import LayoutError

pytestmark = pytest.mark.engine

BLOCK = 32
LENGTHS = (1, 40, 63, 64, 65, 100, 128, 129, 192, 193, 257, 400)
OPTIONS = {"dtype": "bfloat16"}


def _can_attend():
    import torch

    return torch.cpu._is_amx_tile_supported()


@pytest.fixture(scope="module")
def prompts():
    luck = random.Random(0)
    return [[luck.randrange(3, 512) for _ in range(length)] for length in LENGTHS]


def _tokens(answers):
    return [answer.tokens for answer in answers]


def _from(answers, tier):
    return [answer.tokens_from.get(tier, 0) for answer in answers]


def _each(engine, prompts, **extra):
    """Ask one after the other: numbers of 16 bits depend on what is computed beside them."""
    return [engine.ask([prompt], **extra)[0] for prompt in prompts]


def test_host_then_disk_after_restart(engine_on, deepseek, prompts, tmp_path):
    """Answers on what was loaded are vLLM's own on what it has kept itself, to the last bit.

    They are not those on a prompt that is computed whole: vLLM's kernel for a prefix adds up in
    another order, so 16-bit numbers differ, with or without kvstrata.
    """
    extra = {"tiers": f"host:64MiB,disk:{tmp_path}:64MiB", "block_tokens": BLOCK}
    with engine_on(model=deepseek, **OPTIONS) as engine:
        computed = _each(engine, prompts)
        kept = _each(engine, prompts)
    with engine_on(extra, model=deepseek, **OPTIONS) as engine:
        cold = _each(engine, prompts)
        engine.forget()
        warm = _each(engine, prompts)
        engine.forget()
        salted = _each(engine, prompts, cache_salt="another")
        engine.wait_idle()
    with engine_on(extra, model=deepseek, **OPTIONS) as engine:
        restarted = _each(engine, prompts)
    with engine_on(extra, model=deepseek, hf_overrides={"rms_norm_eps": 1e-3}, **OPTIONS) as engine:
        other = _each(engine, prompts)
    assert len(set(_tokens(computed))) == len(prompts), "answers that are all the same show nothing"
    assert _tokens(cold) == _tokens(salted) == _tokens(computed)
    hits = [length // BLOCK * BLOCK if _can_attend() else 0 for length in LENGTHS]
    nothing = [0] * len(prompts)
    assert _from(cold, "host") == _from(salted, "host") == nothing
    assert _from(other, "host") == _from(other, "disk") == nothing
    assert _from(warm, "host") == _from(restarted, "disk") == hits
    assert _tokens(warm) == _tokens(restarted)
    # Of a prompt of whole blocks vLLM itself keeps a block less than we load: nothing to compare.
    same = [place for place, length in enumerate(LENGTHS) if length % BLOCK]
    assert [kept[place].cached for place in same] == [hits[place] for place in same]
    assert [warm[place].tokens for place in same] == [kept[place].tokens for place in same]


def test_where_vllm_keeps_no_prefix_nothing_is_kept(engine_on, deepseek, prompts):
    """Its kernel for CPUs without AMX attends over no prefix, and would answer wrongly on one."""
    options = OPTIONS | {"attention_config": {"backend": "CPU_MLA"}}
    with engine_on(model=deepseek, **options) as engine:
        alone = _each(engine, prompts)
    with engine_on({"tiers": "host:64MiB"}, model=deepseek, **options) as engine:
        assert not engine.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
        cold, again = _each(engine, prompts), _each(engine, prompts)
        assert engine.counters()["stored_blocks"] == 0
    assert _tokens(cold) == _tokens(again) == _tokens(alone)
    assert _from(again, "host") == [0] * len(prompts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_kv_heads": 2}, "num_kv_heads"),
        ({"head_size_v": 64}, "head_size_v"),
        ({"model_version": "deepseek_v4"}, "model_version"),
        ({"alignment": 512}, "alignment"),
        ({"is_index_group_leader": True}, "is_index_group_leader"),
        ({"non_causal_multi_token_decode": True}, "non_causal_multi_token_decode"),
        ({"workers": 2}, "tensor_parallel_size"),
        ({"cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"cache_dtype": "fp8_ds_mla"}, "kv_cache_dtype"),
        ({"tokens_per_state": 4}, "tokens_per_state"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_latents_are_refused(change, said):
    """By vLLM's own description of them: no model of each kind runs here."""
    import torch
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec, MLAAttentionSpec

    from kvstrata.connectors.vllm import geometry

    def geometry_of(workers=1, cache_dtype="auto", **changed):
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=workers),
            cache_config=SimpleNamespace(cache_dtype=cache_dtype),
            model_config=SimpleNamespace(dtype=torch.bfloat16),
        )
        spec = MLAAttentionSpec(block_size=32, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
        group = KVCacheGroupSpec(["model.layers.0.attn"], replace(spec, **changed))
        return geometry._group(config, group, {"model.layers.0.attn": 0})

    cache = geometry_of().cache
    assert (cache.heads, cache.channels, cache.page_bytes) == (1, 576, 32 * 576 * 2)
    assert cache.writer.startswith("vllm-cpu-latent"), "none but us re-arranges it"
    with pytest.raises(LayoutError, match=said) as caught:
        geometry_of(**change)
    assert "run this model without the connector" in caught.value.hint
