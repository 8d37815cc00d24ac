"""Random lives of an engine: whatever happens in whichever order, answers are those of the model.

The simulator compares every page with the model's own KV before it computes with it, so a wrong
page fails at once. At the end of each life nothing is held, promised or open any more.
"""

from __future__ import annotations

import contextlib
import itertools
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.transformers

KINDS = [
    pytest.param({"manager": "v1", "step_tokens": 9}, "true", id="v1-beside"),
    pytest.param({"manager": "v1", "step_tokens": 9, "reuse": False}, "true", id="v1-no-reuse"),
    pytest.param({"manager": "v1", "step_tokens": 9, "reuse": False}, "false", id="v1-within"),
    pytest.param({"manager": "v2", "groups": 2, "step_tokens": 9}, "true", id="v2-groups"),
    pytest.param({"manager": "v2", "step_tokens": 9, "reuse": False}, "true", id="v2-no-reuse"),
]
_lives = itertools.count()

SUBMIT = st.tuples(
    st.just("submit"),
    st.integers(0, 1),  # which family of prompts
    st.sampled_from([2, 8, 9, 17, 25, 30, 37, 41, 45]),
    st.sampled_from([None, None, None, "a"]),
    st.sampled_from([None, None, None, 1]),
    st.integers(1, 4),
)
OTHER = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("cancel"), st.integers(0, 3)),
    st.tuples(st.just("preempt"), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("hold"), st.booleans()),
    st.tuples(st.just("defer"), st.integers(0, 3)),
    st.tuples(st.just("honour"), st.sampled_from([0.0, 0.4, 1.0])),
    st.tuples(st.just("repeat"), st.booleans()),
    st.tuples(st.just("bounce")),
    st.tuples(st.just("rest")),
    st.tuples(st.just("rest")),
)
DAEMON = st.sampled_from([("kill",), ("revive",), ("stop",), ("go",)])


class Life:
    """One life, as a list of things that happen."""

    def __init__(self, sim, world, begin, kind, daemon=None) -> None:
        self.sim, self.world, self.begin, self.kind = sim, world, begin, kind
        self.daemon = daemon
        self.requests: list = []
        self.numbers = itertools.count(1)
        self.held = contextlib.ExitStack()
        self.offered = 0
        self.engine = begin(**kind, pages=36)

    def live(self, events) -> None:
        for family in range(2):  # so that there is something to find
            self.submit(family, 45, None, None, 1)
        self.rest()
        for name, *more in events:
            getattr(self, name)(*more)
        self.let_go()
        self.end()

    def submit(self, family, length, salt, adapter, count) -> None:
        prompt = [(family * 17 + n * n * 7 + n * 3) % 57 + 3 for n in range(length)]
        request = self.sim.Request(next(self.numbers), prompt, count, salt=salt, adapter=adapter)
        self.requests.append(self.engine.submit(request))

    def step(self, count) -> None:
        for _ in range(count):
            self.engine.step()

    def _one(self, index):
        active = self.engine.active
        return active[index % len(active)] if active else None

    def cancel(self, index) -> None:
        if request := self._one(index):
            self.engine.cancel(request)

    def preempt(self, index, reset) -> None:
        if self.kind["manager"] == "v2" and (request := self._one(index)):
            self.engine.preempt(request, reset=reset)

    def hold(self, on) -> None:
        self.let_go()
        if on:
            self.held.enter_context(self.engine.worker._mover._changed)

    def let_go(self) -> None:
        self.held.close()

    def defer(self, index) -> None:
        if self.kind["manager"] == "v2" and (request := self._one(index)):
            self.engine.defer ^= {request.request_id}

    def honour(self, share) -> None:
        self.engine.honour = share

    def repeat(self, on) -> None:
        self.engine.repeat = on

    def rest(self) -> None:
        """Let all that is under way come to its end."""
        self.let_go()
        self.engine.defer = set()
        self.engine.run()

    def bounce(self) -> None:
        self.let_go()
        self.end()
        self.engine = self.begin(**self.kind, pages=36, seed=len(self.requests))

    def kill(self) -> None:
        self.daemon.kill()

    def revive(self) -> None:
        if self.daemon.process.poll() is not None:
            self.daemon.start()

    def stop(self) -> None:
        self.daemon.signal(signal.SIGSTOP)

    def go(self) -> None:
        self.daemon.signal(signal.SIGCONT)

    def end(self) -> None:
        engine = self.engine
        self.rest()
        for request in self.requests:
            if not request.cancelled:
                own = self.world.answer(request.prompt, request.count, request.lora_task_id)
                assert request.answer == own
        self.requests.clear()
        engine.scheduler._keeper._settle()
        assert not engine.pages.users, "pages are still somebody's"
        assert not engine.scheduler._desk._open
        assert not engine.scheduler._desk._loads
        assert not engine.scheduler._keeper._requests
        assert not engine.scheduler._keeper._line._leases
        self.offered += engine.scheduler.statistics.offered_tokens
        engine.close()


@pytest.mark.parametrize(("kind", "background"), KINDS)
def test_lives(start, sim, world, kind, background):
    offered = 0

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.one_of(SUBMIT, SUBMIT, OTHER), min_size=12, max_size=40))
    def lives(events) -> None:
        nonlocal offered
        name = f"life {next(_lives)}"
        given = {"background": background, "adapters": '{"1": "commit"}'}

        def begin(**options):
            return start(weights=name, settings=given, **options)

        life = Life(sim, world, begin, kind)
        try:
            life.live(events)
        finally:
            life.held.close()
        offered += life.offered

    lives()
    assert offered > 0


def test_lives_with_a_daemon_that_dies_and_stalls(start, sim, world, serve):
    daemon = serve()
    name = "lives with a daemon"
    given_settings = {"address": daemon.address, "call_timeout_s": 0.2, "retry_interval_s": 0.01}

    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.one_of(SUBMIT, SUBMIT, OTHER, DAEMON), min_size=12, max_size=40))
    def lives(events) -> None:
        def begin(**options):
            life_daemon_up()
            return start(weights=name, settings=given_settings, **options)

        def life_daemon_up() -> None:
            daemon.signal(signal.SIGCONT)
            if daemon.process.poll() is not None:
                daemon.start()

        kind = {"manager": "v1", "step_tokens": 9, "reuse": False}
        life = Life(sim, world, begin, kind, daemon)
        try:
            life.live(events)
        finally:
            life.held.close()

    lives()
