"""What computes other numbers never finds these blocks; what changes in memory is noticed."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.transformers


def _use(tiny, cache, ids) -> int:
    """Answer, and return how many tokens were loaded for it."""
    before = cache.statistics.loaded_tokens
    tiny.answer(cache, ids)
    return cache.statistics.loaded_tokens - before


def test_the_same_model_in_another_cache_hits(tiny, make_cache):
    one = make_cache(tiny.model())
    ids = tiny.ids(70)
    assert _use(tiny, one, ids) == 0
    assert _use(tiny, make_cache(tiny.model(), address=one.address), ids) == 64


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"seed": 1}, {}),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, {}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}, {}),
        ({"rms_norm_eps": 1e-3}, {}),
        ({"attn_implementation": "eager"}, {}),
        ({}, {"salt": "another"}),
        ({}, {"weights_revision": "r1"}),
    ],
    ids=["weights", "rope", "theta", "epsilon", "attention", "salt", "revision"],
)
def test_what_differs_never_hits(tiny, make_cache, changes, settings):
    one = make_cache(tiny.model())
    ids = tiny.ids(70)
    _use(tiny, one, ids)
    other = make_cache(tiny.model(**changes), address=one.address, **settings)
    assert _use(tiny, other, ids) == 0
    assert _use(tiny, other, ids) == 64, "it has blocks of its own now"
    assert _use(tiny, one, ids) == 64


def test_another_dtype_never_hits(tiny, make_cache):
    """A daemon has one layout, so the other dtype is refused there, and has its own directory."""
    from kvstrata.core.errors import ConfigError

    one = make_cache(tiny.model())
    _use(tiny, one, tiny.ids(70))
    with pytest.raises(ConfigError, match="layout"):
        make_cache(tiny.model(dtype="bfloat16"), address=one.address)


def test_salts_and_tenants_by_call(tiny, llama, make_cache):
    import torch

    cache = make_cache(llama, tenant="house")
    ids = tiny.ids(70)
    expected = tiny.answer(llama, ids)
    for salt in ("one", "two"):
        assert torch.equal(tiny.answer(cache, ids, salt=salt, tenant=f"tenant-{salt}"), expected)
        assert cache.statistics.loaded_tokens == 0
    _use(tiny, cache, ids)
    assert cache.statistics.loaded_tokens == 0
    tiny.answer(cache, ids, salt="two")
    assert cache.statistics.loaded_tokens == 0, "that salt has only been another tenant's"
    tiny.answer(cache, ids, salt="two", tenant="tenant-two")
    assert cache.statistics.loaded_tokens == 64
    from kvstrata.runtime.admin import AdminClient

    with AdminClient(cache.address) as admin:
        tenants = str(admin.stats()["node"]["tenants"])
    assert all(repr(name) in tenants for name in ("house", "tenant-one", "tenant-two"))


def _load_state(model):
    model.load_state_dict({name: each * 1.01 for name, each in model.state_dict().items()})


def _assign_state(model):
    model.load_state_dict(
        {name: each * 1.01 for name, each in model.state_dict().items()}, assign=True
    )


def _behind_the_counter(model):
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(1.01)


def _one_element(model):
    import torch

    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[3, 5] += 1.0


def _attention(model):
    model.set_attn_implementation("eager")


def _epsilon(model):
    model.config.rms_norm_eps = 0.1


def _hook(model):
    model.model.layers[0].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_load_state, "weights"),
        (_assign_state, "weights"),
        (_behind_the_counter, "weights"),
        (_one_element, "weights"),
        (_attention, "configuration"),
        (_epsilon, "configuration"),
        (_hook, "hooks"),
        (lambda model: model.train(), "training mode"),
    ],
    ids=["load", "assign", "data", "element", "attention", "config", "hook", "training"],
)
def test_a_model_that_changed_is_not_served(tiny, make_cache, change, reason):
    import torch

    model = tiny.model()
    cache = make_cache(model)
    ids = tiny.ids(70)
    tiny.answer(cache, ids)
    change(model)
    expected = tiny.answer(model, ids)
    loaded, stored = cache.statistics.loaded_tokens, cache.statistics.stored_blocks
    assert torch.equal(tiny.answer(cache, ids), expected)
    past = cache.begin(ids)
    assert torch.equal(tiny.answer(model, ids, past_key_values=past), expected)
    assert cache.keep() == 0
    assert (cache.statistics.loaded_tokens, cache.statistics.stored_blocks) == (loaded, stored)
    assert cache.statistics.unserved == {reason: 1}
    assert cache.statistics.unkept == {reason: 1}


def test_a_change_while_computing_is_not_kept(tiny, make_cache):
    model = tiny.model()
    cache = make_cache(model)
    ids = tiny.ids(70)
    past = cache.begin(ids)
    tiny.answer(model, ids, past_key_values=past)
    _load_state(model)
    assert cache.keep() == 0
    assert cache.statistics.unkept == {"weights": 1}


def test_every_byte_of_the_weights_is_in_the_name(tiny, make_cache):
    """One element that is in no sample: another namespace, unless a revision was given."""
    import torch

    def edited() -> object:
        model = tiny.model(num_hidden_layers=1, hidden_size=256, head_dim=16)
        with torch.no_grad():
            model.model.embed_tokens.weight.view(-1)[76_001] += 1.0
        return model

    plain = tiny.model(num_hidden_layers=1, hidden_size=256, head_dim=16)
    ids = tiny.ids(40)
    one = make_cache(plain)
    _use(tiny, one, ids)
    assert _use(tiny, make_cache(edited(), address=one.address), ids) == 0
    named = make_cache(plain, address=one.address, weights_revision="r1")
    _use(tiny, named, ids)
    assert _use(tiny, make_cache(plain, address=one.address, weights_revision="r2"), ids) == 0


# -- a name that other engines know ------------------------------------------------------------


@pytest.fixture
def saved(tiny, tmp_path):
    """A function that loads a model from files that it was saved to."""
    from transformers import AutoModelForCausalLM

    tiny.model().save_pretrained(tmp_path / "m")

    def load(**options: object):
        return AutoModelForCausalLM.from_pretrained(tmp_path / "m", **options).eval()

    return load


def test_a_named_model_is_named_as_other_engines_name_it(tiny, saved, make_cache):
    """What a namespace says is what vLLM and SGLang say: tests/sglang has them read its blocks."""
    from kvstrata.connectors.identity import ModelIdentity, engine_namespace, weights_revision

    model = saved()
    cache = make_cache(model, model_name="m")
    session = cache.binding.prefixes.session
    files = weights_revision(model.config._name_or_path, None, None, setting="x")
    theirs = ModelIdentity("vllm", "m", files, saved().config.to_dict(), "float32")
    assert session.namespace == engine_namespace(theirs, session.layout)
    assert _use(tiny, cache, tiny.ids(70)) == 0
    again = make_cache(saved(attn_implementation="eager"), model_name="m", address=cache.address)
    assert _use(tiny, again, tiny.ids(70)) == 64, "attention of another kind is the same function"
    own = make_cache(saved(), address=cache.address)
    assert _use(tiny, own, tiny.ids(70)) == 0, "without a name it is alone"


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {"model_name": "other"}),
        ({}, {"model_name": "m", "weights_revision": "r1"}),
        ({"rms_norm_eps": 1e-3}, {"model_name": "m"}),
        ({"attn_logit_softcapping": 5.0}, {"model_name": "m"}),
    ],
    ids=["name", "revision", "epsilon", "softcap"],
)
def test_what_differs_in_a_named_model_never_hits(tiny, saved, make_cache, options, settings):
    one = make_cache(saved(), model_name="m")
    ids = tiny.ids(70)
    _use(tiny, one, ids)
    other = saved()
    other.config.update(options)
    assert _use(tiny, make_cache(other, address=one.address, **settings), ids) == 0


def test_a_model_that_was_changed_since_it_was_loaded_has_no_such_name(tiny, saved, make_cache):
    import torch

    from kvstrata.core.errors import ConfigError

    model = saved()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(ConfigError, match=r"up_proj.*not what the model's files say"):
        make_cache(model, model_name="m", weights_revision="r1")
    with pytest.raises(ConfigError, match="no weight could be compared"):
        make_cache(tiny.model(), model_name="m")


def test_one_changed_row_is_seen_where_the_files_name_the_weights(saved, make_cache):
    import torch

    from kvstrata.core.errors import ConfigError

    model = saved()
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 1] += 1.0
    with pytest.raises(ConfigError, match=r"embed_tokens.*not what the model's files say"):
        make_cache(model, model_name="m")


def test_a_model_of_the_hub_is_compared_with_its_commits_files(
    saved, make_cache, tmp_path, monkeypatch
):
    import shutil

    import torch

    from kvstrata.connectors.transformers import weightfiles
    from kvstrata.core.errors import ConfigError

    model, commit = saved(), "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--o--m" / "snapshots" / commit
    shutil.copytree(model.config._name_or_path, snapshot)
    look = weightfiles.try_to_load_from_cache
    monkeypatch.setattr(
        weightfiles,
        "try_to_load_from_cache",
        lambda *names, **options: look(*names, cache_dir=tmp_path / "hub", **options),
    )
    model.config._name_or_path, model.config._commit_hash = "o/m", commit
    make_cache(model, model_name="m")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    with pytest.raises(ConfigError, match="not what the model's files say"):
        make_cache(model, model_name="m")
