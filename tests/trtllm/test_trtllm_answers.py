"""Same answers with and without the connector, in every order in which an engine may call it."""

from __future__ import annotations

import contextlib
import time

import pytest

pytestmark = pytest.mark.transformers

KINDS = [
    pytest.param({"manager": "v1"}, id="v1"),
    pytest.param({"manager": "v1", "step_tokens": 7}, id="v1-sliced"),
    pytest.param({"manager": "v2"}, id="v2"),
    pytest.param({"manager": "v2", "step_tokens": 7}, id="v2-sliced"),
    pytest.param({"manager": "v2", "groups": 2, "step_tokens": 9}, id="v2-groups"),
]
BACKGROUND = [pytest.param("true", id="beside"), pytest.param("false", id="within")]


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(seed * 17 + n * n * 7 + n * 3) % 57 + 3 for n in range(length)]


def copies_held(engine):
    """While this is open the copying thread takes no further job: as slow as a load can be."""
    return engine.worker._mover._changed


def assert_nothing_is_left(engine) -> None:
    engine.scheduler._keeper._settle()
    assert not engine.pages.users, "pages are still somebody's"
    assert not engine.scheduler._keeper._line._leases
    assert not engine.scheduler._desk._open
    assert not engine.scheduler._desk._loads
    assert not engine.scheduler._keeper._requests


@pytest.mark.parametrize("background", BACKGROUND)
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_engine_goes_on_where_another_ended(start, sim, world, kind, background):
    settings = {"background": background}
    cold = start(**kind, settings=settings)
    first = sim.Request(1, prompt(37), 5)
    cold.run(first)
    assert first.external == 0
    assert first.answer == world.answer(first.prompt, 5)
    cold.close()
    warm = start(**kind, settings=settings, seed=1)
    again = sim.Request(1, prompt(37), 5)
    longer = sim.Request(2, first.tokens + prompt(9, seed=3), 5)
    warm.run(again)
    warm.run(longer)
    assert again.external == 32
    assert again.answer == first.answer
    assert longer.answer == world.answer(longer.prompt, 5)
    assert longer.external + len(longer.local) * 4 == 40, "its own blocks are saved as it answers"


@pytest.mark.parametrize("kind", KINDS)
def test_salts_and_adapters_share_nothing(start, sim, world, kind):
    named = {"adapters": '{"1": "commit-a", "2": "commit-b"}'}
    cold = start(**kind, settings=named)
    cold.run(sim.Request(1, prompt(30), 2, salt="a"), sim.Request(2, prompt(30), 2, adapter=1))
    cold.close()
    warm = start(**kind, settings=named)
    others = [
        sim.Request(1, prompt(30), 2),
        sim.Request(2, prompt(30), 2, salt="b"),
        sim.Request(3, prompt(30), 2, adapter=2),
        sim.Request(4, prompt(30), 2, salt="a", adapter=1),
        sim.Request(5, prompt(30), 2, salt="1"),
    ]
    same = [sim.Request(6, prompt(30), 2, salt="a"), sim.Request(7, prompt(30), 2, adapter=1)]
    warm.run(*others, *same)
    assert [each.external for each in others] == [0] * 5
    assert [each.external for each in same] == [24, 24]
    for each in others + same:
        assert each.answer == world.answer(each.prompt, 2, each.lora_task_id)


@pytest.mark.parametrize("kind", KINDS)
def test_tenants_share_nothing(start, sim, world, kind):
    found = {}
    for name in ("a", "b", "", "a"):
        engine = start(**kind, settings={"tenant": name})
        request = sim.Request(1, prompt(30), 2)
        engine.run(request)
        assert request.answer == world.answer(request.prompt, 2)
        found.setdefault(name, []).append(request.external)
        engine.close()
    assert found == {"a": [0, 24], "b": [0], "": [0]}


@pytest.mark.parametrize(
    ("weights", "changes"),
    [
        ("another commit", {}),
        (None, {"dtype": "float32"}),
        (None, {"cache": {"dtype": "fp8"}}),
        (None, {"quant_config": {"quant_algo": "FP8"}}),
        (None, {"attn_backend": "FLASHINFER"}),
        (None, {"model_kwargs": {"rms_norm_eps": 1e-3}}),
    ],
    ids=["revision", "type", "kept-type", "quantised", "attention", "configuration"],
)
def test_what_differs_never_hits(start, sim, world, weights, changes):
    """The simulated model is the same: only what the engine is told of it differs."""
    for turn, (revision, given) in enumerate(
        [(None, {}), (None, {}), (weights, changes), (weights, changes)]
    ):
        engine = start(weights=revision, changes=given, seed=turn)
        request = sim.Request(1, prompt(30), 2)
        engine.run(request)
        assert request.external == (0, 24, 0, 24)[turn]
        assert request.answer == world.answer(request.prompt, 2)
        engine.close()


