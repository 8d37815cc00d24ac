"""The storage class on SGLang's own host pools, with a daemon and no engine."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest

from kvstrata.core.errors import ConfigError, DaemonError, LayoutError

PAGE_TOKENS = 16
LAYERS, HEADS, CHANNELS, TOKENS = 3, 2, 32, 256


def keys_of(seed, count):
    keys = [hashlib.sha256(f"{seed}".encode()).hexdigest()]
    while len(keys) < count:
        keys.append(hashlib.sha256(keys[-1].encode()).hexdigest())
    return keys


def make_pool(kind="heads", order="page_first_direct", dtype="float32"):
    """Return one of SGLang's host pools."""
    import torch
    from sglang.srt.mem_cache import memory_pool
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

    common = {
        "size": TOKENS,
        "page_size": PAGE_TOKENS,
        "dtype": getattr(torch, dtype),
        "layer_num": LAYERS,
        "device": "cpu",
        "enable_memory_saver": False,
    }
    host = {
        "device_capacity_tokens": TOKENS,
        "start_layer": 0,
        "end_layer": LAYERS,
        "pin_memory": False,
    }
    if kind == "latent":
        device = memory_pool.MLATokenToKVPool(kv_lora_rank=48, qk_rope_head_dim=16, **common)
        info = device._mla_buffer_info()
        return MLATokenToKVPoolHost(
            info, 2.0, 0, PAGE_TOKENS, order, target_layer_num=LAYERS, **host
        )
    device = memory_pool.MHATokenToKVPool(head_num=HEADS, head_dim=CHANNELS, **common)
    return MHATokenToKVPoolHost(device._mha_buffer_info(), 2.0, 0, PAGE_TOKENS, order, **host)


def fill(pool, seed=1):
    """Give every element of a pool a value of its own."""
    import torch

    luck = torch.Generator().manual_seed(seed)
    flat = pool.kv_buffer.view(-1).view(torch.uint8)
    flat.copy_(torch.randint(0, 255, flat.shape, generator=luck, dtype=torch.uint8))


def pages_of(pool, indices):
    """Return the bytes of pages as SGLang itself reads them."""
    import torch

    first = indices[::PAGE_TOKENS].tolist()
    return [bytes(pool.get_data_page(index).view(torch.uint8).numpy()) for index in first]


@pytest.fixture
def attach(sglang_arguments, daemon, storage_config):
    """Attach a storage to a pool; all are closed with the test."""
    from kvstrata.connectors.sglang.storage import KvstrataStorage

    assert sglang_arguments
    opened = []

    def make(pool, extra=None, **changes):
        settings = {"address": daemon.address} if extra is None else extra
        storage = KvstrataStorage(storage_config(settings, **changes), {})
        opened.append(storage)
        storage.register_mem_pool_host(pool)
        storage.register_mem_host_pool_v2(pool, "kv")
        storage.on_host_pools_registered()
        return storage

    yield make
    for storage in opened:
        storage.close()


def test_tenants_share_nothing(attach, daemon):
    pool = make_pool()
    fill(pool)
    keys, indices = keys_of(6, 3), pool.alloc(3 * PAGE_TOKENS)
    one, other, nobody = (
        attach(pool, {"address": daemon.address, "tenant": name}) for name in ("a", "b", "")
    )
    assert one.batch_set_v1(keys, indices) == [True] * 3
    assert [each.batch_exists(keys) for each in (one, other, nobody)] == [3, 0, 0]
    assert other.batch_set_v1(keys, indices) == [True] * 3
    assert [each.batch_exists(keys) for each in (one, other, nobody)] == [3, 3, 0]


KINDS = [
    ("heads", order, dtype)
    for order in ("layer_first", "page_first", "page_first_direct")
    for dtype in ("float32", "bfloat16", "float8_e5m2")
] + [("latent", order, "bfloat16") for order in ("layer_first", "page_first", "page_first_direct")]


