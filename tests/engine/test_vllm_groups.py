"""Sliding windows and models with several cache groups: the answers of vLLM alone."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from kvstrata.core.errors import LayoutError
from kvstrata.runtime.admin import AdminClient

pytestmark = pytest.mark.engine

LENGTHS = (1, 40, 63, 64, 65, 100, 128, 129, 192, 193, 257, 400)
HITS = [0, 0, 0, 0, 64, 64, 64, 128, 128, 192, 256, 384]
"""All but the last token may be loaded, in blocks of 64."""

_SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False, "initializer_range": 0.2,
}  # fmt: skip


def _gemma3():
    """Three windows to one full attention, in four groups of one layer each."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**_SIZES, sliding_window=64, query_pre_attn_scalar=32, layer_types=kinds)
    )


def _gemma4():
    """As Gemma 3, with wider heads in full attention: vLLM gives its pages fewer tokens."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    return Gemma4ForCausalLM(
        Gemma4TextConfig(
            **_SIZES,
            sliding_window=100,
            layer_types=kinds,
            global_head_dim=64,
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=512,
            num_kv_shared_layers=0,
        )
    )


def _gpt_oss():
    """A window in every other layer, in two groups of two layers each, and sinks."""
    from transformers import GptOssConfig, GptOssForCausalLM

    kinds = ["sliding_attention", "full_attention"] * 2
    return GptOssForCausalLM(
        GptOssConfig(
            **_SIZES,
            sliding_window=64,
            layer_types=kinds,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    )


def _mistral():
    """One group with a window that ends a token behind a page."""
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=97))


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory):
    """`hybrid(make)` writes a model, once."""
    import torch

    written = {}

    def write(make):
        if make not in written:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(make.__name__)
            make().float().save_pretrained(folder)
            written[make] = folder
        return written[make]

    return write


@pytest.fixture(scope="session")
def prompts():
    """Shorter and longer than the windows, ending at, before and behind a block's end."""
    luck = random.Random(0)
    return [[luck.randrange(3, 512) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="session")
def alone(engine_on, hybrid, prompts):
    """`alone(make)` returns what vLLM answers without kvstrata."""
    known = {}

    def answer(make):
        if make not in known:
            with engine_on(model=hybrid(make)) as engine:
                known[make] = _tokens(engine.ask(prompts))
        return known[make]

    return answer


def _tokens(answers):
    return [answer.tokens for answer in answers]


def _from(answers, tier):
    return [answer.tokens_from[tier] for answer in answers]


ALL = pytest.mark.parametrize("make", [_gemma3, _gemma4, _gpt_oss, _mistral])
TWO = pytest.mark.parametrize("make", [_gemma4, _mistral])


@ALL
def test_host_then_disk_after_restart(engine_on, hybrid, prompts, alone, tmp_path, make):
    extra = {"tiers": f"host:64MiB,disk:{tmp_path}:64MiB"}
    with engine_on(extra, model=hybrid(make)) as engine:
        cold = engine.ask(prompts)
        engine.forget()
        warm = engine.ask(prompts)
        engine.wait_idle()
    with engine_on(extra, model=hybrid(make)) as engine:
        restarted = engine.ask(prompts)
    expected = alone(make)
    assert len(set(expected)) == len(expected), "answers that are all the same show nothing"
    assert _tokens(cold) == _tokens(warm) == _tokens(restarted) == expected
    assert _from(cold, "host") == _from(restarted, "host") == [0] * len(prompts)
    assert _from(warm, "host") == _from(restarted, "disk") == HITS


@ALL
def test_chunks_of_a_prompt_that_end_inside_pages(engine_on, hybrid, prompts, alone, make):
    """Between chunks vLLM forgets pages in front of the window: they were saved before."""
    with engine_on(
        {"tiers": "host:64MiB"}, model=hybrid(make), max_num_batched_tokens=72
    ) as engine:
        assert _tokens(engine.ask(prompts)) == alone(make)
        engine.forget()
        warm = engine.ask(prompts)
    assert _tokens(warm) == alone(make)
    assert _from(warm, "host") == HITS


def test_a_router_learns_from_events_what_every_group_has(
    engine_on, hybrid, prompts, router_at, tmp_path
):
    """Four groups, whose pages differ in length; a block has the pages of all of them."""
    from vllm.config import KVEventsConfig

    address = f"ipc://{tmp_path}/events.sock"
    published = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=address)
    extra = {"tiers": f"host:1200KiB,disk:{tmp_path / 'kv'}:64MiB"}  # the host has few slots
    first, second = prompts[LENGTHS.index(193)], prompts[LENGTHS.index(400)]
    with (
        engine_on(extra, model=hybrid(_gemma4), kv_events_config=published) as engine,
        router_at(address) as router,
    ):

        def ask(prompt):
            """Return the answer and the events of it, after everything is on disk."""
            (answer,) = engine.ask([prompt])
            engine.wait_idle()
            engine.forget()
            time.sleep(0.15)  # the daemon is asked again
            engine.ask([[7] * 5], max_tokens=2)
            told = router.received()
            with AdminClient(engine.connector.daemon_address) as admin:
                tiers = admin.stats()["node"]["tiers"]
            for tier in ("host", "disk"):
                kept = tiers[tier]["total"] - tiers[tier]["free"]
                for group, (_, size, _) in router.groups.items():
                    believed = router.held[f"kvstrata.{tier}", group]
                    assert len(believed) == kept * 64 // size, (tier, group)
            return answer, told

        cold, told = ask(first)
        assert sorted(router.groups.values()) == [
            ("full_attention", 32, None), *[("sliding_window", 64, 100)] * 3,
        ]  # fmt: skip
        (full,) = (group for group, said in router.groups.items() if said[2] is None)
        own = [
            name
            for each in told
            if hasattr(each, "token_ids") and each.medium == "GPU" and each.group_idx == full
            for name in each.block_hashes
        ][:6]
        for group in router.groups:
            step = 1 if group == full else 2
            names = {frozenset(router.held[f"kvstrata.{tier}", group]) for tier in ("host", "disk")}
            assert names == {frozenset(own[step - 1 :: step])}, "vLLM's own names"
        assert router.tokens(first, "kvstrata.host") == 192
        warm, _ = ask(first)
        assert warm.tokens == cold.tokens
        assert warm.tokens_from["host"] == 192, "as a router believed"
        _, told = ask(second)
        gone = [each for each in told if type(each).__name__ == "BlockRemoved"]
        gone = [each for each in gone if each.ownership == "kvstrata.host"]
        assert {each.group_idx for each in gone} == set(router.groups), "evicted from all of them"
        assert router.tokens(first, "kvstrata.host") < 192
        assert router.tokens(first, "kvstrata.disk") == 192
        os.kill(engine.connector.daemon_pid, signal.SIGKILL)
        engine.ask([[7] * 5], max_tokens=4)
        router.received()
        assert not any(router.held.values()), "nobody can follow it now"


