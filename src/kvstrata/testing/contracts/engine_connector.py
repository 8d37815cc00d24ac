"""The laws of an engine's connector, both halves; docs/contracts/engine-connector.md says them.

The suite plays the engine's scheduler by a script: it asks the leader half, lets the worker half
carry out each step's plan, and brings the report back, or not yet. The halves, and the daemon
behind them, are the shipped ones. An engine's own words stay in the subclass's `ScriptedEngine`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings

from kvstrata.testing.contracts.engine_lives import EVENTS, LOADING, Life, ScriptedEngine

__all__ = ["CAPABILITIES", "EngineConnectorContract", "ScriptedEngine"]

_SETTLE_S: Final = 10.0
_POLL_S: Final = 0.01
_PRIME: Final = 61

CAPABILITIES: Final = frozenset({
    "carried_reports", "declines", "ends", "lives", "planned_loads", "planned_saves", "preempts",
    "reported_loads", "resets", "separate_loads",
})  # fmt: skip
"""What some engines can do and others cannot; the laws about it ask less of those that cannot.

tests/unit/test_engine_laws.py has the list of who lacks what.

    carried_reports   the leader hears of the worker only by what the engine brings it
    declines          an engine that was offered blocks may take none of them
    ends              the connector is told when a request ends
    lives             the script can play several requests at once, computed in parts of any size
    planned_loads     between the leader's answer and the worker's copy slots are held
    planned_saves     slots are reserved before the worker has anything to copy
    preempts          an engine may take a request's places and have it start anew
    reported_loads    slots of a load are held until the engine has brought the worker's report
    resets            an engine may have every kept block forgotten
    separate_loads    a request is loaded in one step and computed in later ones
