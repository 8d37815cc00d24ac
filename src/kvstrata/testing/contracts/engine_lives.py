"""Random lives of an engine's requests, and the oracle that says what a connector may answer.

A life is a list of events: requests arrive, are computed in parts, preempted, aborted and finished
in any order, at any point of a step, and the cache is reset. The oracle knows which bytes a block
of these tokens has, which blocks may be found, and which must be.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

from hypothesis import strategies as st

__all__ = ["EVENTS", "LOADING", "Life", "ScriptedEngine"]

Event: TypeAlias = tuple[Any, ...]

_FAMILIES: Final = 3
_BLOCKS_MAX: Final = 3
_FOUND_S: Final = 10.0
_POLL_S: Final = 0.01
_PRIME: Final = 61

EVENTS: Final = st.lists(
    st.one_of(
        st.tuples(
            st.just("arrive"),
            st.integers(0, _FAMILIES - 1),
            st.integers(0, _BLOCKS_MAX),  # whole blocks
            st.sampled_from([0.1, 0.5, 0.9]),  # share of the block behind them
            st.sampled_from([True, True, True, False]),  # take what is offered
        ),
        st.tuples(
            st.just("step"),
            st.sampled_from([0.4, 1.0, 1.0, 1.7, 9.0]),  # blocks that each request computes
            st.sampled_from(["", "", "", "planned", "worked"]),  # when somebody is aborted
        ),
        st.tuples(st.just("step"), st.just(9.0), st.just("")),
        st.tuples(st.just("finish")),
        st.tuples(st.just("abort"), st.integers(0, 9)),
        st.tuples(st.just("preempt"), st.integers(0, 9)),
        st.sampled_from([("finish",), ("finish",), ("reset",)]),
    ),
    min_size=8,
    max_size=24,
)
"""Lives: lists of events, each a name and its choices."""

LOADING: Final[list[Event]] = [
    ("arrive", 0, 2, 0.5, True), ("step", 9.0, ""), ("step", 9.0, ""), ("finish",),
    ("step", 9.0, ""), ("keep",), ("arrive", 0, 2, 0.5, True), ("step", 9.0, ""),
]  # fmt: skip
"""A life that loads something, whatever luck the others have."""


class ScriptedEngine(Protocol):
    """A connector's two halves over a daemon with room, driven by hand.

    A *place* is room for one block in the engine's device memory; there are eight or more.
    Requests are known by names, each used once.
    """

    block_tokens: int
    """Tokens in one block."""
    places: int
    """How many places there are."""

    def begin(self, name: str, tokens: Sequence[int]) -> None:
        """Let a request with this prompt arrive at the scheduler."""

    def matched(self, name: str, computed_tokens: int = 0) -> int:
        """Ask the leader how many tokens behind the computed ones it can load, until it says."""

    def allocate(self, name: str, places: Sequence[int], external_tokens: int) -> None:
        """Tell the leader which places hold the request's blocks, root first."""

    def plan(self, computed: Mapping[str, int]) -> Any:
        """Return the leader's plan for a step that computes so many tokens of each request."""

    def work(self, plan: Any) -> Any:
        """Let the worker carry out a plan; return what it reports."""

    def report(self, report: Any) -> set[str]:
        """Bring the worker's report to the leader; return the requests whose load has ended."""

    def finish(self, name: str) -> bool:
        """End a request; True if its places are still needed until the worker has reported."""

    def preempt(self, name: str) -> None:
        """Take a request's places, between two steps; it asks anew. For those with `preempts`."""

    def reset(self) -> None:
        """Have every kept block forgotten. For those with `resets`."""

    def fill(self, place: int, seed: int) -> None:
        """Write bytes into a place that only this seed makes, as computing would."""

    def read(self, place: int) -> bytes:
        """Return the bytes of a place."""

    def held_slots(self) -> int:
        """Return how many of the daemon's slots are held: being filled, or pinned."""


@dataclass(slots=True)
class _Request:
    name: str
    tokens: list[int]
    places: list[int]
    loads: int = 0  # tokens of the load that was not reported yet
    computed: int = 0
    since: int = 0  # the reset that it came after
    whole_life: bool = True  # all that it computed was planned, done and reported


