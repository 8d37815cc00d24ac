"""Dozens of prompts at once, on small tiers, in parts and whole, over a restart: as vLLM alone.

Also what an engine does while a lower tier is slow, and that blocks of another type are others.
"""

from __future__ import annotations

import os
import signal
import time

import pytest
from kit import LLAMA, SharedDaemon

pytestmark = pytest.mark.engine

AT_ONCE = 16


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """A tiny Qwen 3: a norm on each head's queries and keys, which Llama has not."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**LLAMA)).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.uniform_(0.5, 2.0)  # all ones, as they begin, would show little
    folder = tmp_path_factory.mktemp("qwen3")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def many():
    """Prompts behind three heads, ending at, before and behind a block's end."""
    import random

    luck = random.Random(3)
    heads = [[luck.randrange(3, 512) for _ in range(length)] for length in (40, 130, 200)]
    return [
        [*heads[number % 3], *(luck.randrange(3, 512) for _ in range(1 + 7 * number % 97))]
        for number in range(36)
    ]


def _tokens(answers):
    return [answer.tokens for answer in answers]


def _total(answers, tier):
    return sum(answer.tokens_from.get(tier, 0) for answer in answers)


@pytest.mark.parametrize("batch_tokens", [512, 96], ids=["whole", "in-parts"])
def test_dozens_of_prompts_of_qwen3(engine_on, qwen3, many, tmp_path, batch_tokens):
    options = {"model": qwen3, "max_num_seqs": AT_ONCE, "max_num_batched_tokens": batch_tokens}
    with engine_on(**options) as engine:
        expected = _tokens(engine.ask(many))
    assert len(set(expected)) == len(many), "answers that are all the same show nothing"
    extra = {"tiers": f"host:2MiB,disk:{tmp_path}:64MiB"}  # 15 blocks in the host
    with engine_on(extra, **options) as engine:
        cold = engine.ask(many)
        engine.wait_idle()
        engine.forget()
        warm = engine.ask(many)
        engine.wait_idle()
        counters = engine.counters()
    with engine_on(extra, **options) as engine:
        restarted = engine.ask(many)
    assert _tokens(cold) == _tokens(warm) == _tokens(restarted) == expected
    assert counters["hit_blocks_staged"] > 0, "the host was large enough for everything"
    assert _total(warm, "host") + _total(warm, "disk") > 0
    assert _total(restarted, "disk") > 0
    assert counters["corrupt_blocks"] == 0


def test_blocks_of_another_type_are_never_found(engine_on, prompts, tmp_path):
    """In a shared directory each type has a place of its own, so nothing refuses the engine."""
    tiers, limits = f"host:64MiB,shared:{tmp_path}:64MiB", {"weigh_costs": False}

    def ask(number, dtype):
        """Answer over a daemon that knows only what the directory holds."""
        (tmp_path / str(number)).mkdir()
        daemon = SharedDaemon(tmp_path / str(number), tiers=tiers, limits=limits)
        try:
            with engine_on({"address": daemon.address}, dtype=dtype) as engine:
                engine.wait_idle()
                answers = engine.ask(prompts)
                engine.wait_idle()
        finally:
            daemon.close()
        return _tokens(answers), [answer.tokens_from.get("shared", 0) for answer in answers]

    nothing, all_blocks = [0, 0, 0, 0], [64, 128, 256, 0]
    plain, found = ask(1, "float32")
    assert found == nothing
    rounded, found = ask(2, "bfloat16")
    assert found == nothing
    assert ask(3, "float32") == (plain, all_blocks)
    assert ask(4, "bfloat16") == (rounded, all_blocks)


def _finish(core, wanted, server=None):
    """Step until the requests of these names have ended; return them in the order they did."""
    deadline = time.monotonic() + 60
    ended = {}
    while len(ended) < wanted:
        assert time.monotonic() < deadline, f"only {list(ended)} have ended"
        for output in core.step():
            if output.finished:
                ended[output.request_id] = output
                if server:  # the one that needs nothing of it was served first
                    server.signal(signal.SIGCONT)
        time.sleep(0.002)
    return ended


def test_a_tier_that_is_slow_or_hangs_holds_up_its_request_alone(
    engine_on, prompts, reference, tmp_path, s3_server, s3_url
):
    from vllm import SamplingParams

    from kvstrata.runtime.admin import AdminClient

    secret = tmp_path / "secret"
    secret.write_bytes(os.urandom(32))
    limits = {"weigh_costs": False, "staging_timeout_s": 4.0, "secret_file": str(secret)}
    tiers = f"host:64MiB,object:{s3_url}:64MiB"
    daemon = SharedDaemon(tmp_path, tiers=tiers, limits=limits)
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)

    def from_object(output):
        return output.kv_transfer_params["kvstrata"]["tokens_from"].get("object", 0)

    try:
        with engine_on({"address": daemon.address}) as engine:
            engine.ask(prompts[1:3])
            engine.wait_idle()
            core = engine.llm.llm_engine

            def ask_below(*indices):
                """Empty what is above the object store, and stop it; then add requests.

                The last prompt has no full block: nobody need ask the store for it.
                """
                engine.forget()
                with AdminClient(daemon.address) as admin:
                    admin.clear(["host"])
                s3_server.signal(signal.SIGSTOP)
                for index in indices:
                    prompt = {"prompt_token_ids": prompts[index]}
                    core.add_request(f"{index}", prompt, greedy)

            ask_below(2, 3)
            slow = _finish(core, 2, s3_server)
            assert list(slow) == ["3", "2"], "the one that waits for its blocks ends last"
            assert from_object(slow["2"]) == 256
            ask_below(2, 3)
            began = time.monotonic()
            hung = _finish(core, 2)
            took = time.monotonic() - began
            s3_server.signal(signal.SIGCONT)
            assert list(hung) == ["3", "2"]
            assert from_object(hung["2"]) == 0, "computed"
            assert took < 4.0 + 4.0
            for outputs in (slow, hung):
                for name, output in outputs.items():
                    assert tuple(output.outputs[0].token_ids) == reference[int(name)]
    finally:
        s3_server.signal(signal.SIGCONT)
        daemon.close()
