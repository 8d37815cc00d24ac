"""What fails costs time, never an answer; and where an answer would be wrong, the engine stops."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from kvstrata.core.errors import LayoutError, TransferError

pytestmark = pytest.mark.transformers

PROMPT = [(n * n * 7 + n * 3) % 57 + 3 for n in range(42)]
SHORT = {"call_timeout_s": 0.3, "retry_interval_s": 0.01}


def until(check, timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_daemon_killed_between_offer_and_load(start, sim, world, serve):
    daemon = serve()
    settings = SHORT | {"address": daemon.address}
    start(manager="v2", settings=settings).run(sim.Request(1, PROMPT, 3))
    engine = start(manager="v2", settings=settings, seed=1, reuse=False)
    engine.defer = {1}
    request = engine.submit(sim.Request(1, PROMPT, 3))
    engine.step()
    daemon.kill()
    other = sim.Request(2, PROMPT, 3)
    engine.submit(other)
    while other.state != "done":
        engine.step()
    assert other.external == 0
    assert other.answer == world.answer(PROMPT, 3)
    # A daemon that is back is not spoken to while the offer is open: it would end what it holds.
    daemon.start()
    time.sleep(0.05)
    late = engine.submit(sim.Request(3, PROMPT, 3))
    while late.state != "done":
        engine.step()
    assert late.external == 0
    assert engine.scheduler.daemon_pid == 0
    engine.defer = set()
    engine.run()
    assert request.external == 40, "what was promised is in memory that is mapped here"
    assert request.answer == world.answer(PROMPT, 3)
    until(engine.scheduler._keeper._line.ready)
    for number, found in ((4, 0), (5, 40)):
        again = sim.Request(number, PROMPT, 3)
        engine.run(again)
        assert again.external == found, "the new daemon knows nothing, then what it was given"


def test_a_daemon_that_was_killed_and_comes_back(start, sim, world, serve):
    daemon = serve()
    engine = start(settings=SHORT | {"address": daemon.address}, reuse=False)
    engine.run(sim.Request(1, PROMPT, 3))
    daemon.kill()
    for number in range(2, 5):
        request = sim.Request(number, PROMPT, 3)
        engine.run(request)
        assert request.external == 0
        assert request.answer == world.answer(PROMPT, 3)
    daemon.start()
    until(engine.scheduler._keeper._line.ready)
    engine.run(sim.Request(5, PROMPT, 3))
    warm = sim.Request(6, PROMPT, 3)
    engine.run(warm)
    assert warm.external == 40
    assert warm.answer == world.answer(PROMPT, 3)


def test_a_private_daemon_is_started_anew(start, sim):
    engine = start(settings={"tiers": "host:1MiB", "retry_interval_s": 0.01}, reuse=False)
    engine.run(sim.Request(1, PROMPT, 3))
    first = engine.scheduler.daemon_pid
    os.kill(first, signal.SIGKILL)
    lost = sim.Request(4, PROMPT, 3)
    engine.run(lost)
    assert lost.external == 0
    until(engine.scheduler._keeper._line.ready)
    assert engine.scheduler.daemon_pid not in {0, first}
    engine.run(sim.Request(2, PROMPT, 3))
    warm = sim.Request(3, PROMPT, 3)
    engine.run(warm)
    assert warm.external == 40


def test_a_daemon_that_stalls_holds_the_engine_up_for_its_timeout_alone(start, sim, world, serve):
    daemon = serve()
    engine = start(settings=SHORT | {"address": daemon.address}, reuse=False)
    engine.run(sim.Request(1, PROMPT, 3))
    daemon.signal(signal.SIGSTOP)
    began = time.monotonic()
    for number in range(2, 6):
        request = sim.Request(number, PROMPT, 3)
        engine.run(request)
        assert request.answer == world.answer(PROMPT, 3)
    took = time.monotonic() - began
    daemon.signal(signal.SIGCONT)
    assert took < 5, "one call waited, the others knew"
    until(engine.scheduler._keeper._line.ready)
    warm = sim.Request(7, PROMPT, 3)
    engine.run(warm)
    assert warm.external == 40
    assert warm.answer == world.answer(PROMPT, 3)


@pytest.mark.parametrize("wait_s", [0, 2])
def test_blocks_on_disk_are_waited_for_as_long_as_was_said(start, sim, world, tmp_path, wait_s):
    settings = {"tiers": f"host:1MiB,disk:{tmp_path}/kv:8MiB"}
    cold = start(settings=settings)
    cold.run(sim.Request(1, PROMPT, 3))
    cold.close()  # an orderly end writes out what the host holds
    late = start(settings=settings | {"staging_wait_s": wait_s}, reuse=False)
    first = sim.Request(1, PROMPT, 3)
    late.run(first)
    assert first.answer == world.answer(PROMPT, 3)
    if wait_s:
        assert first.external == 40
    time.sleep(0.1)
    second = sim.Request(2, PROMPT, 3)
    late.run(second)
    assert second.external == 40
    assert second.answer == world.answer(PROMPT, 3)


@pytest.mark.parametrize("manager", ["v1", "v2"])
def test_a_slot_that_changes_before_its_load_stops_the_engine(start, sim, manager):
    start(manager=manager).run(sim.Request(1, PROMPT, 3))
    engine = start(manager=manager, seed=1)
    request = sim.Request(1, PROMPT, 3)
    tokens, _ = engine.scheduler.get_num_new_matched_tokens(request, 0)
    assert tokens == 40
    offer = engine.scheduler._keeper._requests[1].offer
    mapped = engine.scheduler._desk.mapped(engine.scheduler._keeper.session.epoch)
    generations = mapped.arena.generations
    generations[offer.slots[3]] += 1
    try:
        pages = list(range(11))
        engine.scheduler.update_state_after_alloc(request, pages)
        before = engine.pool.memory[0].clone()
        data = sim.RequestData(1, request.tokens, pages, 0, 2)
        output = sim.SchedulerOutput([data] if manager == "v2" else [])
        engine.worker.bind_connector_meta(engine.scheduler.build_connector_meta(output))

        def load() -> None:
            engine.worker.start_load_kv(None)
            until(lambda: engine.worker.get_finished([], [1]) is None)

        with pytest.raises(TransferError, match="would be a wrong answer"):
            load()
        assert bool((engine.pool.memory[0] == before).all())
    finally:
        generations[offer.slots[3]] -= 1


def test_a_slot_that_changed_before_the_offer_is_not_offered(start, sim, world):
    cold = start()
    cold.run(sim.Request(1, PROMPT, 3))
    engine = start(seed=1)
    keeper = engine.scheduler._keeper
    acquire = keeper.session.acquire

    def stale(name, hashes, windows=(0,)):
        import msgspec

        found = acquire(name, hashes, windows)
        wrong = [*found.generations[:2], found.generations[2] - 1, *found.generations[3:]]
        return msgspec.structs.replace(found, generations=wrong)

    keeper.session.acquire = stale
    request = sim.Request(1, PROMPT, 3)
    engine.run(request)
    assert request.external == 16
    assert request.answer == world.answer(PROMPT, 3)


def test_pages_that_change_between_load_and_schedule_stop_the_engine(start, sim):
    start().run(sim.Request(1, PROMPT, 3))
    engine = start(seed=1)
    request = engine.submit(sim.Request(1, PROMPT, 3))
    engine.step()
    assert request.state == "loading"
    request.pages[0][2] = next(n for n in engine.pages.free[0] if n not in request.pages[0])
    with pytest.raises(TransferError, match="changed after their load"):
        until(lambda: engine.step() and False)


@pytest.mark.parametrize(
    ("field", "value"), [("new_tokens", [5] * 42), ("cache_salt", "somebody else's")]
)
def test_a_loaded_request_that_is_another_stops_the_engine(start, sim, field, value):
    start(manager="v2").run(sim.Request(1, PROMPT, 3))
    engine = start(manager="v2", seed=1)
    request = sim.Request(1, PROMPT, 3)
    assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (40, False)
    data = sim.RequestData(1, list(PROMPT), list(range(11)), 0, 2)
    setattr(data, field, value)
    plan = engine.scheduler.build_connector_meta(sim.SchedulerOutput([data]))
    engine.worker.bind_connector_meta(plan)
    with pytest.raises(TransferError, match="would be a wrong answer"):
        engine.worker.start_load_kv(None)


def test_v1_with_fewer_pages_than_it_was_offered_stops(start, sim):
    start().run(sim.Request(1, PROMPT, 3))
    engine = start(seed=1)
    request = sim.Request(1, PROMPT, 3)
    assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (40, True)
    engine.scheduler.update_state_after_alloc(request, [1, 2, 3])
    engine.worker.bind_connector_meta(engine.scheduler.build_connector_meta(sim.SchedulerOutput()))
    with pytest.raises(TransferError, match="too few pages"):
        engine.worker.start_load_kv(None)


def test_a_request_that_the_engine_never_announced_is_not_saved(start, sim):
    engine = start(manager="v2")
    request = sim.Request(1, PROMPT, 3)
    engine.scheduler.get_num_new_matched_tokens(request, 0)
    data = sim.RequestData(1, [5], [7], 40, 1)
    plan = engine.scheduler.build_connector_meta(sim.SchedulerOutput([], [data]))
    assert not plan.saves
    assert engine.scheduler.statistics.unserved == {"not announced as new": 1}


def test_saves_that_do_not_fit_the_queue_are_given_up(start, sim, world, monkeypatch):
    from kvstrata.connectors.trtllm import mover

    monkeypatch.setattr(mover, "SAVES_QUEUED_MAX", 1)
    engine = start(step_tokens=8, reuse=False)
    requests = [engine.submit(sim.Request(n, PROMPT[n:], 3)) for n in range(3)]
    with engine.worker._mover._changed:
        for _ in range(3):
            engine.step()
    engine.run()
    assert engine.scheduler.statistics.unsaved_blocks > 0
    for request in requests:
        assert request.answer == world.answer(request.prompt, 3)
    again = sim.Request(9, PROMPT, 3)
    engine.run(again)
    assert again.answer == world.answer(PROMPT, 3)


def test_a_step_that_never_computed_saves_nothing(start, sim):
    engine = start()
    request = sim.Request(1, PROMPT, 3)
    engine.scheduler.get_num_new_matched_tokens(request, 0)
    output = sim.SchedulerOutput([sim.RequestData(1, list(PROMPT), list(range(11)), 0, 42)])
    plan = engine.scheduler.build_connector_meta(output)
    assert len(plan.saves) == 1
    engine.worker.bind_connector_meta(plan)
    engine.worker.start_load_kv(None)
    engine.worker.bind_connector_meta(engine.scheduler.build_connector_meta(sim.SchedulerOutput()))
    engine.worker.wait_for_save(None)
    engine.worker.get_finished([], [])
    assert engine.scheduler.statistics.unsaved_blocks == 5
    assert engine.scheduler.statistics.saved_blocks == 0


def test_a_partly_used_page_is_not_offered_behind(start, sim):
    start().run(sim.Request(1, PROMPT, 3))
    engine = start(seed=1)
    assert engine.scheduler.get_num_new_matched_tokens(sim.Request(1, PROMPT, 3), 6) == (0, False)
    assert engine.scheduler.get_num_new_matched_tokens(sim.Request(2, PROMPT, 3), 12) == (28, True)
    assert engine.scheduler.get_num_new_matched_tokens(sim.Request(3, PROMPT, 3), 40) == (0, False)
    assert engine.scheduler.statistics.mid_page == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("multimodal_hashes", [[1] * 8]),
        ("prompt_embedding_table", object),
        ("is_dummy_request", True),
        ("cache_salt", 7),
        ("cache_salt", "\0trtllm-salt-id:5"),
    ],
)
def test_requests_whose_tokens_do_not_say_what_they_are(start, sim, name, value):
    engine = start()
    for number in range(2):
        request = sim.Request(number, PROMPT, 3)
        setattr(request, name, value)
        assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
        data = sim.RequestData(number, list(PROMPT), list(range(11)), 0, 42)
        assert not engine.scheduler.build_connector_meta(sim.SchedulerOutput([data])).saves
        assert engine.scheduler.request_finished(request, list(range(11))) is False
    assert sum(engine.scheduler.statistics.unserved.values()) == 2


def test_a_salt_that_is_known_by_its_number_only(start, sim):
    engine = start(reuse=False)
    found = []
    for number, salt_id in ((1, 5), (2, 5), (3, 6), (4, None)):
        request = sim.Request(number, PROMPT, 3)
        request.cache_salt, request.cache_salt_id = None, salt_id
        request.lora_task_id = 1 if salt_id is None else None  # so that it is nobody else's
        engine.run(request)
        found.append(request.external)
    assert found == [0, 40, 0, 0]


def test_the_canary_sees_regions_that_are_not_what_they_seem(start, sim, monkeypatch):
    honest = sim.Pool.layout

    def lying(pool):
        layout = honest(pool)
        first, *rest = layout.groups[0].regions
        rest[0].rows = first.rows
        return layout

    monkeypatch.setattr(sim.Pool, "layout", lying)
    with pytest.raises(LayoutError, match="canary: pages that were stored and loaded"):
        start(manager="v2", groups=2)


def test_the_canary_puts_back_what_the_pages_held(sim, start, monkeypatch):
    held = []
    make = sim.Pool.__init__

    def remember(pool, *arguments):
        make(pool, *arguments)
        held.append([each.clone() for each in pool.memory])

    monkeypatch.setattr(sim.Pool, "__init__", remember)
    engine = start(manager="v2", groups=2)
    for before, after in zip(held[0], engine.pool.memory, strict=True):
        assert bool((before == after).all())


def test_a_copying_thread_that_ends_stops_the_engine(start, sim, monkeypatch):
    start().run(sim.Request(1, PROMPT, 3))
    engine = start(seed=1)
    died: list = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    engine.worker._mover._pages = None  # no copy can end well or badly
    engine.submit(sim.Request(1, PROMPT, 3))
    with pytest.raises(TransferError, match="the copying thread has ended: AttributeError"):
        until(lambda: engine.step() and False)
    until(lambda: died)


def test_a_load_whose_pages_are_taken_away_is_never_begun(start, sim):
    start().run(sim.Request(1, PROMPT, 3))
    engine = start(seed=1)
    request = engine.submit(sim.Request(1, PROMPT, 3))
    with engine.worker._mover._changed:  # the copying thread takes no job
        engine.step()
        assert request.state == "loading"
        engine.scheduler.request_reset(request)
        before = engine.pool.memory[0].clone()
    until(lambda: not engine.scheduler._desk._open)
    assert bool((engine.pool.memory[0] == before).all()), "they are somebody else's by now"
    assert engine.worker.get_finished([], [1]) == ([], [1])
    assert not engine.scheduler._keeper._line._leases


def test_a_save_whose_pages_are_taken_away_before_it_ends_is_not_kept(start, sim):
    engine = start(manager="v2")
    request = sim.Request(1, PROMPT, 3)
    engine.scheduler.get_num_new_matched_tokens(request, 0)
    output = sim.SchedulerOutput([sim.RequestData(1, list(PROMPT), list(range(11)), 0, 42)])
    engine.worker.bind_connector_meta(engine.scheduler.build_connector_meta(output))
    engine.scheduler.request_reset(request)
    engine.worker.wait_for_save(None)
    until(lambda: engine.worker.get_finished([1], [])[0])
    assert engine.scheduler.statistics.unsaved_blocks == 5
    assert engine.scheduler.statistics.saved_blocks == 0
    again = sim.Request(2, PROMPT, 3)
    assert engine.scheduler.get_num_new_matched_tokens(again, 0) == (0, False)