@TWO
def test_blocks_written_while_decoding_are_kept(engine_on, hybrid, prompts, make):
    first = prompts[5]
    with engine_on(model=hybrid(make)) as engine:
        answer = engine.ask([first], max_tokens=220)[0].tokens
        followed = [*first, *answer, 5, 6, 7]
        expected = engine.ask([followed])[0].tokens
    with engine_on({"tiers": "host:64MiB"}, model=hybrid(make)) as engine:
        assert engine.ask([first], max_tokens=220)[0].tokens == answer
        engine.forget()
        again = engine.ask([followed])[0]
    assert again.tokens == expected
    assert again.tokens_from["host"] == 256  # of 319 tokens whose KV was computed


@pytest.mark.parametrize(
    ("make", "pages", "preempts"),
    [
        (_gemma3, 36, True),
        (_gemma4, 36, True),
        (_gpt_oss, 24, True),
        (_mistral, 12, False),  # admitted for its prefill
    ],
)
def test_pressure_preempts_evicts_and_answers_the_same(
    engine_on, hybrid, prompts, tmp_path, make, pages, preempts
):
    many = [prompts[-1][start : start + 150 + start] for start in range(0, 96, 16)]
    options = {
        "model": hybrid(make),
        "num_gpu_blocks_override": pages,
        "max_model_len": 384,
        "max_num_batched_tokens": 96,
    }
    with engine_on(**options) as engine:
        expected = _tokens(engine.ask(many, max_tokens=80))
    extra = {"tiers": f"host:1200KiB,disk:{tmp_path}:64MiB"}
    with engine_on(extra, **options) as engine:
        for _ in range(3):
            assert _tokens(engine.ask(many, max_tokens=80)) == expected
            engine.wait_idle()
            engine.forget()
        values = {m.name: m.value for m in engine.llm.get_metrics() if hasattr(m, "value")}
        counters = engine.counters()
    assert (values["vllm:num_preemptions"] > 0) == preempts
    assert counters["hit_blocks_staged"] > 0
    assert counters["corrupt_blocks"] == 0


