"""Same answers with and without the cache, whatever happens to the cache in between."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

pytestmark = pytest.mark.transformers

BLOCK = 16
PROMPTS = 30


def conversations(tiny) -> list:
    """Prompts of many lengths around block ends, a third of them behind each of three heads."""
    import torch

    heads = [tiny.ids(40 + 16 * n, seed=n) for n in range(3)]
    return [
        torch.cat([heads[n % 3], tiny.ids(1 + 7 * n % 50, seed=100 + n)], dim=1)
        for n in range(PROMPTS)
    ]


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_dozens_of_prompts(tiny, kind, make_cache, tmp_path):
    import torch

    model = tiny.model(kind)
    prompts = conversations(tiny)
    cold = [tiny.answer(model, ids) for ids in prompts]
    settings = {"tiers": f"host:16MiB,disk:{tmp_path}/kv:64MiB"}
    cache = make_cache(model, **settings)
    for ids, expected in zip(prompts, cold, strict=True):
        assert torch.equal(tiny.answer(cache, ids), expected)
    first = cache.statistics.loaded_tokens
    assert first > 0, "the heads are shared"
    for ids, expected in zip(prompts, cold, strict=True):
        assert torch.equal(tiny.answer(cache, ids), expected)
    tokens = sum((ids.shape[1] - 1) // BLOCK * BLOCK for ids in prompts)
    assert cache.statistics.loaded_tokens - first == tokens
    wait_idle(cache)
    cache.close()
    late = make_cache(model, **settings)  # another daemon: all it knows is on disk
    for ids, expected in zip(prompts, cold, strict=True):
        assert torch.equal(tiny.answer(late, ids), expected)
    assert late.statistics.loaded_tokens == tokens
    assert daemon_counters(late)["hit_blocks_staged"] > 0
    assert not late.statistics.failed_calls


def test_logits_are_those_of_a_prefill_in_two_parts(tiny, llama, make_cache):
    """To the bit, if the prefix was computed in the same part; else within rounding."""
    import torch
    from transformers import DynamicCache

    ids = tiny.ids(75)
    cache = make_cache(llama)
    with torch.no_grad():
        split = DynamicCache(config=llama.config)
        llama(ids[:, :64], past_key_values=split)
        expected = llama(ids[:, 64:], past_key_values=split).logits
        llama(ids[:, :64], past_key_values=cache.begin(ids[:, :64]))
        assert cache.keep() == 4
        got = llama(ids[:, 64:], past_key_values=cache.begin(ids)).logits
        whole = llama(ids).logits[:, 64:]
    assert cache.statistics.loaded_tokens == 64
    assert torch.equal(got, expected)
    assert float((got - whole).abs().max()) <= 1e-5 * float(whole.abs().max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_loaded_kv_is_the_stored_kv_to_the_bit(tiny, dtype, make_cache):
    import torch

    model = tiny.model(dtype=dtype)
    cache = make_cache(model)
    ids = tiny.ids(70, rows=2)
    past = cache.begin(ids)
    tiny.answer(model, ids, 10, past_key_values=past)
    stored = [(layer.keys.clone(), layer.values.clone()) for layer in past.layers]
    assert cache.keep() == 2 * (79 // BLOCK)
    longer = torch.cat([ids, tiny.ids(30, seed=1, rows=2)], dim=1)
    loaded = [(layer.keys, layer.values) for layer in cache.begin(longer).layers]
    for pair, before in zip(loaded, stored, strict=True):
        for ours, theirs in zip(pair, before, strict=True):
            assert ours.shape[2] == 64
            assert torch.equal(ours, theirs[:, :, :64])


def test_the_next_turn_loads_what_was_generated(tiny, llama, make_cache):
    import torch

    cache = make_cache(llama)
    ids, loaded = tiny.ids(20), []
    for turn in range(4):
        before = cache.statistics.loaded_tokens
        said = tiny.answer(cache, ids, 40)
        loaded.append(cache.statistics.loaded_tokens - before)
        assert torch.equal(said, tiny.answer(llama, ids, 40))
        ids = torch.cat([said, tiny.ids(5, seed=turn)], dim=1)
    # 20 + 40 tokens, of which the last was never computed: 59 // 16 blocks; and so on.
    assert loaded == [0, 48, 96, 144]


def test_rows_of_a_batch_share_the_shortest_prefix(tiny, llama, make_cache):
    import torch

    cache = make_cache(llama)
    one, two = tiny.ids(80), tiny.ids(80, seed=1)
    tiny.answer(cache, one)
    tiny.answer(cache, two[:, :40])
    both = torch.cat([one, two])
    before = cache.statistics.loaded_tokens
    assert torch.equal(tiny.answer(cache, both), tiny.answer(llama, both))
    assert cache.statistics.loaded_tokens - before == 2 * 32
    before = cache.statistics.loaded_tokens
    assert torch.equal(tiny.answer(cache, both), tiny.answer(llama, both))
    assert cache.statistics.loaded_tokens - before == 2 * 64


def test_rows_that_end_early_keep_what_was_computed(tiny, make_cache):
    """A row that has ended is filled with pad tokens; its KV is that of those tokens."""
    import torch

    model = tiny.model()
    ids = tiny.ids(30, rows=3)
    free = tiny.answer(model, ids, 40)
    stop = {"eos_token_id": int(free[0, 35]), "pad_token_id": 1}
    expected = tiny.answer(model, ids, 40, **stop)
    assert (expected == 1).any(), "no row ended before the others"
    cache = make_cache(model)
    for _ in range(2):
        assert torch.equal(tiny.answer(cache, ids, 40, **stop), expected)
    continued = torch.cat([free[:1], tiny.ids(5)], dim=1)
    assert torch.equal(tiny.answer(cache, continued), tiny.answer(model, continued))


def test_sampling_with_one_seed(tiny, llama, make_cache):
    import torch

    cache, ids, said = make_cache(llama), tiny.ids(60), []
    for source in (llama, cache, cache):
        torch.manual_seed(5)
        said.append(tiny.answer(source, ids, 20, do_sample=True, temperature=0.7, top_k=20))
    assert torch.equal(said[0], said[1])
    assert torch.equal(said[0], said[2])
    assert cache.statistics.loaded_tokens == 48


def test_eviction_pressure(tiny, llama, make_cache):
    """A host of a dozen blocks for dozens of prompts: some are found, none is wrong."""
    import torch

    cache = make_cache(llama, tiers="host:400KiB")
    prompts = conversations(tiny)
    cold = [tiny.answer(llama, ids) for ids in prompts]
    for _ in range(2):
        for ids, expected in zip(prompts, cold, strict=True):
            assert torch.equal(tiny.answer(cache, ids), expected)
    host = daemon_stats(cache)["node"]["tiers"]["host"]
    assert host["evictions"] > 0
    assert cache.statistics.loaded_tokens > 0
    assert not cache.statistics.failed_calls


def test_a_killed_daemon_costs_time_only(tiny, llama, make_cache, tmp_path):
    import torch

    cache = make_cache(llama, tiers=f"host:16MiB,disk:{tmp_path}/kv:16MiB")
    prompts = conversations(tiny)[:12]
    cold = [tiny.answer(llama, ids) for ids in prompts]
    for ids in prompts:
        tiny.answer(cache, ids)
    wait_idle(cache)
    past = cache.begin(prompts[0])  # loaded, and in use while the daemon dies
    os.kill(cache.binding.prefixes.session.daemon_pid, signal.SIGKILL)
    assert torch.equal(tiny.answer(llama, prompts[0], past_key_values=past), cold[0])
    cache.keep()
    for ids, expected in zip(prompts, cold, strict=True):
        assert torch.equal(tiny.answer(cache, ids), expected)
    assert cache.statistics.failed_calls > 0
    deadline = time.monotonic() + 30
    while not cache.binding.prefixes.session.usable():
        assert time.monotonic() < deadline, "the private daemon did not come back"
        time.sleep(0.05)
    before = cache.statistics.loaded_tokens
    for ids, expected in zip(prompts, cold, strict=True):
        assert torch.equal(tiny.answer(cache, ids), expected)
    assert cache.statistics.loaded_tokens > before, "the disk still has the blocks"


def test_corrupt_blocks_on_disk_are_computed(tiny, llama, make_cache, tmp_path):
    import torch

    settings = {"tiers": f"host:16MiB,disk:{tmp_path}/kv:16MiB"}
    ids = tiny.ids(100)
    expected = tiny.answer(llama, ids)
    cache = make_cache(llama, **settings)
    tiny.answer(cache, ids)
    wait_idle(cache)
    cache.close()
    (slab,) = [each for each in (tmp_path / "kv").iterdir() if each.stat().st_size > 1 << 20]
    data = bytearray(slab.read_bytes())
    kv = cache_bytes(tiny, llama, ids)
    for block in kv:  # each block's bytes occur once; break one bit in each
        at = data.find(block)
        assert at >= 0
        data[at + 100] ^= 1
    slab.write_bytes(data)
    late = make_cache(llama, **settings)
    assert torch.equal(tiny.answer(late, ids), expected)
    assert late.statistics.loaded_tokens == 0
    assert daemon_counters(late)["corrupt_blocks"] > 0


# Left alone while it is stopped, its process is not waited for.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_daemon_that_does_not_answer_is_not_waited_for_long(tiny, llama, make_cache):
    import torch

    from kvstrata.runtime.session import SessionLimits

    limits = SessionLimits(call_timeout_s=0.2, retry_interval_s=60.0)
    cache = make_cache(llama, limits=limits)
    ids = tiny.ids(60)
    expected = tiny.answer(cache, ids)
    pid = cache.binding.prefixes.session.daemon_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        for _ in range(3):
            assert torch.equal(tiny.answer(cache, ids), expected)
        assert time.monotonic() - began < 2.0
    finally:
        with contextlib.suppress(ProcessLookupError):  # given up, it was killed already
            os.kill(pid, signal.SIGKILL)
    assert cache.statistics.failed_calls >= 1


@pytest.mark.parametrize("lost", [0, 2])
def test_a_slot_that_is_given_away_while_it_is_read_is_computed(tiny, llama, make_cache, lost):
    import torch

    cache, ids = make_cache(llama), tiny.ids(60)
    expected = tiny.answer(cache, ids)
    prefixes = cache.binding.prefixes
    plain = prefixes._copy_out

    def overtaken(slots):
        layers = plain(slots)
        prefixes._arena.generations[slots[0][lost]] += 1
        for pair in layers:
            for tensor in pair:  # what its new owner has written so far
                tensor[:, :, lost * BLOCK : lost * BLOCK + 5] = 7.0
        return layers

    prefixes._copy_out = overtaken
    assert cache.begin(ids).get_seq_length() == lost * BLOCK
    assert cache.statistics.lost_blocks == 3 - lost
    assert torch.equal(tiny.answer(cache, ids), expected)


def test_prompts_without_a_full_block(tiny, llama, make_cache):
    import torch

    cache = make_cache(llama)
    for tokens in (1, 2, BLOCK - 1, BLOCK, BLOCK + 1):
        ids = tiny.ids(tokens)
        for _ in range(2):
            assert torch.equal(tiny.answer(cache, ids, 1), tiny.answer(llama, ids, 1))
    assert cache.statistics.loaded_tokens == 2 * BLOCK, "the last token is always computed"
    assert not cache.statistics.failed_calls


def test_blocks_come_back_from_an_object_store(tiny, llama, make_cache, s3_url, tmp_path):
    import torch

    prompts = conversations(tiny)[:8]
    cold = [tiny.answer(llama, ids) for ids in prompts]
    secret = tmp_path / "secret"
    secret.write_bytes(os.urandom(32))
    settings = {"tiers": f"host:16MiB,object:{s3_url}:64MiB", "secret_file": str(secret)}
    cache = make_cache(llama, **settings)
    for ids, expected in zip(prompts, cold, strict=True):
        assert torch.equal(tiny.answer(cache, ids), expected)
    wait_idle(cache)
    cache.close()
    late = make_cache(llama, **settings)  # another daemon: all it knows is in the bucket
    wait_idle(late)
    for ids, expected in zip(prompts, cold, strict=True):
        assert torch.equal(tiny.answer(late, ids), expected)
    assert late.statistics.loaded_tokens == sum((i.shape[1] - 1) // BLOCK * BLOCK for i in prompts)
    assert daemon_stats(late)["node"]["tiers"]["object"]["hit_blocks"] > 0


_OTHER = """
import sys
import torch
from conftest import answer, make_ids, make_model
from kvstrata.connectors.transformers import KvstrataCache

