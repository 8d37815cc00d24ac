"""What is refused at the start, what goes by without the cache, and what is never computed with."""

from __future__ import annotations

import copy

import pytest

from kvstrata.core.errors import ConfigError, DaemonError, LayoutError

pytestmark = pytest.mark.transformers

SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
MLA = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 32, "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
LONG = {"rope_parameters": {
    "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 1024, "rope_theta": 10000.0, "factor": 2.0,
}}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("Qwen3", SLIDING | {"use_sliding_window": True}, "DynamicSlidingWindowLayer"),
        ("Mistral", {"sliding_window": 32, "head_dim": 16}, "DynamicSlidingWindowLayer"),
        ("DeepseekV2", MLA, "latent attention"),
        ("Llama", DYNAMIC, "dynamic"),
        ("Llama", LONG, "longrope"),
        ("Mamba", {"attn_implementation": "eager"}, "keeps a state|LinearAttentionLayer"),
    ],
)
def test_models_that_are_refused(tiny, make_cache, kind, changes, message):
    model = tiny.model(kind, **changes)
    with pytest.raises(LayoutError, match=message):
        make_cache(model)


def test_gemma_with_windows_is_refused(tiny, make_cache):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    plain = tiny.model().config.to_dict()
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    sizes = {name: plain[name] for name in names} | {"num_hidden_layers": 2, "head_dim": 16}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **SLIDING)).eval()
    with pytest.raises(LayoutError, match="DynamicSlidingWindowLayer"):
        make_cache(model)


def test_states_that_are_refused(tiny, make_cache):
    import torch

    def refused(model: object, message: str) -> None:
        with pytest.raises(LayoutError, match=message):
            make_cache(model)

    refused(torch.nn.Linear(2, 2), "not a model of transformers")
    refused(tiny.model().train(), "training mode")
    refused(tiny.model().to("meta"), "not in memory")
    hooked = tiny.model()
    hooked.model.layers[1].register_forward_hook(lambda *_: None)
    refused(hooked, "hooks")
    adapted = tiny.model()
    adapted._hf_peft_config_loaded = True
    refused(adapted, "adapters")
    with torch.inference_mode():
        frozen = tiny.model()
    refused(frozen, "do not tell when they change")


def test_a_release_that_was_not_tested_is_refused(llama, make_cache, monkeypatch):
    from kvstrata.connectors.transformers import eligibility

    monkeypatch.setattr(eligibility.transformers, "__version__", "5.99.0")
    with pytest.raises(LayoutError, match=r"5\.99\.0 is not a version"):
        make_cache(llama)


def test_a_model_that_looks_ahead_is_found_by_the_canary(tiny, make_cache):
    """No configuration says so here: every token sees the mean of the whole text."""

    def ahead(self, input_ids=None, past_key_values=None, **given):
        embedded = self.model.embed_tokens(input_ids)
        mixed = embedded + embedded.mean(dim=1, keepdim=True)
        return plain(inputs_embeds=mixed, past_key_values=past_key_values, **given)

    model = tiny.model()
    plain = model.forward
    model.forward = ahead.__get__(model)
    with pytest.raises(LayoutError, match="more than the tokens before it"):
        make_cache(model)


def test_settings_that_are_refused(llama, make_cache, tmp_path):
    for settings in (
        {"tiers": "host:1KiB"},
        {"tiers": "tape:1GiB"},
        {"block_tokens": 0},
        {"tenant": "x" * 257},
    ):
        with pytest.raises(ConfigError):
            make_cache(llama, **settings)
    with pytest.raises(DaemonError, match="nothing listens"):
        make_cache(llama, address=f"ipc://{tmp_path}/none.sock")
    assert not llama._forward_pre_hooks, "a refusal leaves nothing behind"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 3}, "beam_search"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"prefill_chunk_size": 16}, "prefill_chunk_size"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    ],
    ids=["beams", "several", "uncached", "static", "lookup", "parts", "states"],
)
def test_generations_that_go_by_without_the_cache(tiny, llama, make_cache, options, reason):
    import torch

    cache, ids = make_cache(llama), tiny.ids(50)
    tiny.answer(cache, ids)
    said = []
    for source in (llama, cache):
        torch.manual_seed(3)
        output = tiny.answer(source, ids, **options)
        said.append(output if isinstance(output, torch.Tensor) else output.sequences)
    assert torch.equal(*said)
    assert cache.statistics.unserved == {reason: 1}
    assert cache.statistics.loaded_tokens == 0