@TWO
def test_local_hit_and_kept_blocks_add_up(engine_on, hybrid, prompts, alone, make):
    with engine_on({"tiers": "host:64MiB"}, model=hybrid(make)) as engine:
        engine.ask(prompts)
        engine.forget()
        engine.ask([prompts[-1][:130]], max_tokens=1)
        answer = engine.ask([prompts[-1]])[0]
    assert answer.tokens == alone(make)[-1]
    assert answer.cached == 384
    assert answer.tokens_from == {"host": 256, "disk": 0}


@TWO
def test_a_block_without_all_its_pages_is_not_saved(engine_on, hybrid, prompts, alone, make):
    """vLLM has a prefix, but of the windows only its end, and kvstrata has lost it."""
    from kvstrata.runtime.admin import AdminClient

    longer = prompts[-1]
    with engine_on({"tiers": "host:64MiB"}, model=hybrid(make)) as engine:
        engine.ask([longer[:321]], max_tokens=1)
        with AdminClient(engine.connector.daemon_address) as admin:
            admin.clear([])
        local = engine.ask([longer])[0]
        engine.forget()
        again = engine.ask([longer])[0]
        engine.forget()
        stored = engine.ask([longer])[0]
    assert _tokens([local, again, stored]) == [alone(make)[-1]] * 3
    assert local.cached == 320
    assert again.tokens_from["host"] == 0
    assert stored.tokens_from["host"] == 384


@TWO
def test_a_load_that_fails_is_computed_whole(engine_on, hybrid, prompts, alone, monkeypatch, make):
    """Of a hit with windows no shorter part can be used; and nothing is asked for again."""
    from kvstrata.connectors.vllm.worker import WorkerHalf

    with engine_on({"tiers": "host:64MiB"}, model=hybrid(make)) as engine:
        engine.ask(prompts)
        engine.forget()
        real_load = WorkerHalf.load
        loads = []

        def load(self, plan):
            self._follow(plan)
            for job in plan.loads:
                loads.append(job.request)
                slot = job.copy.slots[-1]  # as if given out meanwhile, and written to
                self._arena.generations[slot] += 1
                self._arena.slot(slot)[:] = bytes(len(self._arena.slot(slot)))
            real_load(self, plan)

        with monkeypatch.context() as patch:
            patch.setattr(WorkerHalf, "load", load)
            answers = engine.ask([prompts[-1], prompts[0]])
    assert _tokens(answers) == [alone(make)[-1], alone(make)[0]]
    assert answers[0].tokens_from == {"host": 0, "disk": 0}
    assert len(loads) == 1


