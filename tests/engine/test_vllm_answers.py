"""Answers from kept blocks are, token by token, the answers of vLLM alone."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.engine


def _tokens(answers):
    return [answer.tokens for answer in answers]


def _from(answers, tier):
    return [answer.tokens_from[tier] for answer in answers]


def test_host_then_disk_after_restart(engine_on, prompts, reference, tmp_path):
    extra = {"tiers": f"host:64MiB,disk:{tmp_path}:64MiB"}
    with engine_on(extra) as engine:
        cold = engine.ask(prompts)
        engine.forget()
        warm = engine.ask(prompts)
        engine.wait_idle()
    with engine_on(extra) as engine:
        restarted = engine.ask(prompts)
    assert _tokens(cold) == _tokens(warm) == _tokens(restarted) == reference
    assert _from(cold, "host") == _from(cold, "disk") == [0, 0, 0, 0]
    assert _from(warm, "host") == [64, 128, 256, 0]
    assert _from(restarted, "disk") == [64, 128, 256, 0]
    assert _from(restarted, "host") == [0, 0, 0, 0]


def test_blocks_written_while_decoding_are_kept(engine_on, prompts):
    first = prompts[0]
    with engine_on() as engine:
        answer = engine.ask([first], max_tokens=120)[0].tokens
        followed = [*first, *answer, 5, 6, 7]
        expected = engine.ask([followed])[0].tokens
    with engine_on({"tiers": "host:64MiB"}) as engine:
        assert engine.ask([first], max_tokens=120)[0].tokens == answer
        engine.forget()
        again = engine.ask([followed])[0]
    assert again.tokens == expected
    assert again.tokens_from["host"] == 192  # 220 tokens were computed, of 3 full blocks each KV


def test_local_hit_and_kept_blocks_add_up(engine_on, prompts, reference):
    """vLLM's own cache may end inside one of our blocks: only the pages behind it are loaded."""
    with engine_on({"tiers": "host:64MiB"}) as engine:
        engine.ask(prompts)
        engine.forget()
        engine.ask([prompts[2][:33]], max_tokens=1)  # one page of 32 tokens is local now
        answer = engine.ask([prompts[2]])[0]
    assert answer.tokens == reference[2]
    assert answer.cached == 256
    assert answer.tokens_from == {"host": 224, "disk": 0}


def test_another_salt_never_hits(engine_on, prompts, reference):
    with engine_on({"tiers": "host:64MiB"}) as engine:
        hits = []
        for salt in ("A", "A", "B", None):
            extra = {"cache_salt": salt} if salt else {}
            answer = engine.ask([prompts[2]], **extra)[0]
            assert answer.tokens == reference[2]
            hits.append(answer.tokens_from["host"])
            engine.forget()
    assert hits == [0, 256, 0, 0]


def test_prompt_logprobs_compute_everything(engine_on, prompts, reference):
    with engine_on({"tiers": "host:64MiB"}) as engine:
        engine.ask(prompts)
        engine.forget()
        answer = engine.ask([prompts[2]], sampling={"prompt_logprobs": 1})[0]
    assert answer.tokens == reference[2]
    assert answer.tokens_from == {"host": 0, "disk": 0}


def test_preempted_requests_answer_the_same(engine_on, prompts):
    many = [prompts[2][start : start + 150] for start in range(0, 96, 16)]
    small = {"kv_cache_memory_bytes": 22 * 4 * 16384}  # 22 pages of 4 layers: too few for all
    with engine_on(**small) as engine:
        expected = _tokens(engine.ask(many, max_tokens=80))
    with engine_on({"tiers": "host:64MiB"}, **small) as engine:
        assert _tokens(engine.ask(many, max_tokens=80)) == expected
        preemptions = {m.name: m.value for m in engine.llm.get_metrics() if hasattr(m, "value")}
        assert preemptions["vllm:num_preemptions"] > 0
        engine.forget()
        assert _tokens(engine.ask(many, max_tokens=80)) == expected


def test_chunked_prefill_saves_every_block(engine_on, prompts, reference):
    with engine_on({"tiers": "host:64MiB"}, max_num_batched_tokens=96) as engine:
        assert _tokens(engine.ask(prompts)) == reference
        engine.forget()
        warm = engine.ask(prompts)
    assert _tokens(warm) == reference
    assert _from(warm, "host") == [64, 128, 256, 0]


