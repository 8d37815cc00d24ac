"""Whole runs with layer-wise loads and saves: many prompts, small caches, refusals."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from kvstrata.core.errors import ConfigError

pytestmark = pytest.mark.engine

LAYERWISE = {"tiers": "host:64MiB", "loading": "layerwise", "saving": "layerwise"}


def _copies():
    """The class that copies; its module imports vLLM, which must not be while tests are found."""
    from kvstrata.connectors.vllm.layerwise import LayerCopies

    return LayerCopies


@pytest.fixture(scope="module")
def many(engine_on):
    """Four dozen prompts that share beginnings, and vLLM's answers without kvstrata."""
    luck = random.Random(5)
    roots = [[luck.randrange(3, 512) for _ in range(192)] for _ in range(4)]
    asked = [
        [*roots[index % 4][: luck.choice((64, 100, 128, 192))]]
        + [luck.randrange(3, 512) for _ in range(luck.choice((1, 28, 32, 64, 90)))]
        for index in range(48)
    ]
    with engine_on() as alone:
        return asked, [answer.tokens for answer in alone.ask(asked)]


@pytest.fixture
def begun(monkeypatch):
    """Counts of loads that were begun beside a pass, and of saves that were made beside one."""
    seen = {"loads": 0, "saves": 0}
    real_begin, real_end = _copies().begin_loads, _copies().end_saves

    def begin(self, jobs):
        seen["loads"] += len(jobs)
        real_begin(self, jobs)

    def end(self):
        jobs = real_end(self)
        seen["saves"] += len(jobs)
        return jobs

    monkeypatch.setattr(_copies(), "begin_loads", begin)
    monkeypatch.setattr(_copies(), "end_saves", end)
    return seen


def _tokens(answers):
    return [answer.tokens for answer in answers]


@pytest.mark.parametrize("batch_tokens", [512, 96], ids=["whole", "chunked"])
def test_dozens_of_prompts(engine_on, many, begun, tmp_path, batch_tokens):
    asked, expected = many
    extra = LAYERWISE | {"tiers": f"host:64MiB,disk:{tmp_path}:64MiB"}
    options = {"max_num_batched_tokens": batch_tokens}
    with engine_on(extra, **options) as engine:
        assert _tokens(engine.ask(asked)) == expected
        assert begun["saves"] > 0
        engine.forget()
        warm = engine.ask(asked)
        assert _tokens(warm) == expected
        assert begun["loads"] > 0
        assert sum(answer.tokens_from["host"] for answer in warm) > 0
        engine.wait_idle()
    with engine_on(extra, **options) as engine:
        restarted = engine.ask(asked)
    assert _tokens(restarted) == expected
    assert sum(answer.tokens_from["disk"] for answer in restarted) > 0


def _fail_every_third(monkeypatch):
    """Let copies of layers write rubbish and fail, in every third step that loads."""
    real_begin, real_load = _copies().begin_loads, _copies()._load_layer
    steps, failures = [], []

    def begin(self, jobs):
        steps.extend([True] if jobs else [])
        real_begin(self, jobs)

    def load(self, name, rows):
        if len(steps) % 3 != 1:
            real_load(self, name, rows)
            return
        pages, _ = self._layers[name]
        pages[rows.pages] = 0x3F
        failures.append(name)
        raise OSError("the copy failed")

    monkeypatch.setattr(_copies(), "begin_loads", begin)
    monkeypatch.setattr(_copies(), "_load_layer", load)
    return failures


def test_preempted_requests_answer_the_same(engine_on, prompts, begun, monkeypatch):
    many = [prompts[2][start : start + 150] for start in range(0, 96, 16)]
    small = {"kv_cache_memory_bytes": 22 * 4 * 16384}  # 22 pages of 4 layers: too few for all
    with engine_on(**small) as engine:
        expected = _tokens(engine.ask(many, max_tokens=80))
    with engine_on(LAYERWISE, **small) as engine:
        assert _tokens(engine.ask(many, max_tokens=80)) == expected
        preemptions = {m.name: m.value for m in engine.llm.get_metrics() if hasattr(m, "value")}
        assert preemptions["vllm:num_preemptions"] > 0
        engine.forget()
        assert _tokens(engine.ask(many, max_tokens=80)) == expected
        assert begun["loads"] > 0
        assert begun["saves"] > 0
        failures = _fail_every_third(monkeypatch)
        for _ in range(2):
            engine.forget()
            assert _tokens(engine.ask(many, max_tokens=80)) == expected
    assert failures


