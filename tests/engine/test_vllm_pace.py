"""How often the daemon is asked for what it is still bringing."""

from __future__ import annotations

import time

import pytest

pytestmark = pytest.mark.engine


@pytest.fixture
def pace():
    from kvstrata.connectors.vllm.pace import Pace

    return Pace()


def spent(call, times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - began


def test_it_rests_once_a_step_where_the_last_ones_computed_nothing(pace) -> None:
    assert spent(pace.rest, 200) < 0.2, "nobody knows yet that it is idle"

    def idle_step() -> None:
        pace.planned(computes=False)
        pace.rest()
        pace.rest()

    assert spent(idle_step, 101) >= 0.2

    def busy_step() -> None:
        pace.planned(computes=True)
        pace.rest()
        pace.planned(computes=False)
        pace.rest()

    assert spent(busy_step, 200) < 0.2, "another batch is under way"


def test_a_request_that_waits_asks_the_daemon_now_and_then(engine_on, prompts, reference, tmp_path):
    extra = {"tiers": f"host:64MiB,disk:{tmp_path / 'kv'}:64MiB"}
    with engine_on(extra) as engine:
        engine.ask(prompts)
        engine.wait_idle()
    with engine_on(extra) as engine:
        session = engine.connector._scheduler.session
        asked, lookup = [], session.lookup

        def noting(*given, **named):
            found = lookup(*given, **named)
            asked.append((given[0], time.monotonic(), found.pending))
            return found

        session.lookup = noting
        answers = engine.ask(prompts)
        assert [each.tokens for each in answers] == reference
        assert sum(each.tokens_from["disk"] for each in answers)
    waits = {}
    for name, at, pending in asked:
        if name in waits:
            assert at - waits[name] >= 0.002, "asked again too soon"
        if pending:
            waits[name] = at
    assert waits, "nothing was waited for, so nothing was shown"
