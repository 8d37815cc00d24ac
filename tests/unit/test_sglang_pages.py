"""What SGLang hands over: keys, host pools, indices, settings. No SGLang is needed."""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest

from kvstrata.connectors.sglang.hostpages import HostPages, PoolGeometry, page_numbers
from kvstrata.connectors.sglang.identity import NUMERIC_ARGUMENTS, sglang_namespace
from kvstrata.connectors.sglang.keys import page_digests
from kvstrata.connectors.sglang.settings import read_settings
from kvstrata.core.errors import ConfigError, LayoutError
from kvstrata.layout import Shard
from kvstrata.tokens import lineage_digests

LAYERS, PAGES, TOKENS, HEADS, CHANNELS = 3, 5, 4, 2, 8
ORDERS = ("layer_first", "page_first", "page_first_direct")


def geometry(order, heads=HEADS):
    return PoolGeometry(order, LAYERS, PAGES, TOKENS, heads, CHANNELS, "float32")


def pool_of(order, heads=HEADS):
    """Return a host pool whose elements all differ, as SGLang shapes it."""
    shape = geometry(order, heads).shape
    buffer = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    pages = HostPages(geometry(order, heads), buffer.reshape(-1).view(np.uint8), 4)
    return buffer, pages


def page_of(buffer, order, page, heads=HEADS):
    """Return one page as SGLang itself slices it."""
    lead = (slice(None),) if heads else ()
    if order == "layer_first":
        return buffer[(*lead, slice(None), slice(page * TOKENS, (page + 1) * TOKENS))]
    if order == "page_first":
        return buffer[(*lead, slice(page * TOKENS, (page + 1) * TOKENS))]
    return buffer[(*lead, slice(page, page + 1))]


@pytest.mark.parametrize("heads", [HEADS, None])
@pytest.mark.parametrize("order", ORDERS)
def test_a_page_is_read_as_sglang_slices_it_and_written_back_alone(order, heads):
    buffer, pages = pool_of(order, heads)
    before = buffer.copy()
    block = np.empty(geometry(order, heads).block_layout(Shard()).block_bytes, np.uint8)
    pages.read(2, block)
    assert block.tobytes() == page_of(before, order, 2, heads).tobytes()
    pages.write(4, block)
    assert page_of(buffer, order, 4, heads).tobytes() == block.tobytes()
    others = [page for page in range(PAGES) if page != 4]
    for page in others:
        assert (page_of(buffer, order, page, heads) == page_of(before, order, page, heads)).all()


def test_two_orders_give_the_same_block_and_the_third_another_layout():
    layouts = {order: geometry(order).block_layout(Shard()) for order in ORDERS}
    assert layouts["layer_first"] == layouts["page_first_direct"] != layouts["page_first"]
    one, other = pool_of("layer_first")[0], pool_of("page_first_direct")[0]
    other[...] = np.swapaxes(one.reshape(2, LAYERS, PAGES, TOKENS, HEADS, CHANNELS), 1, 2)
    blocks = [
        page_of(one, "layer_first", 1).tobytes(),
        page_of(other, "page_first_direct", 1).tobytes(),
    ]
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize("order", ["page_head", "page_unified", "page_first_kv_split", ""])
def test_an_unknown_order_is_refused_with_the_remedy(order):
    with pytest.raises(LayoutError, match=r"unknown to kvstrata \(hint: use layer_first"):
        geometry(order).block_layout(Shard())


def test_a_pool_of_another_length_is_refused():
    with pytest.raises(LayoutError, match="bytes, not"):
        HostPages(geometry("page_first"), np.zeros(64, np.uint8), 4)


def test_token_indices_become_pages():
    assert page_numbers(np.arange(8, 16), 4, 5) == [2, 3]
    assert page_numbers([16, 17, 18, 19, 0, 1, 2, 3], 4, 5) == [4, 0]
    assert page_numbers([], 4, 5) == []


@pytest.mark.parametrize(
    "indices",
    [[0, 1, 2], [1, 2, 3, 4], [0, 1, 3, 2], [20, 21, 22, 23], [-4, -3, -2, -1], [0, 0, 0, 0]],
)
def test_indices_that_are_no_whole_pages_of_the_pool_are_refused(indices):
    with pytest.raises(LayoutError):
        page_numbers(indices, 4, 5)


