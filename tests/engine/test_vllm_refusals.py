"""What kvstrata does not know it refuses at start, in one sentence with a remedy."""

from __future__ import annotations

import pytest
from kit import write_qwen3_next

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


def test_states_that_vllm_keeps_at_no_boundary_are_refused(engine_on, tmp_path):
    """Without prefix caching a state is computed on in place, and nobody could load it."""
    model = write_qwen3_next(tmp_path / "m")
    options = {"model": model, "dtype": "bfloat16", "enable_prefix_caching": False}
    said = _refusal(engine_on, {"tiers": "host:64MiB"}, LayoutError, **options)
    assert "KV cache is MambaSpec with {'mamba_cache_mode': 'none'" in said


def test_speculative_decoding_with_drafts_of_its_own_kv_is_refused():
    """A draft model's layers are in the engine's cache, and hold what was never accepted."""
    from types import SimpleNamespace

    from kvstrata.connectors.vllm import geometry

    def config(method):
        return SimpleNamespace(
            parallel_config=SimpleNamespace(), speculative_config=SimpleNamespace(method=method)
        )

    geometry._refuse_parallel(config("ngram"))
    for method in ("eagle", "eagle3", "mtp", "draft_model", "medusa", "suffix", "later"):
        with pytest.raises(LayoutError, match=f"decoding by '{method}'") as caught:
            geometry._refuse_parallel(config(method))
        assert "ngram" in caught.value.hint


def test_tensor_of_unknown_geometry_is_refused(engine_on, monkeypatch):
    """A later vLLM may hand over other tensors under the same configuration."""
    from kvstrata.connectors.vllm.worker import WorkerHalf

    real_register = WorkerHalf.register

    def register(self, caches, layer_names, *place):
        turned = {name: cache.transpose(1, 2) for name, cache in caches.items()}
        real_register(self, turned, layer_names, *place)

    monkeypatch.setattr(WorkerHalf, "register", register)
    assert "not contiguous pages" in _refusal(engine_on, {"tiers": "host:64MiB"}, LayoutError)


def test_tensor_of_another_type_is_refused(engine_on, monkeypatch):
    import torch

    from kvstrata.connectors.vllm.worker import WorkerHalf

    real_register = WorkerHalf.register

    def register(self, caches, layer_names, *place):
        cast = {name: cache.view(torch.int32) for name, cache in caches.items()}
        real_register(self, cast, layer_names, *place)

    monkeypatch.setattr(WorkerHalf, "register", register)
    said = _refusal(engine_on, {"tiers": "host:64MiB"}, LayoutError)
    assert "elements of int32, not float32" in said


def test_untested_vllm_is_refused(engine_on, monkeypatch):
    from kvstrata.connectors.vllm import geometry

    monkeypatch.setattr(geometry.vllm, "__version__", "0.99.1")
    said = _refusal(engine_on, {"tiers": "host:64MiB"}, LayoutError)
    assert "vLLM 0.99.1 is not a version" in said


def test_media_are_refused_with_the_older_release(monkeypatch):
    from types import SimpleNamespace

    from kvstrata.connectors.vllm import releases

    def config(media):
        return SimpleNamespace(model_config=SimpleNamespace(is_multimodal_model=media))

    monkeypatch.setattr(releases.vllm, "__version__", "0.31.0")
    releases.refuse_untried(config(media=False))
    with pytest.raises(LayoutError, match=r"not tried with vLLM 0\.31\.0") as caught:
        releases.refuse_untried(config(media=True))
    assert "use vLLM 0.32" in caught.value.hint
    monkeypatch.setattr(releases.vllm, "__version__", "0.32.0")
    releases.refuse_untried(config(media=True))


# -- identity ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def key_of(tiny_model):
    """The model key of an engine with some options, as its connector would say it."""
    from vllm.engine.arg_utils import EngineArgs

    from kvstrata.connectors.vllm.identity import vllm_namespace
    from kvstrata.layout import PagedCache

    def key(*, revision="", name="", **options):
        known = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
        config = EngineArgs(str(tiny_model), **(known | options)).create_engine_config()
        layout = PagedCache(4, 2, 32, 64, "float32", "vec").block_layout(64)
        return vllm_namespace(config, layout, revision=revision, name=name).model_key(bytes(32))

    return key


LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 512,
    "short_factor": [1.0] * 16, "long_factor": [2.0] * 16,
}  # fmt: skip


def test_what_changes_no_number_is_not_in_the_namespace(key_of):
    ours = key_of()
    for same in (
        {"served_model_name": ["other"]},
        {"max_model_len": 512},
        {"seed": 7},
        {"load_format": "safetensors"},
        {"block_size": 64},
    ):
        assert key_of(**same) == ours, same


def test_what_may_change_one_is(key_of):
    changes = [
        {},
        {"dtype": "bfloat16"},
        {"hf_overrides": {"rms_norm_eps": 1e-3}},
        {"hf_overrides": {"rope_parameters": {"rope_type": "linear", "factor": 2.0,
                                              "rope_theta": 10000.0}}},
        {"hf_overrides": {"rope_parameters": LONG}, "max_model_len": 512},
        {"hf_overrides": {"rope_parameters": LONG}, "max_model_len": 1024},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"load_format": "dummy", "seed": 0},
        {"load_format": "dummy", "seed": 1},
        {"name": "other"},
        {"revision": "r1"},
        {"revision": "r2"},
    ]  # fmt: skip
    assert len({key_of(**change) for change in changes}) == len(changes)