def test_an_engine_that_does_not_ask_for_layers_loads_between_steps(
    engine_on, prompts, reference, begun, monkeypatch, caplog
):
    from kvstrata.connectors.vllm.layerworker import LayerwiseWorker

    for name in ("wait_for", "computed"):
        monkeypatch.setattr(LayerwiseWorker, name, lambda *_: None)
    with engine_on(LAYERWISE) as engine:
        assert _tokens(engine.ask(prompts)) == reference
        engine.forget()
        answers = engine.ask(prompts)
    assert _tokens(answers) == reference
    assert [answer.tokens_from["host"] for answer in answers] == [64, 128, 256, 0]
    assert begun == {"loads": 0, "saves": 0}
    assert "computes without asking for layer" in caplog.text


@pytest.mark.parametrize(
    ("extra", "options", "said"),
    [
        ({"loading": "sync"}, {}, "Invalid enum value 'sync' - at `$.loading`"),
        (
            {"saving": "layerwise"},
            {"kv_cache_dtype": "fp8_e4m3"},
            "saving: layerwise is not proven with a quantised cache",
        ),
    ],
    ids=["setting", "cache"],
)
def test_what_is_refused(engine_on, extra, options, said):
    with pytest.raises(ConfigError) as caught, engine_on(extra, **options):
        pass
    assert said in caught.value.message
    assert caught.value.hint


def _refuse(loading="layerwise", saving="blocks", *, spec=None, whole=True, alone=True, **changed):
    """Ask for layer-wise copies on an engine like the tests', but for what is `changed`."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from kvstrata.connectors.vllm.samestep import refuse_layerwise
    from kvstrata.connectors.vllm.settings import ConnectorSettings

    full = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
    proven = {
        "parallel_config.world_size": 1,
        "parallel_config.data_parallel_size": 1,
        "parallel_config.use_ubatching": False,
        "speculative_config": None,
        "max_concurrent_batches": 1,
        "use_v2_model_runner": False,
        "cache_config.cache_dtype": "auto",
        "model_config.is_multimodal_model": False,
        "model_config.quantization": None,
        "device_config.device_type": "cpu",
    }
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(),
        cache_config=SimpleNamespace(),
        model_config=SimpleNamespace(),
        device_config=SimpleNamespace(),
    )
    for name, value in (proven | changed).items():
        owner, _, field = name.rpartition(".")
        setattr(getattr(config, owner) if owner else config, field, value)
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec or full)])
    refuse_layerwise(
        ConnectorSettings(loading=loading, saving=saving),
        config,
        groups,
        SimpleNamespace(is_whole=whole),
        alone=alone,
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"whole": False}, "several cache groups or a sliding window"),
        ({"spec": "latents"}, "a cache other than full attention"),
        ({"cache_config.cache_dtype": "fp8_e5m2"}, "a quantised cache"),
        ({"model_config.is_multimodal_model": True}, "images"),
        ({"parallel_config.world_size": 2}, "several workers"),
        ({"parallel_config.data_parallel_size": 2}, "data parallelism"),
        ({"parallel_config.use_ubatching": True}, "micro-batches"),
        ({"alone": False}, "another connector beside it"),
        ({"speculative_config": "ngram"}, "speculative decoding"),
        ({"max_concurrent_batches": 2}, "asynchronous scheduling"),
        ({"use_v2_model_runner": True}, "vLLM's second model runner"),
        ({"model_config.quantization": "awq"}, "quantised weights"),
        ({"device_config.device_type": "cuda"}, "a device that is not the CPU"),
    ],
)
def test_engines_that_are_not_proven_are_refused(changed, said):
    with pytest.raises(ConfigError, match=f"loading: layerwise is not proven with {said}"):
        _refuse(**changed)
    if said != "quantised weights":
        with pytest.raises(ConfigError, match=f"saving: layerwise is not proven with {said}"):
            _refuse("async", "layerwise", **changed)
    _refuse("async", "blocks", **changed)


def test_the_proven_engine_and_quantised_weights_that_are_only_saved():
    _refuse("layerwise", "layerwise")
    _refuse("async", "layerwise", **{"model_config.quantization": "awq"})


def test_only_layer_wise_engines_are_kept_from_whole_graphs():
    from kvstrata.connectors.vllm import KvstrataConnector

    asks = KvstrataConnector.requires_piecewise_for_cudagraph
    assert [asks({}), asks({"loading": "async"}), asks({"saving": "blocks"})] == [False] * 3
    assert asks({"loading": "layerwise"})
    assert asks({"saving": "layerwise"})