def test_sglangs_keys_are_our_lineage_digests():
    tokens, keys, last = list(range(100, 164)), [], b""
    for page in np.reshape(tokens, (-1, 16)).tolist():
        last = hashlib.sha256(last + struct.pack("<16I", *page)).digest()
        keys.append(last.hex())
    assert page_digests(keys) == lineage_digests(tokens, 16)


@pytest.mark.parametrize("odd", ["", "ab", "g" * 64, "A" * 64, "a" * 63, "a" * 64 + "_k", None, 7])
def test_a_key_that_is_no_digest_ends_the_chain(odd):
    good = ["1" * 64, "2" * 64]
    assert len(page_digests([*good, odd, "3" * 64])) == 2


def test_a_key_that_comes_twice_ends_the_chain():
    assert len(page_digests(["1" * 64, "2" * 64, "1" * 64])) == 2


# -- settings ----------------------------------------------------------------------------------


def test_sglangs_own_keys_are_left_alone():
    config = {"backend_name": "k", "module_path": "m", "class_name": "c", "interface_v1": 1}
    assert read_settings(config | {"tenant": "chat"}).tenant == "chat"
    assert read_settings(None).address == ""


@pytest.mark.parametrize(
    "wrong", [{"adress": "x"}, {"batch_timeout_s": 0}, {"call_timeout_s": "1"}, {"tiers": 5}]
)
def test_a_wrong_setting_is_refused_and_the_known_ones_are_named(wrong):
    with pytest.raises(ConfigError, match=r"extra-config.*known keys are address"):
        read_settings(wrong)


def test_each_rank_has_its_own_daemon():
    rank = Shard(tensor_rank=1, tensor_size=2)
    settings = read_settings({"address": "ipc:///run/kv-{tp_rank}.sock"})
    assert settings.where(rank, replicated=False) == "ipc:///run/kv-1.sock"
    private = read_settings({"tiers": "host:1MiB,disk:/kv/{tp_rank}:1MiB"})
    assert private.where(rank, replicated=False).tiers[1].directory == "/kv/1"
    host_only = read_settings({"tiers": "host:1MiB"})
    assert host_only.where(rank, replicated=False).tiers[0].directory is None


@pytest.mark.parametrize(
    ("given", "replicated", "said"),
    [
        ({"address": "ipc:///run/kv.sock"}, False, "different shards cannot share one daemon"),
        ({"tiers": "host:1MiB,disk:/kv:1MiB"}, False, "two daemons cannot use one disk directory"),
        ({"tiers": "host:1MiB"}, True, "private daemons would stay empty"),
        ({"address": "ipc:///run/kv.sock"}, True, "different shards cannot share one daemon"),
    ],
)
def test_ranks_that_would_be_in_each_others_way_are_refused(given, replicated, said):
    with pytest.raises(ConfigError, match=said):
        read_settings(given).where(Shard(0, 2, 0, 2), replicated=replicated)


def test_replicated_ranks_share_a_daemon():
    settings = read_settings({"address": "ipc:///run/kv.sock"})
    assert settings.where(Shard(), replicated=True) == "ipc:///run/kv.sock"


# -- identity ----------------------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text(json.dumps({"rope_theta": 10000}))
    known = dict.fromkeys(NUMERIC_ARGUMENTS, "auto")
    rest = {"model_path": str(tmp_path), "revision": None, "served_model_name": "m"}
    known |= {"kt_weight_path": None, "quantization_param_path": None, "kt_method": "AMXINT4"}
    known |= {"attention_backend": "torch_native", "trust_remote_code": False}
    return known | rest | {"random_seed": 7}


CONFIG = {"model_type": "llama", "rope_theta": 10000, "rope_parameters": {"rope_type": "default"}}
LONG = {"rope_theta": 10000, "rope_parameters": {"rope_type": "longrope"}}


def key_of(  # noqa: PLR0913, PLR0917  # what may be equal or not
    arguments, order="page_first_direct", shard=Shard(), dtype="float32",  # noqa: B008
    config=CONFIG, revision="", name="", first_layer=None,
):  # fmt: skip
    layout = PoolGeometry(order, LAYERS, PAGES, TOKENS, HEADS, CHANNELS, dtype).block_layout(shard)
    space = sglang_namespace(
        arguments, layout, config, revision=revision, name=name, first_layer=first_layer
    )
    return space.model_key(b"s" * 32)


