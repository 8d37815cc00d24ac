"""LoRA on a real engine: blocks belong to the weights that computed them, by any name."""

from __future__ import annotations

import json
import logging

import pytest

pytestmark = pytest.mark.engine

OPTIONS = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "max_cpu_loras": 2}


def write_adapter(folder, seed):
    """An adapter over q and v of the tiny Llama, strong enough to change its answers."""
    import torch
    from safetensors.torch import save_file

    luck = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(4):
        for module, outputs in (("q_proj", 128), ("v_proj", 64)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(8, 128, generator=luck) * 0.3
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, 8, generator=luck) * 0.3
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def lora(name, number, path, **options):
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(path), **options)


def ask(engine, prompt, adapter):
    """The answer of a request with an adapter; vLLM's own cache is empty before."""
    from vllm import SamplingParams

    engine.forget()
    parameters = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    (output,) = engine.llm.generate(
        [{"prompt_token_ids": prompt}], parameters, use_tqdm=False, lora_request=adapter
    )
    engine.wait_idle()
    kept = output.kv_transfer_params["kvstrata"]["tokens_from"]
    return tuple(output.outputs[0].token_ids), sum(kept.values())


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return write_adapter(folder / "one", 1), write_adapter(folder / "two", 2)


@pytest.fixture(scope="module")
def right(engine_on, prompts, adapters):
    """The answers without kvstrata: of the model, of the first adapter, of the second."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    answers = []
    with engine_on(**OPTIONS) as engine:
        for adapter in (None, lora("one", 1, adapters[0]), lora("two", 2, adapters[1])):
            (output,) = engine.llm.generate(
                [{"prompt_token_ids": prompts[2]}],
                parameters,
                use_tqdm=False,
                lora_request=adapter,
            )
            answers.append(tuple(output.outputs[0].token_ids))
    assert len(set(answers)) == 3, "the adapters must change the answers"
    return answers


def test_each_adapter_finds_its_own_blocks_after_a_restart_too(
    engine_on, prompts, adapters, right, tmp_path
):
    prompt, (base, first, second) = prompts[2], right
    extra = {"tiers": f"host:64MiB,disk:{tmp_path}:64MiB"}
    with engine_on(extra, **OPTIONS) as engine:
        one, two = lora("one", 1, adapters[0]), lora("two", 2, adapters[1])
        for adapter, answer in ((None, base), (one, first), (two, second)):
            assert ask(engine, prompt, adapter) == (answer, 0), "nobody else's blocks"
        for adapter, answer in ((two, second), (one, first), (None, base)):
            assert ask(engine, prompt, adapter) == (answer, 256)
        # The same weights under other names, numbers and paths are the same weights.
        assert ask(engine, prompt, lora("alias", 7, adapters[0])) == (first, 256)
    with engine_on(extra, **OPTIONS) as engine:
        # Numbers and names are dealt out anew: the first request of all hits.
        assert ask(engine, prompt, lora("b", 1, adapters[1])) == (second, 256)
        assert ask(engine, prompt, lora("a", 2, adapters[0])) == (first, 256)


def test_other_weights_under_the_same_name_never_hit(engine_on, prompts, right, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "kvstrata.vllm")
    prompt, (_, first, second) = prompts[2], right
    path = write_adapter(tmp_path / "adapter", 1)
    with engine_on({"tiers": "host:64MiB"}, **OPTIONS) as engine:
        assert ask(engine, prompt, lora("mine", 1, path)) == (first, 0)
        assert ask(engine, prompt, lora("mine", 1, path)) == (first, 256)
        write_adapter(path, 2)
        # vLLM goes on with what it has loaded, and so may its blocks.
        assert ask(engine, prompt, lora("mine", 1, path)) == (first, 256)
        # Now it loads the new weights, as its server does for load_inplace.
        engine.llm.llm_engine.add_lora(lora("mine", 1, path, load_inplace=True))
        assert ask(engine, prompt, lora("mine", 1, path)) == (second, 0)
        assert "has other weights than before" in caplog.text
        assert ask(engine, prompt, lora("mine", 1, path)) == (second, 0), "not before a reset"
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        assert ask(engine, prompt, lora("mine", 1, path)) == (second, 0)
        assert ask(engine, prompt, lora("mine", 1, path)) == (second, 256)
        # A request that loads its adapter in place in each step is served without the cache.
        assert ask(engine, prompt, lora("mine", 1, path, load_inplace=True)) == (second, 0)


def test_a_number_used_twice_means_what_is_loaded(engine_on, prompts, adapters, right):
    prompt, (_, first, _) = prompts[2], right
    with engine_on({"tiers": "host:64MiB"}, **OPTIONS) as engine:
        assert ask(engine, prompt, lora("one", 1, adapters[0])) == (first, 0)
        # vLLM answers with the adapter that it has under this number.
        assert ask(engine, prompt, lora("two", 1, adapters[1])) == (first, 256)


def test_weights_that_change_while_a_request_runs(engine_on, prompts, right, tmp_path):
    """What it computed with both is found by nobody."""
    from vllm import SamplingParams

    prompt, (_, first, second) = prompts[2], right
    paths = write_adapter(tmp_path / "old", 1), write_adapter(tmp_path / "new", 2)
    with engine_on({"tiers": "host:64MiB"}, **OPTIONS) as engine:
        core = engine.llm.llm_engine
        core.add_lora(lora("mine", 1, paths[0]))
        parameters = SamplingParams(
            temperature=0, max_tokens=150, ignore_eos=True, detokenize=False
        )
        core.add_request(
            "long", {"prompt_token_ids": prompt}, parameters, lora_request=lora("mine", 1, paths[0])
        )
        ended = None
        for step in range(400):
            ended = next((output for output in core.step() if output.finished), None)
            if ended:
                break
            if step == 20:
                core.add_lora(lora("mine", 1, paths[1], load_inplace=True))
        assert ended, "the long request has ended"
        engine.wait_idle()
        stored = engine.counters()["stored_blocks"]
        assert stored == 4, "the prompt's blocks, and none that ended behind the change"
        answer = [*prompt, *ended.outputs[0].token_ids]
        tokens, kept = ask(engine, answer[:330], lora("again", 3, paths[0]))
        assert kept == 256
        assert tokens != tuple(answer[330:338]), "the rest was of other weights"
        assert ask(engine, prompt, lora("again", 4, paths[1])) == (second, 0)
        assert ask(engine, prompt, lora("again", 3, paths[0])) == (first, 256)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_workers_agree_on_weights(engine_on, make_llama, prompts, adapters, tmp_path):
    """Everything goes through other processes: what is asked, what is told, and new weights."""
    prompt, other = prompts[2], make_llama(tmp_path / "other", seed=1)
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine_on({"tiers": "host:64MiB"}, **OPTIONS, **parallel) as engine:
        one, two = lora("one", 1, adapters[0]), lora("two", 2, adapters[1])
        first, second = ask(engine, prompt, one), ask(engine, prompt, two)
        assert (first[1], second[1]) == (0, 0)
        assert ask(engine, prompt, one) == (first[0], 256)
        assert ask(engine, prompt, two) == (second[0], 256)
        base, _ = ask(engine, prompt, None)
        assert ask(engine, prompt, None) == (base, 256)
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        renewed, kept = ask(engine, prompt, None)
        assert renewed != base
        assert kept == 0
        assert ask(engine, prompt, None) == (renewed, 0)
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        for expected in (0, 0, 256):  # the first look after a reset, a save, a load
            assert ask(engine, prompt, None) == (renewed, expected)


def test_layer_wise_an_adapters_blocks_move_between_steps(engine_on, prompts, adapters, right):
    """The model's own are loaded within the step beside them."""
    extra = {"tiers": "host:64MiB", "loading": "layerwise", "saving": "layerwise"}
    asked = (None, lora("one", 1, adapters[0]), lora("two", 2, adapters[1]))
    with engine_on(extra, **OPTIONS) as engine:
        cold = [ask(engine, prompts[2], adapter) for adapter in asked]
        warm = [ask(engine, prompts[2], adapter) for adapter in asked]
    assert cold == [(tokens, 0) for tokens in right]
    assert warm == [(tokens, 256) for tokens in right]