def test_an_adapter_without_a_name_is_found_in_this_process_alone(start, sim, monkeypatch):
    from kvstrata.connectors.trtllm import requests

    cold = start()
    cold.run(sim.Request(1, prompt(30), 2, adapter=1))
    cold.close()
    warm = start(seed=1)
    again = sim.Request(1, prompt(30), 2, adapter=1)
    warm.run(again)
    assert again.external == 24
    warm.close()
    monkeypatch.setattr(requests, "_RUN", b"another process")
    late = start(seed=2)
    other = sim.Request(1, prompt(30), 2, adapter=1)
    late.run(other)
    assert other.external == 0


@pytest.mark.parametrize("kind", KINDS)
def test_worker_methods_called_again_with_old_metadata_change_nothing(start, sim, world, kind):
    for seed in range(2):
        engine = start(**kind, seed=seed, pages=24)
        engine.repeat = True
        for number in range(6):
            request = sim.Request(number, prompt(30, seed=number % 3), 3)
            engine.run(request)
            assert request.answer == world.answer(request.prompt, 3)
        engine.close()
    assert engine.scheduler.statistics.offered_tokens > 0


def test_a_single_answered_token_is_enough_to_save_the_prompt(start, sim):
    for kind, found in (({"manager": "v1"}, 40), ({"manager": "v2"}, 40)):
        cold = start(**kind)
        cold.run(sim.Request(1, prompt(25), 1))
        # The second prompt's end is told too low, since what was loaded is left out.
        cold.pages.known.clear()
        cold.run(sim.Request(2, prompt(25) + prompt(16, seed=2), 1))
        cold.close()
        warm = start(**kind, seed=1)
        again = sim.Request(1, prompt(25) + prompt(16, seed=2), 1)
        warm.run(again)
        assert again.external == found


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("groups", [1, 2])
def test_an_offer_that_is_taken_in_part(start, sim, world, share, groups):
    kind = {"manager": "v2", "groups": groups, "step_tokens": 6}
    start(**kind).run(sim.Request(1, prompt(42), 3))
    warm = start(**kind, seed=1)
    warm.honour = share
    again = sim.Request(1, prompt(42), 3)
    warm.run(again)
    assert again.external == int(40 * share) // 4 * 4
    assert again.answer == world.answer(again.prompt, 3)
    assert warm.scheduler.statistics.called_off == 1
    assert_nothing_is_left(warm)


def test_an_offer_that_waits_and_is_called_off_or_taken_late(start, sim, world):
    start(manager="v2").run(sim.Request(1, prompt(42), 3))
    warm = start(manager="v2", seed=1)
    warm.defer = {1, 2}
    first, second = sim.Request(1, prompt(42), 3), sim.Request(2, prompt(42), 3)
    warm.submit(first)
    warm.submit(second)
    for _ in range(3):
        warm.step()
    assert warm.scheduler._keeper._line._leases, "the blocks of both are held"
    warm.cancel(first)
    warm.defer = set()
    warm.run()
    assert second.external == 40
    assert second.answer == world.answer(second.prompt, 3)
    assert_nothing_is_left(warm)


@pytest.mark.parametrize("when", ["loading", "prefill", "answering"])
def test_a_cancelled_request(start, sim, world, when):
    start().run(sim.Request(1, prompt(42), 3))
    warm = start(seed=1, step_tokens=5)
    request = sim.Request(1, prompt(42) + prompt(20, seed=4), 8)
    warm.submit(request)
    if when == "loading":
        with copies_held(warm):
            warm.step()
            assert request.state == "loading"
            warm.cancel(request)
            assert request.state == "saving", "its pages are still written to"
            warm.step()
            assert request.state == "saving"
    else:
        wanted = "context" if when == "prefill" else "generating"
        while not (request.state == wanted and request.position > 44):
            warm.step()
        warm.cancel(request)
    again = sim.Request(2, request.prompt, 8)
    warm.run(again)
    assert again.answer == world.answer(again.prompt, 8)
    assert_nothing_is_left(warm)


@pytest.mark.parametrize("reset", [False, True], ids=["finish", "reset"])
@pytest.mark.parametrize("held", [False, True])
def test_a_preempted_request_starts_anew(start, sim, world, reset, held):
    engine = start(manager="v2", groups=2, step_tokens=6, pages=30, reuse=False)
    request = engine.submit(sim.Request(1, prompt(40), 6))
    while request.position < 30:
        engine.step()
    with copies_held(engine) if held else contextlib.nullcontext():
        engine.step()
        engine.preempt(request, reset=reset)
        # Whoever gets its pages now writes to them.
        engine.submit(sim.Request(2, prompt(30, seed=5), 2))
        engine.step()
        engine.step()
    engine.run()
    assert request.answer == world.answer(request.prompt, 6)
    engine.close()
    for seed in range(2):  # nothing of the other one's was stored under its name
        warm = start(manager="v2", groups=2, seed=seed)
        for number, length, other in ((1, 40, 0), (2, 30, 5)):
            again = sim.Request(number, prompt(length, seed=other), 6)
            warm.run(again)
            assert again.answer == world.answer(again.prompt, 6)
        warm.close()