@pytest.mark.parametrize("name", sorted({*NUMERIC_ARGUMENTS} - {"context_length", "dtype"}))
def test_an_argument_that_changes_the_numbers_makes_another_namespace(arguments, name):
    assert key_of(arguments | {name: "other"}) != key_of(arguments)


def test_what_changes_no_number_does_not(arguments):
    for name, value in (("context_length", 99), ("served_model_name", "other"), ("dtype", "x")):
        assert key_of(arguments | {name: value}) == key_of(arguments), name
    long = key_of(arguments, config=LONG)
    assert key_of(arguments | {"context_length": 99}, config=LONG) != long, "its rope depends on it"
    kept = arguments | {"kv_cache_dtype": "fp8_e5m2"}  # the pool does not tell the model's type
    assert key_of(kept | {"dtype": "x"}) != key_of(kept)


def test_what_changes_numbers_in_some_engines_only(arguments, tmp_path):
    assert key_of(arguments | {"kt_method": "x"}) == key_of(arguments), "no experts are elsewhere"
    elsewhere = arguments | {"kt_weight_path": "/experts"}
    assert key_of(elsewhere | {"kt_method": "x"}) != key_of(elsewhere)
    other = arguments | {"attention_backend": "intel_amx"}
    assert key_of(other) == key_of(arguments), "one function, up to rounding"
    gemma = CONFIG | {"model_type": "gemma2", "attn_logit_softcapping": 50.0}
    assert key_of(other, config=gemma) != key_of(arguments, config=gemma)
    remote = arguments | {"trust_remote_code": True}
    assert key_of(remote) == key_of(arguments)
    coded = CONFIG | {"auto_map": {"AutoModelForCausalLM": "model.Mine"}}
    assert key_of(remote, config=coded) != key_of(arguments, config=coded)
    scales = tmp_path / "scales.json"
    scales.write_text("1")
    scaled = arguments | {"quantization_param_path": str(scales)}
    first = key_of(scaled)
    scales.write_text("2")
    assert key_of(scaled) != first, "the same path, other scales"
    shard = Shard(pipeline_rank=1, pipeline_size=3)
    keys = {key_of(arguments, shard=shard, first_layer=layer) for layer in (2, 3)}
    assert len(keys) == 2, "an operator may choose which layers a rank has"


def test_what_the_pages_are_makes_another_namespace(arguments, tmp_path):
    first = key_of(arguments)
    keys = {
        first,
        key_of(arguments, shard=Shard(0, 2)),
        key_of(arguments, shard=Shard(1, 2)),
        key_of(arguments, dtype="bfloat16"),
    }
    assert len(keys) == 4
    for order in ("layer_first", "page_first"):  # a daemon holds one, the others are bridged
        assert key_of(arguments, order) == first
    other = CONFIG | {"rope_theta": 500000}
    assert key_of(arguments, config=other) not in keys
    # What transformers cannot tell is read from the file, and never shared with what it can.
    file = key_of(arguments, config=None)
    (tmp_path / "config.json").write_text(json.dumps({"rope_theta": 500000}))
    assert len({*keys, file, key_of(arguments, config=None)}) == 6
    (tmp_path / "model.safetensors").write_bytes(b"other w")
    assert key_of(arguments) not in keys


def test_a_seed_matters_only_to_dummy_weights(arguments):
    assert key_of(arguments | {"random_seed": 8}) == key_of(arguments)
    dummy = arguments | {"load_format": "dummy"}
    assert key_of(dummy | {"random_seed": 8}) != key_of(dummy)


def test_a_hub_model_is_named_by_its_commit_or_refused(arguments):
    hub = arguments | {"model_path": "some/model"}
    assert key_of(hub | {"revision": "a" * 40}) != key_of(hub | {"revision": "b" * 40})
    for moving in (None, "main", "v1.0"):
        with pytest.raises(ConfigError, match=r"cannot tell.*--revision"):
            key_of(hub | {"revision": moving})


def test_a_directory_without_weights_is_refused(arguments, tmp_path):
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no weight files"):
        key_of(arguments)
