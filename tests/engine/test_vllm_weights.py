"""Weights that are loaded into a running engine: blocks of the old ones are served to nobody."""

from __future__ import annotations

import copy
import logging

import pytest

pytestmark = pytest.mark.engine


@pytest.fixture
def other_model(make_llama, tmp_path):
    return make_llama(tmp_path / "other", seed=1)


def test_new_weights_are_noticed_and_nothing_is_served_before_a_reset(
    engine_on, tiny_model, other_model, prompts, reference, tmp_path, caplog
):
    extra = {"tiers": f"host:64MiB,disk:{tmp_path / 'kv'}:64MiB"}
    with engine_on(model=other_model) as engine:
        renewed = [answer.tokens for answer in engine.ask(prompts)]
    assert renewed[0] != reference[0]

    def ask():
        engine.forget()
        answers = engine.ask(prompts)
        return [answer.tokens for answer in answers], sum(
            sum(answer.tokens_from.values()) for answer in answers
        )

    with engine_on(extra) as engine:
        assert ask() == (reference, 0)
        assert ask() == (reference, 448)
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other_model)})
        stored = engine.counters()["stored_blocks"]
        with caplog.at_level(logging.WARNING, "kvstrata.vllm"):
            assert ask() == (renewed, 0), "what was promised before it was noticed did not arrive"
        assert "the model's weights have changed" in caplog.text
        assert ask() == (renewed, 0), "neither loaded nor saved"
        assert engine.counters()["stored_blocks"] == stored
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        ask()  # the first look after a reset: names become others
        assert ask() == (renewed, 0)
        assert ask() == (renewed, 448)
        # Reset at once after the change, as the guide says: nothing is noticed in between.
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tiny_model)})
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        assert ask() == (reference, 0)
        assert ask() == (reference, 0)
        assert ask() == (reference, 448)
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other_model)})
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        ask()
        assert ask()[0] == renewed
        engine.wait_idle()
    # On disk are blocks of weights that no file has: an engine on the files must not find them.
    with engine_on(extra) as engine:
        assert ask() == (reference, 0)


def test_a_reset_without_new_weights_changes_no_name(engine_on, prompts):
    with engine_on({"tiers": "host:64MiB"}) as engine:
        engine.ask(prompts)
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        assert sum(answer.cached for answer in engine.ask(prompts)) == 0
        engine.forget()
        assert [answer.cached for answer in engine.ask(prompts)] == [64, 128, 256, 0]


def test_a_reset_while_a_request_runs_leaves_what_is_spoiled(engine_on, other_model, prompts):
    """vLLM calls it although it could not forget its own blocks, and says so to its caller."""
    from vllm import SamplingParams

    with engine_on({"tiers": "host:64MiB"}) as engine:
        engine.ask(prompts)
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other_model)})
        engine.ask(prompts)
        scheduler, core = engine.connector._scheduler, engine.llm.llm_engine
        assert scheduler._weights_changed
        sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
        core.add_request("long", {"prompt_token_ids": prompts[0]}, sampling)
        core.step()
        assert not engine.llm.reset_prefix_cache(reset_connector=True)
        assert scheduler._weights_changed
        while core.has_unfinished_requests():
            core.step()
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        assert not scheduler._weights_changed


def test_what_a_step_without_work_saw_is_told():
    import torch

    from kvstrata.connectors.vllm.metadata import StepPlan, WeightsReport
    from kvstrata.connectors.vllm.weights import WeightsWatch
    from kvstrata.connectors.vllm.worker import WorkerHalf
    from kvstrata.layout import GroupedCache, LayerGroup, PagedCache

    cache = GroupedCache((LayerGroup(PagedCache(1, 1, 32, 8, "float32"), (0,)),))
    half, parameter = WorkerHalf(cache, cache.block_layout(64)), torch.nn.Parameter(torch.zeros(4))
    half.weights = WeightsWatch(model_of(parameter))
    parameter.data += 1.0
    half.load(StepPlan(resets=1))
    assert half.take_report().weights == WeightsReport.RENEWED
    half.load(StepPlan(resets=1, renewals=1))
    assert half.take_report() is None


def model_of(*parameters):
    """A model with parameters, a part with one more, and a `load_weights` that changes nothing."""
    import torch

    model = torch.nn.Module()
    model.kept = torch.nn.ParameterList(parameters)
    model.part = torch.nn.Linear(2, 2, bias=False)
    model.load_weights = set
    return model


def replaced_where_it_lay(model):
    """Another parameter at the same address, never written to: only its identity is new."""
    import torch

    model.kept[0] = torch.nn.Parameter(model.kept[0].data)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.kept[1].data[4].fill_(7.0),
        lambda model: model.kept[2].data.mul_(1.001),
        lambda model: setattr(model.kept[0], "data", model.kept[0].data.clone()),
        lambda model: model.load_weights(["a"]),
        replaced_where_it_lay,
        lambda model: setattr(model, "part", copy.deepcopy(model.part)),
    ],
    ids=["one row", "in place", "elsewhere", "load_weights", "replaced", "part replaced"],
)
def test_what_is_noticed(change):
    import torch

    from kvstrata.connectors.vllm.metadata import LoadJob, PageCopy, StepPlan, WeightsReport
    from kvstrata.connectors.vllm.weights import WeightsWatch

    model = model_of(
        torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16)),
        torch.nn.Parameter(torch.zeros(8, 32)),
        torch.nn.Parameter(torch.rand(4, 4)),
        torch.nn.Parameter(torch.empty(0)),
    )
    watch = WeightsWatch(model)
    job = [LoadJob("r", 1, PageCopy([], [], []), [])]
    assert watch.check(StepPlan(loads=job)) == WeightsReport.SAME
    change(model)
    assert watch.check(StepPlan()) == WeightsReport.SAME, (
        "it looks only if there is something to do"
    )
    assert watch.check(StepPlan(loads=job)) == WeightsReport.CHANGED
    assert not watch.allows(StepPlan(loads=job))
    assert watch.check(StepPlan(saves=job)) == WeightsReport.SAME, "it has said so"
    assert not watch.allows(StepPlan(saves=job))
    assert watch.check(StepPlan(resets=1)) == WeightsReport.RENEWED
    assert not watch.allows(StepPlan(resets=1)), "its names are of before"
    assert watch.allows(StepPlan(resets=1, renewals=1))
    assert watch.check(StepPlan(resets=1, renewals=1, loads=job)) == WeightsReport.SAME
    assert watch.check(StepPlan(resets=2, renewals=2)) == WeightsReport.SAME
    assert watch.allows(StepPlan(resets=2, renewals=2)), "another worker had seen a change"