def test_assistants_go_by_without_the_cache(tiny, llama, make_cache):
    import torch

    cache, ids = make_cache(llama), tiny.ids(50)
    tiny.answer(cache, ids)
    expected = tiny.answer(llama, ids)
    assert torch.equal(tiny.answer(cache, ids, assistant_model=tiny.model(seed=1)), expected)
    assert cache.statistics.unserved == {"assistant_model": 1}


def test_padding_goes_by_without_the_cache(tiny, make_cache):
    import torch

    model = tiny.model(pad_token_id=0)
    cache, ids = make_cache(model), tiny.ids(50, rows=2)
    ids[1, :7] = 0
    mask = (ids != 0).long()
    tiny.answer(cache, ids[:1])
    for given in ({"attention_mask": mask}, {}):
        assert torch.equal(tiny.answer(cache, ids, **given), tiny.answer(model, ids, **given))
    assert cache.statistics.unserved == {"padding": 2}
    assert torch.equal(
        tiny.answer(cache, ids[:1], attention_mask=mask[:1]), tiny.answer(model, ids[:1])
    )
    assert cache.statistics.loaded_tokens == 48, "a mask of ones is no mask"


def test_embeddings_go_by_without_the_cache(tiny, llama, make_cache):
    import torch

    cache, ids = make_cache(llama), tiny.ids(50)
    tiny.answer(cache, ids)
    embedded = llama.get_input_embeddings()(ids)
    assert torch.equal(
        tiny.answer(cache, ids, inputs_embeds=embedded),
        tiny.answer(llama, ids, inputs_embeds=embedded),
    )
    assert cache.statistics.unserved == {"inputs_embeds": 1}


# -- by hand ---------------------------------------------------------------------------------------


def _loaded(tiny, model, make_cache, **settings):
    """A cache with blocks loaded for the ids that come with it."""
    cache, ids = make_cache(model, **settings), tiny.ids(60)
    tiny.answer(cache, ids)
    past = cache.begin(ids)
    assert past.get_seq_length() == 48
    return cache, ids, past


def test_a_cache_that_was_not_begun_is_not_computed_with(tiny, llama, make_cache):
    cache = make_cache(llama)
    with pytest.raises(ValueError, match=r"call cache\.begin"):
        tiny.answer(llama, tiny.ids(20), past_key_values=cache)
    past = cache.begin(tiny.ids(20))
    tiny.answer(llama, tiny.ids(20), past_key_values=past)
    cache.keep()
    with pytest.raises(ValueError, match=r"call cache\.begin"):
        tiny.answer(llama, tiny.ids(40), past_key_values=past)


@pytest.mark.parametrize("part", ["tail", "rows", "mask", "positions", "embeds", "beams"])
def test_loaded_blocks_are_not_used_for_another_input(tiny, llama, make_cache, part):
    import torch

    cache, ids, past = _loaded(tiny, llama, make_cache)
    given = {"past_key_values": past}
    if part == "tail":
        ids = torch.cat([ids[:, :50], tiny.ids(10, seed=9)], dim=1)
    if part == "rows":
        ids = ids.repeat(2, 1)
    if part == "mask":
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][0, :5] = 0
    if part == "positions":
        given["position_ids"] = torch.arange(3, 63)[None]
    if part == "embeds":
        given["inputs_embeds"] = llama.get_input_embeddings()(ids)
        ids = None
    if part == "beams":
        given["num_beams"] = 2
    with pytest.raises(ValueError, match="tokens were loaded for another input"):
        tiny.answer(llama, ids, **given)
    assert cache.keep() == 0


def test_parts_of_a_prompt_go_on_behind_loaded_blocks_or_are_refused(tiny, llama, make_cache):
    """transformers up to 5.23 begins the parts at the first token, whatever the cache holds."""
    import torch

    _, ids, past = _loaded(tiny, llama, make_cache)
    plain = tiny.answer(llama, ids)
    try:
        said = tiny.answer(llama, ids, past_key_values=past, prefill_chunk_size=8)
    except ValueError as error:
        assert "tokens were loaded for another input" in str(error)  # noqa: PT017  # either is right
    else:
        assert torch.equal(said, plain)