"""


class EngineConnectorContract:
    """Subclass and provide `engine`, which may serve all tests of a module.

    The daemon of an engine without `ends` needs a `hold_timeout_s` of a second or two: only time
    tells it then that a request is gone.
    """

    capabilities: ClassVar[frozenset[str]] = CAPABILITIES
    """Which of `CAPABILITIES` the engine has; leave out only what its interface has no word for."""
    lives: ClassVar[int] = 25
    """How many random lives are lived."""
    _numbers = itertools.count(1)

    @pytest.fixture
    def engine(self) -> ScriptedEngine:
        """Return the halves under test, with nothing under way."""
        raise NotImplementedError("a contract suite is given its subject by a subclass")

    def test_law_1_what_was_computed_can_be_loaded(self, engine: ScriptedEngine) -> None:
        """The bytes come back, in other places, and for these tokens only."""
        tokens, before = self.kept(engine, blocks=3)
        name = self.arrive(engine, tokens)
        assert engine.matched(name) == 3 * engine.block_tokens
        engine.allocate(name, [5, 3, 4, 6], 3 * engine.block_tokens)
        assert engine.report(engine.work(engine.plan({}))) == {name}
        assert [engine.read(place) for place in (5, 3, 4)] == before
        engine.finish(name)
        stranger = self.arrive(engine, [tokens[0] + 1, *tokens[1:]])
        assert engine.matched(stranger) == 0
        engine.finish(stranger)
        self.settle(engine)

    def test_law_2_matching_is_idempotent(self, engine: ScriptedEngine) -> None:
        """Asked again, the leader says the same, and one end of the request undoes all of it."""
        tokens, _ = self.kept(engine, blocks=2)
        name = self.arrive(engine, tokens)
        block = engine.block_tokens
        assert [engine.matched(name) for _ in range(4)] == [2 * block] * 4
        assert engine.matched(name, block) == block, "what the engine has is not offered"
        assert engine.matched(name, 2 * block) == 0
        assert engine.matched(name) == 2 * block
        assert not engine.finish(name), "nothing of it is under way"
        self.settle(engine)

    def test_law_3_a_match_that_is_not_used_holds_nothing(self, engine: ScriptedEngine) -> None:
        """An engine may make no room for what was offered; it says so by allocating none of it."""
        tokens, before = self.kept(engine, blocks=2)
        name = self.arrive(engine, tokens)
        assert engine.matched(name) == 2 * engine.block_tokens
        self.spoil(engine)
        spoilt = [engine.read(place) for place in range(4)]
        if "declines" in self.capabilities:
            engine.allocate(name, range(3), 0)
        else:  # all that such an engine can do is to end the request
            assert not engine.finish(name), "nothing of it is under way"
        engine.report(engine.work(engine.plan({})))
        assert [engine.read(place) for place in range(4)] == spoilt, "nothing was loaded"
        assert spoilt[:2] != before
        self.settle(engine)
        engine.finish(name)

    def test_law_4_a_second_allocation_loads_nothing_twice(self, engine: ScriptedEngine) -> None:
        """First for the load, then for the rest: what was computed meanwhile stays."""
        tokens, before = self.kept(engine, blocks=2)
        name = self.arrive(engine, tokens)
        engine.allocate(name, [4, 5], engine.matched(name))
        assert engine.report(engine.work(engine.plan({}))) == {name}
        assert [engine.read(place) for place in (4, 5)] == before
        engine.fill(6, next(self._numbers))
        after = [engine.read(place) for place in (4, 5, 6)]
        engine.allocate(name, [4, 5, 6], 0)
        assert not engine.report(engine.work(engine.plan({}))), "its load ended once"
        assert [engine.read(place) for place in (4, 5, 6)] == after
        engine.finish(name)
        self.settle(engine)

    def test_law_5_slots_are_held_until_the_load_is_reported(self, engine: ScriptedEngine) -> None:
        """Even if the request ends while the worker still reads."""
        tokens, before = self.kept(engine, blocks=2)
        name = self.arrive(engine, tokens)
        engine.allocate(name, [4, 5], engine.matched(name))
        plan = engine.plan({})
        held = 2 if "planned_loads" in self.capabilities else 0
        assert engine.held_slots() >= held
        if "ends" in self.capabilities:
            engine.finish(name)
        assert engine.held_slots() >= held, "the worker has not read them"
        report = engine.work(plan)
        assert [engine.read(place) for place in (4, 5)] == before
        if "reported_loads" in self.capabilities:
            assert engine.held_slots() >= 2, "nobody has said that it has"
        assert engine.report(report) == {name}
        engine.finish(name)
        self.settle(engine)

    def test_law_6_a_block_is_found_once_it_is_reported(self, engine: ScriptedEngine) -> None:
        """Not while it is planned or being written; until then its slot is held."""
        tokens = self.fresh(engine, blocks=2)
        name = self.arrive(engine, tokens)
        assert engine.matched(name) == 0
        engine.allocate(name, range(3), 0)
        for place in range(2):
            engine.fill(place, next(self._numbers))
        plan = engine.plan({name: len(tokens)})
        self.assert_missing(engine, tokens)
        if "planned_saves" in self.capabilities:
            assert engine.held_slots() >= 2
        report = engine.work(plan)
        if "carried_reports" in self.capabilities:
            self.assert_missing(engine, tokens)
        engine.report(report)
        engine.finish(name)
        self.settle(engine)
        other = self.arrive(engine, tokens)
        assert engine.matched(other) == 2 * engine.block_tokens
        engine.finish(other)
        self.settle(engine)

    def test_law_7_a_finished_request_is_done_with_its_places(self, engine: ScriptedEngine) -> None:
        """Unless `finish` asked for them: the engine gives them to others at once."""
        tokens, before = self.kept(engine, blocks=3, spoil_at_once=True)
        name = self.arrive(engine, tokens)
        engine.allocate(name, [4, 5, 6], engine.matched(name))
        assert engine.report(engine.work(engine.plan({}))) == {name}
        assert [engine.read(place) for place in (4, 5, 6)] == before
        engine.finish(name)
        self.settle(engine)

    def test_law_8_a_request_ends_once(self, engine: ScriptedEngine) -> None:
        """A second end, or that of a request never asked about, is harmless and takes nothing."""
        tokens, before = self.kept(engine, blocks=2)
        never = self.arrive(engine, tokens)
        assert not engine.finish(never)
        first, second = self.arrive(engine, tokens), self.arrive(engine, tokens)
        engine.matched(first)
        engine.allocate(second, [4, 5], engine.matched(second))
        plan = engine.plan({})
        assert not engine.finish(first)
        assert not engine.finish(first)
        if "planned_loads" in self.capabilities:
            assert engine.held_slots() >= 2, "the other request's hold is its own"
        assert engine.report(engine.work(plan)) == {second}
        assert [engine.read(place) for place in (4, 5)] == before
        engine.finish(second)
        self.settle(engine)

    def test_law_9_whatever_order_things_happen_in(self, engine: ScriptedEngine) -> None:
        """Random lives: right bytes in the right places alone, nothing found that nobody stored.

        What was computed by requests that lived undisturbed is found; at the end nothing is held.
        """
        if "lives" not in self.capabilities:
            return
        loaded = 0

        @settings(
            max_examples=self.lives,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            # Lives that wait in vain take seconds, and shrinking lives many of them.
            phases=(Phase.explicit, Phase.reuse, Phase.generate),
        )
        @given(EVENTS)
        @example(LOADING)
        def lives(events: list[tuple[Any, ...]]) -> None:
            nonlocal loaded
            life = Life(engine, self.capabilities, next(self._numbers))
            life.live(events)
            loaded += life.loaded_blocks
            if "ends" in self.capabilities:
                self.settle(engine)

        lives()
        self.settle(engine)
        assert loaded, "lives without a load show nothing"

    def test_capabilities_are_known(self) -> None:
        """A name that no law asks about would be a law left out."""
        assert self.capabilities <= CAPABILITIES

    # -- the script ----------------------------------------------------------------------------

    def fresh(self, engine: ScriptedEngine, blocks: int) -> list[int]:
        """Return a prompt that no test has used: so many full blocks and one token more."""
        number = next(self._numbers)
        head = [5 + number % _PRIME, 5 + number // _PRIME % _PRIME]
        length = blocks * engine.block_tokens + 1
        return head + [5 + place % _PRIME for place in range(length - len(head))]

    def arrive(self, engine: ScriptedEngine, tokens: Sequence[int]) -> str:
        """Let a request arrive; return its name."""
        name = f"request-{next(self._numbers)}"
        engine.begin(name, tokens)
        return name

    def kept(
        self, engine: ScriptedEngine, blocks: int, *, spoil_at_once: bool = False
    ) -> tuple[list[int], list[bytes]]:
        """Compute and keep a fresh prompt in the first places; return it and its blocks' bytes.

        The places hold other bytes afterwards: as soon as the engine may give them away.
        """
        tokens = self.fresh(engine, blocks)
        name = self.arrive(engine, tokens)
        assert engine.matched(name) == 0
        engine.allocate(name, range(blocks + 1), 0)
        for place in range(blocks):
            engine.fill(place, next(self._numbers))
        before = [engine.read(place) for place in range(blocks)]
        report = engine.work(engine.plan({name: len(tokens)}))
        keeps_places = engine.finish(name)
        if spoil_at_once and not keeps_places:
            self.spoil(engine)
        engine.report(report)
        self.settle(engine)
        self.spoil(engine)
        return tokens, before

    def spoil(self, engine: ScriptedEngine) -> None:
        """Overwrite every place, as other requests would."""
        for place in range(8):
            engine.fill(place, next(self._numbers))

    def assert_missing(self, engine: ScriptedEngine, tokens: Sequence[int]) -> None:
        """Nothing of these tokens is offered to another request."""
        name = self.arrive(engine, tokens)
        assert engine.matched(name) == 0
        engine.finish(name)

    def settle(self, engine: ScriptedEngine) -> None:
        """Wait until the daemon holds no slot; what stays held is a leak."""
        deadline = time.monotonic() + _SETTLE_S
        while held := engine.held_slots():
            assert time.monotonic() < deadline, f"{held} slots are still held"
            time.sleep(_POLL_S)
