"""Caches of 8-bit floats: blocks of an element type of their own, the answers of vLLM alone."""

from __future__ import annotations

import json

import pytest

from kvstrata.core.errors import ConfigError, LayoutError

pytestmark = pytest.mark.engine


def _tokens(answers):
    return [answer.tokens for answer in answers]


def _from(answers, tier):
    return [answer.tokens_from[tier] for answer in answers]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("fp8_e4m3", "float8_e4m3fn"), ("fp8_e5m2", "float8_e5m2")]
)
def test_host_then_disk_after_restart(engine_on, prompts, reference, tmp_path, kind, dtype):
    extra = {"tiers": f"host:64MiB,disk:{tmp_path}:64MiB"}
    with engine_on(kv_cache_dtype=kind) as engine:
        expected = _tokens(engine.ask(prompts))
    with engine_on(extra, kv_cache_dtype=kind) as engine:
        cold = engine.ask(prompts)
        engine.forget()
        warm = engine.ask(prompts)
        engine.wait_idle()
        layout = engine.connector._scheduler.session.layout
    with engine_on(extra, kv_cache_dtype=kind) as engine:
        restarted = engine.ask(prompts)
    assert _tokens(cold) == _tokens(warm) == _tokens(restarted) == expected
    assert expected != reference, "a cache of 8 bits that rounds nothing is none"
    assert _from(warm, "host") == _from(restarted, "disk") == [64, 128, 256, 0]
    assert _from(cold, "host") == _from(restarted, "host") == [0, 0, 0, 0]
    assert layout.dtype == dtype
    assert layout.block_bytes == 64 * 4 * 2 * 64  # tokens, layers, heads, K and V of 32 bytes each


def test_pressure_preempts_evicts_and_answers_the_same(engine_on, prompts, tmp_path):
    many = [prompts[2][start : start + 150] for start in range(0, 96, 16)]
    small = {"kv_cache_dtype": "fp8", "kv_cache_memory_bytes": 22 * 4 * 4096}  # 22 pages
    with engine_on(**small, max_num_batched_tokens=96) as engine:
        expected = _tokens(engine.ask(many, max_tokens=80))
    extra = {"tiers": f"host:300KiB,disk:{tmp_path}:64MiB"}  # 8 blocks in the host
    with engine_on(extra, **small, max_num_batched_tokens=96) as engine:
        for _ in range(2):
            assert _tokens(engine.ask(many, max_tokens=80)) == expected
            engine.wait_idle()
            engine.forget()
        values = {m.name: m.value for m in engine.llm.get_metrics() if hasattr(m, "value")}
        counters = engine.counters()
    assert values["vllm:num_preemptions"] > 0
    assert counters["hit_blocks_staged"] > 0
    assert counters["corrupt_blocks"] == 0


def _scale(model, scale):
    """Give the model's files scales of keys and values, as a checkpoint that was calibrated has."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": {
            "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False,
            "symmetric": True,
        },
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors")
    for layer in range(4):
        for part in "kv":
            tensors[f"model.layers.{layer}.self_attn.{part}_scale"] = torch.tensor([scale])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def test_scales_are_part_of_the_identity(engine_on, make_llama, prompts, tmp_path):
    """They are numbers of the checkpoint: with others nothing is found, and answers are right."""
    model = make_llama(tmp_path / "model")
    extra = {"tiers": f"host:64MiB,disk:{tmp_path / 'kv'}:64MiB"}
    answers = []
    for scale in (0.5, 0.01):
        _scale(model, scale)
        with engine_on(model=model, kv_cache_dtype="fp8") as engine:
            expected = _tokens(engine.ask(prompts))
        with engine_on(extra, model=model, kv_cache_dtype="fp8") as engine:
            cold = engine.ask(prompts)
            engine.forget()
            warm = engine.ask(prompts)
            engine.wait_idle()
        assert _tokens(cold) == _tokens(warm) == expected
        assert _from(cold, "disk") == [0, 0, 0, 0]
        assert _from(warm, "host") == [64, 128, 256, 0]
        answers.append(expected)
    assert answers[0] != answers[1], "the scales were not read"


def test_another_kind_never_hits(engine_on, prompts, tmp_path):
    """The daemon holds one layout; to 8-bit floats of another kind it has no session to give."""
    extra = {"tiers": f"host:64MiB,disk:{tmp_path}:64MiB"}
    with engine_on(extra, kv_cache_dtype="fp8_e4m3") as engine:
        engine.ask(prompts)
        engine.wait_idle()
    with (
        pytest.raises(ConfigError, match="another layout"),
        engine_on(extra, kv_cache_dtype="fp8_e5m2"),
    ):
        pass


def test_a_scale_for_each_token_is_refused(engine_on):
    with (
        pytest.raises(LayoutError, match=r"'kv_cache_dtype': 'fp8_per_token_head'"),
        engine_on({"tiers": "host:64MiB"}, kv_cache_dtype="fp8_per_token_head"),
    ):
        pass