@pytest.mark.parametrize(("kind", "order", "dtype"), KINDS)
def test_every_known_pool_gets_its_bytes_back(attach, kind, order, dtype):
    pool = make_pool(kind, order, dtype)
    fill(pool)
    storage = attach(pool, is_mla_model=kind == "latent")
    keys, indices = keys_of(1, 6), pool.alloc(6 * PAGE_TOKENS)
    before = pages_of(pool, indices)
    everything = pool.kv_buffer.clone()
    assert storage.batch_set_v1(keys, indices) == [True] * 6
    assert storage.batch_exists([*keys, *keys_of(2, 2)]) == 6
    pool.free(indices)
    other = pool.alloc(6 * PAGE_TOKENS)
    assert storage.batch_get_v1(keys, other) == [True] * 6
    assert pages_of(pool, other) == before
    # Nothing else of the pool was touched.
    fresh = make_pool(kind, order, dtype)
    fresh.kv_buffer.copy_(everything)
    for index, page in zip(other[::PAGE_TOKENS].tolist(), before, strict=True):
        import torch

        flat = torch.frombuffer(bytearray(page), dtype=pool.kv_buffer.dtype)
        fresh.set_from_flat_data_page(index, flat)
    as_bytes = [each.kv_buffer.view(-1).view(torch.uint8) for each in (fresh, pool)]
    assert torch.equal(*as_bytes)


def test_the_generic_calls_give_the_same_pages(attach):
    pool = make_pool()
    fill(pool)
    storage = attach(pool)
    keys, indices = keys_of(1, 3), pool.alloc(3 * PAGE_TOKENS)
    values = [pool.get_data_page(index) for index in indices[::PAGE_TOKENS].tolist()]
    assert storage.batch_set(keys[:2], values[:2])
    assert storage.set(keys[2], values[2])
    assert storage.exists(keys[2])
    assert not storage.exists(keys_of(9, 1)[0])
    targets = [pool.get_dummy_flat_data_page() for _ in range(4)]
    found = storage.batch_get([*keys, keys_of(9, 1)[0]], targets)
    assert found[3] is None
    assert [bytes(page.numpy()) for page in found[:3]] == [bytes(page.numpy()) for page in values]
    assert storage.get(keys_of(9, 1)[0], targets[0]) is None
    assert storage.batch_get(keys, None) == [None] * 3
    assert storage.batch_get(keys, [page[1:] for page in targets[:3]]) == [None] * 3
    assert not storage.batch_set(keys, [page[1:] for page in values])


def test_the_second_interface_serves_the_kv_pool_and_no_other(attach):
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

    pool = make_pool()
    fill(pool)
    storage = attach(pool)
    keys, indices = keys_of(1, 4), pool.alloc(4 * PAGE_TOKENS)
    before = pages_of(pool, indices)
    kv = PoolTransfer(name=PoolName.KV, keys=keys, host_indices=indices)
    other = PoolTransfer(name=PoolName.MAMBA, keys=keys[-1:], host_indices=indices[:1])
    assert storage.batch_set_v2([kv, other]) == {PoolName.KV: [True] * 4, PoolName.MAMBA: [False]}
    assert storage.batch_exists_v2(keys).kv_hit_pages == 4
    assert storage.batch_exists_v2(keys, [other]).kv_hit_pages == 0
    pool.kv_buffer.zero_()
    assert storage.batch_get_v2([kv, other]) == {PoolName.KV: [True] * 4, PoolName.MAMBA: [False]}
    assert pages_of(pool, indices) == before


def test_ranks_find_only_their_own_shard(attach, daemon):
    pool = make_pool()
    ranks = [
        attach(pool, {"tiers": "host:4MiB"}, tp_rank=rank, tp_size=2)._kept._turns.session
        for rank in range(2)
    ]
    assert ranks[0].namespace != ranks[1].namespace
    assert ranks[0].layout != ranks[1].layout
    with pytest.raises(ConfigError, match="cannot share one daemon"):
        attach(pool, {"address": daemon.address}, tp_size=2)


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({"dtype": "bfloat16"}, {}),
        ({"kv_cache_dtype": "fp8_e5m2_other"}, {}),
        ({"quantization": "awq"}, {}),
        ({"json_model_override_args": '{"rms_norm_eps": 1e-3}'}, {}),
        ({}, {"weights_revision": "two"}),
        ({}, {"model_name": "another"}),
    ],
    ids=["type", "kept-type", "quantised", "overrides", "revision", "model"],
)
def test_what_differs_never_hits(attach, sglang_arguments, daemon, arguments, settings):
    """The pages have the same bytes in the same places; only what they mean is another."""
    vars(sglang_arguments).update(dtype="float16", kv_cache_dtype="fp8_e5m2")
    pool = make_pool(dtype="float8_e5m2")
    fill(pool)
    first = attach(pool)
    keys, indices = keys_of(1, 4), pool.alloc(4 * PAGE_TOKENS)
    assert first.batch_set_v1(keys, indices) == [True] * 4
    assert first.batch_exists(keys) == 4
    assert attach(pool).batch_exists(keys) == 4, "the same engine started again"
    vars(sglang_arguments).update(arguments)
    other = attach(pool, {"address": daemon.address} | settings)
    assert other.batch_exists(keys) == 0
    assert other.batch_set_v1(keys, indices) == [True] * 4
    assert other.batch_exists(keys) == 4, "it has pages of its own now"


