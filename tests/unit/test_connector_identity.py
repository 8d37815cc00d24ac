"""What names weights and configurations, for every connector."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from kvstrata.connectors.identity import (
    ModelIdentity,
    disputed,
    engine_namespace,
    model_name,
    numerics_digest,
    plain_config,
    weights_revision,
)
from kvstrata.core.errors import ConfigError
from kvstrata.layout import BlockLayout, Dimension, PagedCache


def test_revision_that_may_move_is_refused(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    unknown, known = SimpleNamespace(), SimpleNamespace(_commit_hash=commit)
    assert weights_revision("owner/model", "v1.0", known, setting="x") == f"commit:{commit}"
    assert weights_revision("owner/model", commit, unknown, setting="x") == f"commit:{commit}"
    for moving in (None, "main", "v1.0", commit[:12]):
        with pytest.raises(ConfigError, match="weights_revision"):
            weights_revision("owner/model", moving, unknown, setting="x")
    with pytest.raises(ConfigError, match="no weight files"):
        weights_revision(str(tmp_path), None, unknown, setting="x")


def test_an_edited_file_is_another_revision(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"w" * 1000)
    first = weights_revision(str(tmp_path), None, None, setting="x")
    assert weights_revision(str(tmp_path), None, None, setting="x") == first
    status = file.stat()
    file.write_bytes(b"w" * 999 + b"v")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights_revision(str(tmp_path), None, None, setting="x") != first


def test_configuration_without_what_changes_from_run_to_run():
    config = {
        "layers": 2,
        "_commit_hash": "x",
        "rope": {"factor": 2.0, "_seen": 1},
        "odd": [1, {2}],
    }
    assert plain_config(config) == {"layers": 2, "rope": {"factor": 2.0}, "odd": [1, "{2}"]}
    assert numerics_digest({"a": 1, "b": 2}) == numerics_digest({"b": 2, "a": 1})
    assert numerics_digest({"a": 1}) != numerics_digest({"a": 2})


# -- one namespace for engines that agree ------------------------------------------------------

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "dtype": "bfloat16",
    "transformers_version": "5.16",
    "_name_or_path": "/here",
}
OURS = ModelIdentity("vllm", "m", "w", CONFIG, "float32")
PAGED = PagedCache(2, 2, 16, 8, "float32", "vec").block_layout(64)
PLAIN = BlockLayout(
    tuple(
        Dimension(name, size)
        for name, size in (("layer", 2), ("kv", 2), ("head", 2), ("token", 64), ("channel", 4))
    ),
    "float32",
    64,
    "transformers-dynamic",
)


def key(identity=OURS, layout=PAGED):
    return engine_namespace(identity, layout).model_key(bytes(32))


def rope(**parameters):
    return CONFIG | {"rope_parameters": {"rope_theta": 10000.0} | parameters}


@pytest.mark.parametrize(
    "same",
    [
        replace(OURS, engine="sglang"),
        replace(OURS, tokens_max=99),
        replace(OURS, kv_dtype=""),
        replace(OURS, own={"quantization": None, "model_impl": "auto", "modelopt_quant": False}),
        replace(OURS, config=CONFIG | {"transformers_version": "5.19", "_name_or_path": "/there"}),
        replace(OURS, config=CONFIG | {"dtype": "float32", "use_cache": False, "eos_token_id": 7}),
        replace(OURS, config=CONFIG | {"quantization_config": None}),
    ],
)
def test_engines_that_compute_the_same_numbers_share(same):
    assert key(same) == key()


@pytest.mark.parametrize(
    "layout",
    [
        PLAIN,
        PagedCache(2, 2, 32, 8, "float32").block_layout(64),
        PagedCache(2, 1, 64, 8, "float32", "vec16", 2).block_layout(64),
    ],
    ids=["plain", "pages", "ranks"],
)
def test_how_an_engine_keeps_its_numbers_is_not_in_the_namespace(layout):
    assert key(layout=layout) == key()


SEPARATE = {
    "model": replace(OURS, model="other"),
    "weights": replace(OURS, weights="other"),
    "dtype": replace(OURS, dtype="bfloat16"),
    "config": replace(OURS, config=CONFIG | {"rms_norm_eps": 1e-5}),
    "theta": replace(OURS, config=rope(rope_type="default", rope_theta=5.0)),
    "rope": replace(OURS, config=rope(rope_type="linear", factor=2.0)),
    "quantised": replace(OURS, config=CONFIG | {"quantization_config": {"bits": 4}}),
    "kv dtype": replace(OURS, kv_dtype="fp8_e5m2"),
    "another engine's kv dtype": replace(OURS, kv_dtype="fp8_e5m2", engine="sglang"),
    "setting": replace(OURS, own={"quantization": "fp8"}),
    "another engine's setting": replace(OURS, own={"quantization": "fp8"}, engine="sglang"),
    "seed": replace(OURS, own={"load_format": "dummy", "seed": 1}),
    "another seed": replace(OURS, own={"load_format": "dummy", "seed": 2}),
    "long rope": replace(OURS, config=rope(rope_type="longrope"), tokens_max=512),
    "longer rope": replace(OURS, config=rope(rope_type="longrope"), tokens_max=1024),
    "nested rope": replace(
        OURS, config=CONFIG | {"text_config": {"rope_scaling": {"type": "dynamic"}}}, tokens_max=512
    ),
    "longer nested rope": replace(
        OURS, config=CONFIG | {"text_config": {"rope_scaling": {"type": "dynamic"}}}, tokens_max=513
    ),
}
LAYOUTS = {
    "layers": PagedCache(3, 2, 16, 8, "float32", "vec").block_layout(64),
    "heads": PagedCache(2, 4, 16, 8, "float32", "vec").block_layout(64),
    "channels": PagedCache(2, 2, 16, 16, "float32", "vec").block_layout(64),
    "block tokens": PagedCache(2, 2, 16, 8, "float32", "vec").block_layout(128),
    "element type": PagedCache(2, 2, 16, 8, "float16", "vec").block_layout(64),
    "unknown packing": PagedCache(2, 2, 16, 8, "float32", "amx").block_layout(64),
    "another unknown packing": PagedCache(2, 2, 16, 8, "float32", "neon").block_layout(64),
}


def test_whatever_may_change_a_number_separates():
    keys = {"ours": key()}
    keys |= {name: key(identity) for name, identity in SEPARATE.items()}
    keys |= {name: key(layout=layout) for name, layout in LAYOUTS.items()}
    assert len(set(keys.values())) == len(keys), "each is a namespace of its own"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CONFIG, []),
        (CONFIG | {"sliding_window": None, "rope_scaling": None}, []),
        (CONFIG | {"model_type": "mistral", "sliding_window": 4096}, ["sliding_window"]),
        (CONFIG | {"model_type": "gemma2"}, ["model_type gemma2"]),
        ({"hidden_size": 64}, ["model_type None"]),
        (CONFIG | {"text_config": {"attn_logit_softcapping": 50.0}}, ["attn_logit_softcapping"]),
        (rope(rope_type="yarn", attention_factor=1.0), ["rope attention_factor"]),
        (rope(rope_type="yarn", factor=4.0), []),
        (rope(full={"partial_rotary_factor": 0.5}), ["rope partial_rotary_factor"]),
    ],
)
def test_what_engines_obey_in_their_own_ways_is_shared_with_their_like_only(config, words):
    assert list(disputed(config)) == words
    ours = replace(OURS, config=config)
    assert (key(ours) == key(replace(ours, engine="sglang"))) == (not words)
    assert key(ours) == key(replace(ours))


def test_names_of_models(tmp_path):
    folder = tmp_path / "llama"
    folder.mkdir()
    assert model_name(str(folder), given="", revision="") == "llama", "its files are in the key"
    assert model_name(f"{folder}/", given="", revision="r1") == str(folder), "they are not"
    assert model_name(str(folder), given="x", revision="r1") == "x"
    assert model_name("owner/model", given="", revision="r1") == "owner/model"