model, address, number = make_model(), sys.argv[1], int(sys.argv[2])
cold = {n: answer(model, make_ids(40 + 9 * n, seed=n % 3)) for n in range(8)}
with KvstrataCache.for_model(model, address=address, block_tokens=16) as cache:
    for turn in range(3):
        for n in sorted(cold, key=lambda n: (n + number) % 8):
            said = answer(cache, make_ids(40 + 9 * n, seed=n % 3))
            assert torch.equal(said, cold[n]), (turn, n)
    assert not cache.statistics.failed_calls, cache.statistics
    print(cache.statistics.loaded_tokens)
"""


def test_two_processes_on_one_daemon(tiny, llama, make_cache):
    cache = make_cache(llama)
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    }
    others = [
        subprocess.Popen(
            [sys.executable, "-c", _OTHER, cache.address, str(number)],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for other in others:
        out, err = other.communicate(timeout=100)
        assert other.returncode == 0, err
        assert int(out) > 0
    before = cache.statistics.loaded_tokens
    tiny.answer(cache, tiny.ids(40, seed=0))
    assert cache.statistics.loaded_tokens - before == 32, "what the others stored is found here"


def cache_bytes(tiny, model, ids) -> list[bytes]:
    """The blocks that a cold prefill of `ids` stores, as bytes."""
    import torch

    from kvstrata.connectors.transformers import KvstrataCache

    with KvstrataCache.for_model(model, block_tokens=BLOCK, tiers="host:8MiB") as cache:
        past = cache.begin(ids)
        tiny.answer(model, ids, past_key_values=past)
        layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in past.layers]
        whole = torch.stack(layers)
        blocks = whole.shape[3] // BLOCK
        return [
            whole[:, :, :, n * BLOCK : (n + 1) * BLOCK].contiguous().numpy().tobytes()
            for n in range(blocks)
        ]


def daemon_stats(cache) -> dict:
    from kvstrata.runtime.admin import AdminClient

    with AdminClient(cache.address) as admin:
        return admin.stats()


def daemon_counters(cache) -> dict:
    return daemon_stats(cache)["node"]["counters"]


def wait_idle(cache) -> None:
    from kvstrata.runtime.admin import wait_until_idle

    wait_until_idle(lambda: daemon_stats(cache), 30.0)


def test_each_release_is_given_its_own_word_for_the_cache(tiny, llama, make_cache):
    import torch

    from kvstrata.connectors.transformers.eligibility import cache_word

    cache, ids = make_cache(llama), tiny.ids(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = tiny.answer(cache, ids)
        past = cache.begin(ids)
        assert torch.equal(tiny.answer(llama, ids, **{cache_word(llama): past}), first)
    assert cache.statistics.loaded_tokens == 48
    assert cache.statistics.unserved == {}