def test_a_pool_of_another_type_is_refused_by_a_daemon_of_the_first(attach, daemon):
    attach(make_pool())
    with pytest.raises(ConfigError, match="layout"):
        attach(make_pool(dtype="bfloat16"), {"address": daemon.address})


def test_of_replicated_ranks_one_writes_and_all_read(attach):
    pool = make_pool("latent")
    fill(pool)
    first = attach(pool, is_mla_model=True, tp_rank=0, tp_size=2)
    second = attach(pool, is_mla_model=True, tp_rank=1, tp_size=2)
    keys, indices = keys_of(1, 2), pool.alloc(2 * PAGE_TOKENS)
    assert second.batch_set_v1(keys, indices) == [True] * 2
    assert first.batch_exists(keys) == 0
    first.batch_set_v1(keys, indices)
    assert second.batch_exists(keys) == 2
    with pytest.raises(ConfigError, match="private daemons would stay empty"):
        attach(pool, {}, is_mla_model=True, tp_size=2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"enable_lora": True}, "LoRA"),
        ({"lora_paths": ["x"]}, "LoRA"),
        ({"speculative_algorithm": "EAGLE"}, "speculative decoding"),
    ],
)
def test_engines_that_we_do_not_serve_are_refused(attach, sglang_arguments, changes, said):
    vars(sglang_arguments).update(changes)
    with pytest.raises(LayoutError, match=said):
        attach(make_pool())


def test_an_argument_that_is_gone_is_noticed(attach, sglang_arguments):
    del sglang_arguments.kv_cache_dtype
    with pytest.raises(LayoutError, match="no server argument 'kv_cache_dtype'"):
        attach(make_pool())


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_cp_size": 2},
        {"should_split_heads": True},
        {"tp_lcm_size": 4},
    ],
)
def test_splits_that_we_do_not_know_are_refused(attach, changes):
    with pytest.raises(LayoutError, match="hint"):
        attach(make_pool(), **changes)


def test_pools_that_we_do_not_know_are_refused(attach):
    with pytest.raises(LayoutError, match="'page_head' is unknown to kvstrata"):
        attach(make_pool(order="page_head"))
    pool = make_pool()
    pool.storage_format_tag = "mxfp8"
    with pytest.raises(LayoutError, match="storage_format_tag"):
        attach(pool)
    pool = make_pool()
    pool.kv_buffer = pool.kv_buffer.transpose(0, 1)
    with pytest.raises(LayoutError, match="not contiguous"):
        attach(pool)
    pool = make_pool()
    pool.__class__ = type("Subclass", (type(pool),), {})
    with pytest.raises(LayoutError, match="'class': 'Subclass'"):
        attach(pool)
    storage = attach(make_pool())
    with pytest.raises(LayoutError, match="keeps a mamba pool beside its KV"):
        storage.register_mem_host_pool_v2(make_pool(), "mamba")
    assert storage.daemon_pid == 0, "what was refused is detached"
    assert storage.batch_exists(keys_of(1, 2)) == 0


def test_another_version_is_refused(attach, monkeypatch):
    import sglang

    monkeypatch.setattr(sglang, "__version__", "0.5.24")
    with pytest.raises(LayoutError, match=r"SGLang 0\.5\.24 is not a version.*tested are 0\.5\.23"):
        attach(make_pool())


def test_indices_that_are_no_pages_are_refused_and_nothing_is_written(attach):
    pool = make_pool()
    fill(pool)
    storage = attach(pool)
    keys, indices = keys_of(1, 2), pool.alloc(2 * PAGE_TOKENS)
    for odd in (indices[1:], indices[:-1], indices + 1, indices + 10 * TOKENS, None):
        assert storage.batch_set_v1(keys, odd) == [False] * 2
        assert storage.batch_get_v1(keys, odd) == [False] * 2
    assert storage.batch_set_v1(keys[:1], indices) == [False]
    assert storage.batch_exists(keys) == 0