def test_another_input_than_begun_is_computed_but_not_kept(tiny, llama, make_cache):
    """Nothing was loaded, so the answer is right; it must not be stored under the wrong tokens."""
    import torch

    cache, other = make_cache(llama), tiny.ids(60, seed=4)
    past = cache.begin(tiny.ids(60))
    assert torch.equal(tiny.answer(llama, other, past_key_values=past), tiny.answer(llama, other))
    assert cache.keep() == 0
    assert cache.statistics.unkept == {"other tokens": 1}
    past = cache.begin(tiny.ids(60))
    tiny.answer(llama, tiny.ids(60), past_key_values=past, num_beams=2)
    assert cache.keep() == 0
    assert cache.statistics.unkept == {"other tokens": 1, "other rows": 1}


def test_another_model_is_not_computed_with(tiny, llama, make_cache):
    cache, ids, past = _loaded(tiny, llama, make_cache)
    with pytest.raises(ValueError, match="the model that it was made for"):
        tiny.answer(tiny.model(seed=1), ids, past_key_values=past)
    past = cache.begin(ids)
    with pytest.raises(ValueError, match="the model that it was made for"):
        llama.model(ids[:, 48:], past_key_values=past)


def test_autocast_is_not_kept(tiny, llama, make_cache):
    import torch

    cache, ids, past = _loaded(tiny, llama, make_cache)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="autocast"):
            tiny.answer(llama, ids, past_key_values=past)
        stored = cache.statistics.stored_blocks
        tiny.answer(cache, tiny.ids(60, seed=2))
    assert cache.statistics.stored_blocks == stored
    assert cache.statistics.unserved == {"autocast": 1}


def test_cropped_tokens_are_not_kept(tiny, llama, make_cache):
    import torch

    cache, ids, past = _loaded(tiny, llama, make_cache)
    said = tiny.answer(llama, ids, 20, past_key_values=past)
    past.crop(-30)
    assert past.get_seq_length() == 49
    turned = torch.cat([ids[:, :49], tiny.ids(20, seed=8)], dim=1)
    assert torch.equal(tiny.answer(llama, turned, past_key_values=past), tiny.answer(llama, turned))
    assert cache.keep() == 1, "tokens 48 to 63 of the other turn"
    for whole in (said, turned):
        assert torch.equal(tiny.answer(cache, whole), tiny.answer(llama, whole))


def test_a_copy_is_a_cache_of_its_own(tiny, llama, make_cache):
    """As transformers' users do to go on from one prefix several times."""
    import torch

    _, ids, past = _loaded(tiny, llama, make_cache)
    copies = [copy.deepcopy(past) for _ in range(2)]
    expected = tiny.answer(llama, ids)
    for each in copies:
        assert torch.equal(tiny.answer(llama, ids, past_key_values=each), expected)
        assert each.get_seq_length() == expected.shape[1] - 1
    assert past.get_seq_length() == 48
    assert copies[0].keep() == 0


def test_rows_of_different_lengths_are_refused(llama, make_cache):
    cache = make_cache(llama)
    for odd in ([[1, 2], [3]], [], [[]]):
        with pytest.raises(ValueError, match="input_ids"):
            cache.begin(odd)


def test_ids_that_are_no_tokens_are_a_miss(llama, make_cache):
    cache = make_cache(llama)
    assert cache.begin([2**40] * 40).get_seq_length() == 0


def test_an_error_in_generate_keeps_nothing(tiny, llama, make_cache):
    cache, ids = make_cache(llama), tiny.ids(60)

    def fail(*_: object) -> None:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        tiny.answer(cache, ids, logits_processor=[fail])
    assert cache.statistics.stored_blocks == 0
    assert cache.keep() == 0


def test_closing_takes_the_hook_out(tiny, make_cache):
    model = tiny.model()
    cache = make_cache(model)
    assert len(model._forward_pre_hooks) == 1
    cache.close()
    cache.close()
    assert not model._forward_pre_hooks
    for use in (cache.begin, cache.generate):
        with pytest.raises(ValueError, match="closed"):
            use(tiny.ids(20))