class Life:
    """One life; the blocks of each begin with tokens of its own."""

    def __init__(self, engine: ScriptedEngine, capabilities: frozenset[str], number: int) -> None:
        """`number` is this life's own among all of the engine's."""
        self._engine, self._capabilities = engine, capabilities
        self._number, self._names = number, 0
        self._free = list(range(engine.places))
        self._requests: list[_Request] = []
        self._leaving: list[_Request] = []  # ended; their places are free after the next report
        self._bytes: dict[tuple[int, ...], bytes] = {}
        self._may: set[tuple[int, ...]] = set()
        self._must: set[tuple[int, ...]] = set()
        self._resets = 0
        self._seeds = 1_000_000 * number
        self.loaded_blocks = 0

    def live(self, events: Sequence[Event]) -> None:
        """Go through the events, let every request end, and look for what must be kept."""
        for name, *choices in events:
            getattr(self, f"_{name}")(*choices)
        for _ in range(100):
            if not self._requests and not self._leaving:
                break
            self._step(9.0, "")
            self._finish()
        assert not self._requests, "requests do not come to their end"
        self._keep()

    # -- events --------------------------------------------------------------------------------

    def _arrive(self, family: int, blocks: int, share: float, take: bool) -> None:  # noqa: FBT001
        size = self._engine.block_tokens
        tokens = self._prompt(family, blocks * size + max(1, int(share * size)))
        if len(self._free) < blocks + 1:
            return
        self._names += 1
        name = f"life-{self._number}-{self._names}"
        self._engine.begin(name, tokens)
        request = _Request(name, tokens, [], since=self._resets)
        self._requests.append(request)
        self._admit(request, take=take)

    def _step(self, blocks: float, abort: str) -> None:
        """One step of the engine; `abort` says after which half of it somebody leaves."""
        engine, size = self._engine, self._engine.block_tokens
        counts: dict[str, int] = {}
        loading = {each.name: each for each in self._requests + self._leaving if each.loads}
        for request in self._requests:
            if request.loads and "separate_loads" not in self._capabilities:
                self._compute(request, request.loads, len(request.tokens))
            left = len(request.tokens) - request.computed
            if not request.loads and left:
                counts[request.name] = min(left, max(1, int(blocks * size)))
                end = request.computed + counts[request.name]
                self._compute(request, request.computed, end)
                request.computed = end
        plan = engine.plan(counts)
        self._leave_within(abort == "planned")
        expected = [{engine.read(place)} for place in range(engine.places)]
        for request in loading.values():
            for block, place in enumerate(request.places[: request.loads // size]):
                right = self._bytes[self._block(request, block)]
                # The load of a request that is gone may have been called off.
                expected[place] = {right} | (expected[place] if request in self._leaving else set())
        report = engine.work(plan)
        for place in range(engine.places):
            assert engine.read(place) in expected[place], f"place {place} has other bytes"
        self._leave_within(abort == "worked")
        ended = engine.report(report)
        for request in loading.values():
            assert request.name in ended or request in self._leaving, "each load ends"
        assert ended <= set(loading), "and it ends once"
        self._take_loads([each for each in loading.values() if each in self._requests])
        self._free += [place for each in self._leaving for place in each.places]
        self._leaving.clear()

    def _finish(self) -> None:
        """End every request that is computed."""
        for request in [each for each in self._requests if each.computed == len(each.tokens)]:
            if request.whole_life and request.since == self._resets:
                ends = range(1, len(request.tokens) // self._engine.block_tokens + 1)
                self._must |= {self._block(request, end - 1) for end in ends}
            self._end(request)

    def _abort(self, choice: int) -> None:
        if self._requests:
            self._end(self._requests[choice % len(self._requests)])

    def _preempt(self, choice: int) -> None:
        """The engine takes the places of one that runs, and has it start anew."""
        running = [each for each in self._requests if each.computed and not each.loads]
        if not running or "preempts" not in self._capabilities:
            return
        request = running[choice % len(running)]
        self._engine.preempt(request.name)
        self._free += request.places
        request.places, request.computed, request.whole_life = [], 0, False
        self._admit(request, take=True)

    def _reset(self) -> None:
        if "resets" not in self._capabilities or any(each.loads for each in self._requests):
            return  # an engine waits for its loads first
        self._engine.reset()
        self._resets += 1
        self._may.clear()
        self._must.clear()

    # -- parts of them -------------------------------------------------------------------------

    def _admit(self, request: _Request, *, take: bool) -> None:
        """Ask what can be loaded, and make room for the request."""
        engine, size = self._engine, self._engine.block_tokens
        found = engine.matched(request.name)
        assert found % size == 0
        assert found <= len(request.tokens)
        for block in range(found // size):
            assert self._block(request, block) in self._may, "nobody has stored this"
        take = take or "declines" not in self._capabilities
        request.places = [self._free.pop() for _ in range(-(-len(request.tokens) // size))]
        request.loads = found if take else 0
        for place in request.places:  # whatever was there before
            self._fill(place)
        engine.allocate(request.name, request.places, request.loads)

    def _compute(self, request: _Request, begin: int, end: int) -> None:
        """Write what computing these tokens makes of their places."""
        size = self._engine.block_tokens
        for block in range(begin // size, -(-end // size)):
            place = request.places[block]
            if (block + 1) * size > end:
                self._fill(place)  # a block that is not whole yet
                continue
            key = self._block(request, block)
            self._engine.fill(place, _seed(key))
            self._may.add(key)
            made = self._engine.read(place)
            assert self._bytes.setdefault(key, made) == made, "the script's bytes vary"

    def _take_loads(self, loaded: Sequence[_Request]) -> None:
        """Go on with what was loaded, as after any allocation."""
        separate = "separate_loads" in self._capabilities
        for request in loaded:
            self.loaded_blocks += request.loads // self._engine.block_tokens
            request.computed = request.loads if separate else len(request.tokens)
            request.loads = 0
            self._engine.allocate(request.name, request.places, 0)

    def _leave_within(self, somebody: bool) -> None:  # noqa: FBT001
        """Abort a request in the middle of a step, if so wished."""
        if somebody and self._requests:
            self._end(self._requests[self._names % len(self._requests)])
            for request in self._requests:  # a block may have been left to the one that is gone
                request.whole_life = False

    def _end(self, request: _Request) -> None:
        """End a request. The step at hand, or its last save, may still touch its places."""
        self._requests.remove(request)
        self._leaving.append(request)
        self._engine.finish(request.name)

    def _keep(self) -> None:
        """What was computed by requests that lived undisturbed is found by the next that ask."""
        size = self._engine.block_tokens
        longest = [
            key
            for key in self._must
            if not any(each[: len(key)] == key for each in self._must - {key})
        ]
        for key in longest:
            until = time.monotonic() + _FOUND_S
            while (found := self._ask([*key, 5])) < len(key):
                assert time.monotonic() < until, f"{found} of {len(key)} tokens are found"
                time.sleep(_POLL_S)
            assert found == len(key) // size * size

    def _ask(self, tokens: list[int]) -> int:
        self._names += 1
        name = f"life-{self._number}-{self._names}"
        self._engine.begin(name, tokens)
        found = self._engine.matched(name)
        self._engine.finish(name)
        return found

    def _fill(self, place: int) -> None:
        self._seeds += 1
        self._engine.fill(place, self._seeds)

    def _block(self, request: _Request, block: int) -> tuple[int, ...]:
        """Return the oracle's name of a block: all tokens up to its end."""
        return tuple(request.tokens[: (block + 1) * self._engine.block_tokens])

    def _prompt(self, family: int, length: int) -> list[int]:
        """Families share their first blocks: as many as their number."""
        head = [5 + self._number % _PRIME, 5 + self._number // _PRIME % _PRIME, 67]
        branch = family * self._engine.block_tokens if family else length
        body = range(len(head), length)
        return head + [5 + (n * (1 + family if n >= branch else 1)) % _PRIME for n in body]


def _seed(key: tuple[int, ...]) -> int:
    """Return the same number for the same tokens, in every process."""
    seed = len(key)
    for token in key:
        seed = (seed * 1_000_003 + token) % (1 << 31)
    return seed