def test_statistics_cost_nothing_and_tell_each_transfer_once(attach):
    pool = make_pool()
    storage = attach(pool)
    keys, indices = keys_of(1, 4), pool.alloc(4 * PAGE_TOKENS)
    storage.get_stats()  # the canary's
    storage.batch_set_v1(keys, indices)
    storage.batch_get_v1(keys, indices)
    stats = storage.get_stats()
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([4], [4])
    assert stats.backup_bandwidth[0] > 0
    assert storage.get_stats().backup_pgs == []
    began = time.perf_counter()
    for _ in range(10_000):
        storage.get_stats()
    assert time.perf_counter() - began < 1.0, "SGLang's scheduler asks in every turn"
    quiet = attach(pool, enable_storage_metrics=False)
    assert quiet.get_stats() is None


def test_clear_forgets_and_says_if_it_must_wait(attach, daemon):
    pool = make_pool()
    storage = attach(pool)
    keys, indices = keys_of(1, 4), pool.alloc(4 * PAGE_TOKENS)
    storage.batch_set_v1(keys, indices)
    assert storage.batch_exists(keys) == 4
    storage.clear()
    assert storage.batch_exists(keys) == 0
    daemon.signal(9)
    with pytest.raises(DaemonError, match="once it is back"):
        storage.clear()


def test_a_full_host_pool_is_no_reason_to_refuse(attach, caplog):
    pool = make_pool()
    pool.alloc(pool.available_size())
    storage = attach(pool)
    assert "host pool is full" in caplog.text
    assert storage.batch_exists(keys_of(1, 1)) == 0


def test_the_canary_leaves_no_page_and_no_host_memory_behind(attach, daemon):
    pool = make_pool()
    free = pool.available_size()
    attach(pool)
    assert pool.available_size() == free
    host = daemon.statistics()["tiers"]["host"]
    assert host["idle"] + host["in_use"] == 0


def test_a_model_that_takes_images_is_refused(attach, sglang_arguments, tmp_path):
    import transformers

    folder = tmp_path / "sees"
    transformers.Qwen2VLConfig(architectures=["Qwen2VLForConditionalGeneration"]).save_pretrained(
        folder
    )
    sglang_arguments.model_path = str(folder)
    with pytest.raises(LayoutError, match="images or audio"):
        attach(make_pool())


class TestNewWeights:
    @pytest.fixture(autouse=True)
    def _count(self, monkeypatch):
        from kvstrata.connectors.sglang import weights

        monkeypatch.setattr(weights._Seen, "count", 0)
        monkeypatch.setattr(weights._Seen, "from_start", True)
        self.seen = weights._Seen

    def test_nothing_is_served_or_saved_once_an_update_was_begun(self, attach):
        pool = make_pool()
        storage = attach(pool)
        keys, indices = keys_of(1, 2), pool.alloc(2 * PAGE_TOKENS)
        assert storage.batch_set_v1(keys, indices) == [True, True]
        assert storage.batch_exists(keys) == 2
        self.seen.count += 1
        assert storage.batch_exists(keys) == 0
        assert storage.batch_get_v1(keys, indices) == [False, False]
        assert storage.batch_get(keys, pages_as_tensors(pool, 2)) == [None, None]
        assert storage.batch_set_v1(keys_of(2, 2), indices) == [False, False]

    def test_the_files_name_them_no_more(self, attach, daemon):
        self.seen.count += 1
        with pytest.raises(LayoutError, match="were updated since it started"):
            attach(make_pool())
        storage = attach(make_pool(), {"address": daemon.address, "weights_revision": "two"})
        assert storage.batch_exists(keys_of(1, 2)) == 0

    def test_a_name_of_other_weights_is_refused(self, attach, daemon):
        named = {"address": daemon.address, "weights_revision": "one"}
        attach(make_pool(), named)
        attach(make_pool(), named)
        self.seen.count += 1
        with pytest.raises(LayoutError, match="'one' has named other weights"):
            attach(make_pool(), named)

    def test_files_that_were_overwritten_name_nothing(self, attach, sglang_arguments, monkeypatch):
        newest = max(p.stat().st_ctime for p in Path(sglang_arguments.model_path).iterdir())
        monkeypatch.setattr(self.seen, "began", newest + 1)
        attach(make_pool())
        monkeypatch.setattr(self.seen, "began", newest - 3600)
        with pytest.raises(LayoutError, match="has changed since the engine started"):
            attach(make_pool())

    def test_who_may_have_missed_an_update_asks_for_a_name(self, attach):
        self.seen.from_start = False
        with pytest.raises(LayoutError, match=r"may have been.*SGLANG_PLUGINS"):
            attach(make_pool())


def pages_as_tensors(pool, count):
    """Return flat tensors of a page each, as SGLang's generic calls give them."""
    return [pool.get_dummy_flat_data_page() for _ in range(count)]