def test_without_the_hybrid_manager_the_blocks_are_the_same(
    engine_on, hybrid, prompts, alone, tmp_path
):
    """Then vLLM has one group and keeps all pages: who wrote a block makes no difference."""
    extra = {"tiers": f"host:64MiB,disk:{tmp_path}:64MiB"}
    answers = []
    for disabled in (False, True, False):
        options = {"model": hybrid(_gpt_oss), "disable_hybrid_kv_cache_manager": disabled}
        with engine_on(extra, **options) as engine:
            asked = prompts[: 6 * (1 + len(answers))]
            answers.append(engine.ask(asked))
            engine.wait_idle()
            groups = len(engine.connector._scheduler._cache.groups)
        assert groups == (1 if disabled else 2)
        assert _tokens(answers[-1]) == alone(_gpt_oss)[: len(asked)]
    assert _from(answers[1], "disk")[:6] == [0, 0, 0, 64, 64, 64]  # of one group all may be loaded
    assert _from(answers[2], "disk") == HITS


def test_a_window_shorter_than_a_block_is_refused(engine_on, hybrid):
    with (
        pytest.raises(LayoutError, match="128 are more than the sliding window of 64") as caught,
        engine_on({"tiers": "host:64MiB", "block_tokens": 128}, model=hybrid(_gemma3)),
    ):
        pass
    assert "set block_tokens to 32" in caught.value.hint


# -- which pages go where --------------------------------------------------------------------------


def _cache():
    from kvstrata.layout import GroupedCache, LayerGroup, PagedCache

    page = PagedCache(1, 1, 16, 8, "float16")
    wide = PagedCache(1, 1, 32, 4, "float16")
    return GroupedCache((LayerGroup(page, (0,)), LayerGroup(wide, (1,), 64)))


def test_a_load_fills_what_vllm_has_allocated():
    from kvstrata.connectors.vllm.grouped import load_copy

    tables = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [0, 0, 3, 4, 15]]
    copy, lost = load_copy(_cache(), 64, tables, range(32, 128), [70, 71])
    assert lost == []
    rows = list(zip(copy.groups, copy.slots, copy.places, copy.pages, strict=True))
    assert rows == [
        (0, 70, 2, 7), (0, 70, 3, 8), (0, 71, 0, 9), (0, 71, 1, 10), (0, 71, 2, 11),
        (0, 71, 3, 12), (1, 71, 0, 3), (1, 71, 1, 4),
    ]  # fmt: skip
    copy, lost = load_copy(_cache(), 64, tables, range(32, 128), [70])
    assert copy.pages == [7, 8]
    assert lost == [9, 10, 11, 12, 3, 4]


def test_a_save_begins_behind_the_last_page_that_is_missing():
    from kvstrata.connectors.vllm.grouped import first_complete, save_copy

    pages = list(range(20, 33))
    for windowed, first in (
        ([1, 2, 3, 4, 5, 6], 0),
        ([0, 2, 3, 4, 5, 6], 1),
        ([0, 0, 3, 4, 5, 6], 1),
        ([0, 0, 0, 4, 5, 6], 2),
        ([0, 0, 0, 0, 0, 6], 3),
    ):
        assert first_complete(_cache(), 64, [pages, windowed], 0, 3) == first, windowed
    assert first_complete(_cache(), 64, [pages, [0, 2, 3, 4, 5, 6]], 2, 3) == 2
    copy = save_copy(_cache(), 64, [pages, [0, 2, 3, 4, 5, 6]], [1, 2], [8, 9])
    assert copy.slots == [8] * 4 + [9] * 4 + [8, 8, 9, 9]
    assert copy.places == [0, 1, 2, 3] * 2 + [0, 1] * 2
    assert copy.pages == [24, 25, 26, 27, 28, 29, 30, 31, 3, 4, 5, 6]
    assert copy.groups == [0] * 8 + [1] * 4
    with pytest.raises(AssertionError, match="null page"):
        save_copy(_cache(), 64, [pages, [0, 2, 3, 4, 5, 6]], [0], [8])