def test_a_copy_that_ended_after_its_pages_were_given_away_is_not_kept(start, sim, world):
    """The engine tells of a reset when others have the pages; the copy has read theirs by then."""
    engine = start(manager="v2", step_tokens=6, pages=30, reuse=False)
    request = engine.submit(sim.Request(1, prompt(40), 6))
    while request.position < 30:
        engine.step()
    engine.scheduler._keeper._settle()
    with copies_held(engine):
        engine.step()
        engine._drop_pages(request)  # and noise is in them
    until = time.monotonic() + 10
    while engine.scheduler._desk._open and time.monotonic() < until:
        time.sleep(0.001)
    unsaved = engine.scheduler.statistics.unsaved_blocks
    engine.scheduler.request_reset(request)
    assert engine.scheduler.statistics.unsaved_blocks > unsaved
    engine.told.pop(1)
    request.start_anew()
    engine.run()
    assert request.answer == world.answer(request.prompt, 6)
    engine.close()


@pytest.mark.parametrize("bad", [-1, 10**6, 40])
def test_a_page_that_does_not_exist_is_never_touched(start, sim, world, bad):
    cold = start(manager="v2", pages=40)
    cold.bad = {(1, 5): bad}
    first = sim.Request(1, prompt(41), 3)
    cold.run(first)
    assert first.answer == world.answer(first.prompt, 3)
    assert cold.scheduler.statistics.bad_pages >= 1
    assert cold.scheduler.statistics.saved_blocks == 2, "what hangs on a missing block is useless"
    cold.close()
    warm = start(manager="v2", pages=40, seed=1)
    again = sim.Request(1, prompt(41), 3)
    warm.run(again)
    assert again.external == 16
    assert again.answer == world.answer(again.prompt, 3)


@pytest.mark.parametrize("manager", ["v1", "v2"])
def test_a_load_writes_to_no_page_but_its_own(start, sim, manager):
    import torch

    start(manager=manager).run(sim.Request(1, prompt(42), 3))
    warm = start(manager=manager, seed=1)
    request = sim.Request(1, prompt(42), 3)
    assert warm.scheduler.get_num_new_matched_tokens(request, 0)[0] == 40
    before = warm.pool.memory[0].clone()
    told = [3, -1, 7, 10**6, 9, 40, 11, 12, -5, 14]
    warm.scheduler.update_state_after_alloc(request, told)
    data = sim.RequestData(1, request.tokens, told, 0, 2)
    output = sim.SchedulerOutput([data] if manager == "v2" else [])
    warm.worker.bind_connector_meta(warm.scheduler.build_connector_meta(output))
    warm.worker.start_load_kv(None)
    while manager == "v1" and not warm.worker.get_finished([], [1])[1]:
        time.sleep(0.001)
    changed = (warm.pool.memory[0] != before).flatten(1).any(dim=1)
    assert torch.nonzero(changed).flatten().tolist() == [3, 7, 9, 11, 12, 14]
    assert warm.scheduler.statistics.bad_pages == 4


def test_two_requests_with_one_prompt_at_once(start, sim, world):
    for seed in range(2):
        engine = start(seed=seed, step_tokens=11, pages=80)
        both = [sim.Request(n, prompt(38), 3) for n in range(4)]
        engine.run(*both)
        assert {tuple(each.answer) for each in both} == {tuple(world.answer(prompt(38), 3))}
        engine.close()
    assert all(each.external for each in both)


def test_a_store_that_is_too_small_evicts_and_throttles(start, sim, world):
    engine = start(settings={"tiers": "host:80KiB"}, reuse=False)
    for number in range(30):
        request = sim.Request(number, prompt(30 + number % 11, seed=number % 7), 2)
        engine.run(request)
        assert request.answer == world.answer(request.prompt, 2)
    assert engine.scheduler.statistics.saved_blocks > 30
    assert engine.scheduler.statistics.offered_tokens > 0
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_answered_token_is_not_in_the_pages_yet(start, sim, world, kind):
    cold = start(**kind)
    first = sim.Request(1, prompt(29), 3)
    cold.run(first)
    assert len(first.tokens) % 8 == 0
    cold.close()
    warm = start(**kind, seed=1)
    longer = sim.Request(2, first.tokens + prompt(6, seed=3), 3)
    warm.run(longer)
    assert longer.external == 24
    assert longer.answer == world.answer(longer.prompt, 3)


def test_an_offer_that_is_called_off_holds_nothing_from_then_on(start, sim):
    start(manager="v2").run(sim.Request(1, prompt(42), 3))
    warm = start(manager="v2", seed=1)
    request = sim.Request(1, prompt(42), 3)
    assert warm.scheduler.get_num_new_matched_tokens(request, 0) == (40, False)
    warm.scheduler.cancel_load(request, 0, 40)
    assert not warm.scheduler._keeper._line._leases
    data = sim.RequestData(1, list(request.tokens), list(range(11)), 0, 42)
    assert not warm.scheduler.build_connector_meta(sim.SchedulerOutput([data])).loads
