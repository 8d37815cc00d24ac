"""What the connector's halves know about adapters, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.engine


def asked(name="a", number=1, path="/one", **more):
    return SimpleNamespace(
        lora_name=name, lora_int_id=number, lora_path=path, load_inplace=False, **more
    )


@pytest.fixture
def known():
    from kvstrata.connectors.vllm.adapters import KnownAdapters

    return KnownAdapters()


def use(request, digest):
    from kvstrata.connectors.vllm.adapters import key_of
    from kvstrata.connectors.vllm.metadata import AdapterUse

    return AdapterUse(key_of(request), digest)


def told(request, digest):
    return {use(request, digest).key: digest}


def test_an_adapter_is_asked_about_until_the_worker_has_told(known):
    request = asked()
    assert known.digest(request) is None
    assert list(known.plan([]).values()) == [request]
    known.take(told(request, "d1"))
    assert known.digest(request) == "d1"
    assert known.plan([]) == {}
    assert list(known.plan([request]).values()) == [request], "in use, so looked at in each step"
    assert known.holds(use(request, "d1"))
    assert not known.holds(use(request, "d2"))


def test_a_worker_that_never_tells_is_not_waited_for(known):
    request = asked()
    assert known.digest(request) is None
    plans = 0
    while known.digest(request) is None:
        known.plan([])
        plans += 1
        assert plans < 1000
    assert known.digest(request) == ""


def test_other_weights_under_a_name_and_path_are_not_served_before_a_reset(known):
    request, twin = asked(), asked(number=2)
    other = asked("b", 3, "/two")
    for each, digest in ((request, "d1"), (twin, "d1"), (other, "d1")):
        known.digest(each)
        known.take(told(each, digest))
    known.take(told(twin, "d2"))
    for each in (request, twin, asked(number=9)):
        assert known.digest(each) == ""
    assert not known.holds(use(request, "d1"))
    assert not known.holds(use(twin, "d2"))
    known.take(told(twin, "d1"))
    assert known.digest(request) == "", "back again: vLLM's own cache has blocks of both"
    assert known.digest(other) == "d1"
    known.forget()
    assert known.digest(request) is None


def test_an_adapter_that_cannot_be_told_is_not_served(known):
    request = asked()
    known.digest(request)
    known.take(told(request, ""))
    assert known.digest(request) == ""


def test_an_adapter_that_is_loaded_in_each_step_is_not_served(known):
    request, other = asked(), asked(path="/two")
    for each in (request, other):
        known.digest(each)
        known.take(told(each, "d1"))
    changing = asked()
    changing.load_inplace = True
    assert known.digest(changing) == ""
    assert known.digest(request) == "", "vLLM's own cache may have blocks of other weights now"
    assert known.digest(other) == "d1"
    known.forget()
    assert known.digest(request) is None


def test_a_digest_tells_any_change_of_the_weights():
    import torch

    from kvstrata.connectors.vllm.adapters import weights_digest

    def layer(a, b, scaling=1.0):
        return SimpleNamespace(lora_a=a, lora_b=b, scaling=scaling)

    one, two = torch.ones(2, 3), torch.ones(3, 2)
    changed = one.clone()
    changed[1, 2] = 1.0000001
    states = [
        {"q": layer(one, two)},
        {"k": layer(one, two)},
        {"q": layer(changed, two)},
        {"q": layer(one, two, 2.0)},
        {"q": layer(one.to(torch.bfloat16), two)},
        {"q": layer(one.reshape(3, 2), two)},
        {"q": layer(None, two)},
        {"q": layer([one, None], [two, two], [1.0, None])},
        {"q": layer([None, one], [two, two], [1.0, None])},
        {"q": layer(one, two), "v": layer(one, two)},
    ]
    digests = [weights_digest(state, ["q", "v"]) for state in states]
    assert len(set(digests)) == len(states)
    assert weights_digest({"q": layer(one.t().clone().t(), two)}, ["v", "q"]) == digests[0]
    assert weights_digest(states[0], ["q"]) != digests[0], "others are not applied there"


def test_workers_that_saw_different_weights_have_seen_none():
    from kvstrata.connectors.vllm.metadata import StepReport

    key = use(asked(), "").key
    first, second = StepReport(adapters={key: "d1"}), StepReport(adapters={key: "d2"})
    assert first.aggregate(first).adapters == {key: "d1"}
    assert first.aggregate(second).adapters == {key: ""}
    assert first.aggregate(StepReport()).adapters == {key: ""}


def test_without_a_runner_nothing_can_be_told():
    from kvstrata.connectors.vllm.adapters import LoadedAdapters

    loaded = LoadedAdapters(None)
    request = asked()
    assert loaded.digests({use(request, "").key: request}) == {use(request, "").key: ""}
    assert loaded.current(None)
    assert not loaded.current(use(request, "d1"))