def test_host_smaller_than_the_prompts_serves_from_disk(engine_on, prompts, reference, tmp_path):
    extra = {"tiers": f"host:600KiB,disk:{tmp_path}:64MiB"}  # 4 blocks of 128 KiB in the host
    with engine_on(extra) as engine:
        for prompt in prompts:
            engine.ask([prompt])
            engine.wait_idle()
        engine.forget()
        warm = [engine.ask([prompt])[0] for prompt in prompts]
    assert _tokens(warm) == reference
    assert sum(_from(warm, "disk")) > 0


def test_an_aborted_request_leaves_nothing_held(engine_on, prompts, reference):
    from vllm import SamplingParams

    with engine_on({"tiers": "host:64MiB"}) as engine:
        engine.ask(prompts)
        engine.forget()
        core = engine.llm.llm_engine
        parameters = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
        for steps in range(4):  # before matching, while loading, after loading, while decoding
            name = f"aborted-{steps}"
            core.add_request(name, {"prompt_token_ids": prompts[2]}, parameters)
            for _ in range(steps):
                core.step()
            core.abort_request([name], internal=False)
            while core.has_unfinished_requests():
                core.step()
            engine.forget()
        assert engine.ask([prompts[2]])[0].tokens == reference[2]
        engine.ask([prompts[3]])  # vLLM tells of a finish only in its next step
        assert engine.connector._scheduler._requests == {}
        from kvstrata.runtime.admin import AdminClient

        with AdminClient(engine.connector.daemon_address) as admin:
            assert admin.stats()["node"]["holds"] == 0


def test_reset_with_connector_forgets_every_block(engine_on, prompts, reference):
    with engine_on({"tiers": "host:64MiB"}) as engine:
        engine.ask(prompts)
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        again = engine.ask(prompts)
    assert _tokens(again) == reference
    assert _from(again, "host") == [0, 0, 0, 0]


def test_an_id_of_any_length_is_served(engine_on, prompts, reference, caplog):
    """Request ids may come from clients; the daemon never sees them."""
    from vllm import SamplingParams

    with engine_on({"tiers": "host:64MiB"}) as engine:
        engine.ask(prompts)
        engine.forget()
        core = engine.llm.llm_engine
        parameters = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
        core.add_request("\N{SNOWMAN}" * 3000, {"prompt_token_ids": prompts[2]}, parameters)
        outputs = []
        while core.has_unfinished_requests():
            outputs += core.step()
    assert tuple(outputs[-1].outputs[0].token_ids) == reference[2]
    assert outputs[-1].num_cached_tokens == 256
    assert not [each for each in caplog.records if each.name.startswith("kvstrata")]


def test_another_page_size_and_longest_length_go_on_with_the_same_blocks(
    engine_on, prompts, reference, tmp_path
):
    """Neither changes a number of this model: the blocks are re-arranged on their way."""
    extra = {"tiers": f"host:64MiB,disk:{tmp_path}:64MiB"}
    with engine_on(extra) as engine:
        engine.ask(prompts)
        engine.wait_idle()
    with engine_on(extra, max_model_len=480, block_size=64) as engine:
        answers = engine.ask(prompts)
        assert engine.counters()["corrupt_blocks"] == 0
        other = [[*prompt, *prompt[:30]] for prompt in reversed(prompts)]
        engine.ask(other)  # it stores in the layout that the disk has
        engine.forget()
        assert _from(engine.ask(other), "host") == [64, 256, 128, 128]
    assert _tokens(answers) == reference
    assert _from(answers, "disk") == [64, 128, 256, 0]


def test_without_prefix_caching_kvstrata_is_idle(engine_on, prompts, reference, caplog):
    with engine_on({"tiers": "host:64MiB"}, enable_prefix_caching=False) as engine:
        assert _tokens(engine.ask(prompts)) == reference
        again = engine.ask(prompts)
        assert engine.counters()["stored_blocks"] == 0
    assert _tokens(again) == reference
    assert _from(again, "host") == [0, 0, 0, 0]
    assert any("without prefix caching" in record.message for record in caplog.records)


def test_other_weights_never_hit(engine_on, make_llama, prompts, tmp_path):
    """Same name, same shape, other weights in the same folder: another namespace."""
    model = tmp_path / "model"
    extra = {"tiers": f"host:64MiB,disk:{tmp_path / 'kv'}:64MiB"}
    make_llama(model, seed=0)
    with engine_on(extra, model=model) as engine:
        engine.ask(prompts)
        engine.wait_idle()
    make_llama(model, seed=1)
    with engine_on(model=model) as engine:
        expected = _tokens(engine.ask(prompts))
    with engine_on(extra, model=model) as engine:
        answers = engine.ask(prompts)
    assert _tokens(answers) == expected
    assert _from(answers, "disk") == [0, 0, 0, 0]
