"""What kvstrata does not know it refuses at start, in one sentence with a remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvstrata.core.errors import ConfigError, DaemonError, LayoutError

pytestmark = pytest.mark.engine


def _refusal(engine_on, extra, kind=ConfigError, **options):
    with pytest.raises(kind) as caught, engine_on(extra, **options):
        pass
    assert caught.value.hint
    return caught.value.message


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"tiers": "host:64MiB,tape:1GiB"}, "tiers: unknown tier 'tape'"),
        ({"tiers": "host:64"}, "tiers.host: 64 bytes hold not one block"),
        ({"tiers": "host:900TiB"}, "tiers.host: "),
        ({"tiers": "host:64MiB,disk:/proc/nowhere:1GiB"}, "tiers.disk: directory"),
        ({"tires": "host:64MiB"}, "kv_connector_extra_config: Object contains unknown field"),
        ({"block_tokens": 0}, "`$.block_tokens`"),
        ({"block_tokens": 48}, "block_tokens: 48 is no multiple of the engine's page of 32 tokens"),
        ({"address": "tcp://1.2.3.4:5"}, "address: "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_settings(engine_on, extra, said):
    assert said in _refusal(engine_on, extra)


def test_no_daemon_at_the_address(engine_on, tmp_path):
    extra = {"address": f"ipc://{tmp_path}/none.sock", "start_timeout_s": 0.5}
    with pytest.raises(DaemonError, match=r"none\.sock"), engine_on(extra):
        pass


def test_slab_of_another_layout_is_refused_and_left_alone(engine_on, prompts, tmp_path):
    extra = {"tiers": f"host:64MiB,disk:{tmp_path}:64MiB"}
    with engine_on(extra) as engine:
        engine.ask(prompts)
        engine.wait_idle()
    slab = tmp_path / "blocks.slab"
    before = slab.read_bytes()
    said = _refusal(engine_on, extra | {"block_tokens": 128})
    assert "holds blocks of another layout" in said
    assert slab.read_bytes() == before


def _qwen3_next(folder):
    import torch
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        full_attention_interval=4,
    )
    Qwen3NextForCausalLM(config).float().save_pretrained(folder)
    return folder


def _deepseek(folder):
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        max_position_embeddings=2048,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
    )
    DeepseekV2ForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("write", "kind", "options"),
    [
        (_qwen3_next, "MambaSpec", {"dtype": "bfloat16"}),
        (_deepseek, "MLAAttentionSpec", {"block_size": 16, "dtype": "bfloat16"}),
    ],
)
def test_a_cache_of_another_kind_is_refused(engine_on, tmp_path, write, kind, options):
    """Which bytes of it mean what, and when, no table of pages says."""
    model = write(tmp_path / "m")
    said = _refusal(engine_on, {"tiers": "host:64MiB"}, LayoutError, model=model, **options)
    assert f"KV cache is {kind}" in said


def test_speculative_decoding_is_refused(tiny_model):
    """In a process of its own: speculation imports numba, after which no other engine starts."""
    script = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import run_engine
with run_engine(
    Path(sys.argv[2]),
    {"tiers": "host:64MiB"},
    speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2},
):
    pass
"""
    here = str(Path(__file__).parent)
    ended = subprocess.run(
        [sys.executable, "-c", script, here, str(tiny_model)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode != 0
    assert "LayoutError: speculative decoding is not supported yet" in ended.stderr


def test_tensor_of_unknown_geometry_is_refused(engine_on, monkeypatch):
    """A later vLLM may hand over other tensors under the same configuration."""
    from kvstrata.connectors.vllm.worker import WorkerHalf

    real_register = WorkerHalf.register

    def register(self, caches, layer_names, rank):
        turned = {name: cache.transpose(1, 2) for name, cache in caches.items()}
        real_register(self, turned, layer_names, rank)

    monkeypatch.setattr(WorkerHalf, "register", register)
    assert "not contiguous pages" in _refusal(engine_on, {"tiers": "host:64MiB"}, LayoutError)


def test_tensor_of_another_type_is_refused(engine_on, monkeypatch):
    import torch

    from kvstrata.connectors.vllm.worker import WorkerHalf

    real_register = WorkerHalf.register

    def register(self, caches, layer_names, rank):
        cast = {name: cache.view(torch.int32) for name, cache in caches.items()}
        real_register(self, cast, layer_names, rank)

    monkeypatch.setattr(WorkerHalf, "register", register)
    said = _refusal(engine_on, {"tiers": "host:64MiB"}, LayoutError)
    assert "elements of int32, not float32" in said


def test_untested_vllm_is_refused(engine_on, monkeypatch):
    from kvstrata.connectors.vllm import geometry

    monkeypatch.setattr(geometry.vllm, "__version__", "0.99.1")
    said = _refusal(engine_on, {"tiers": "host:64MiB"}, LayoutError)
    assert "vLLM 0.99.1 is not a version" in said
