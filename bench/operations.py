"""What is measured: each operation on chains of each length, every side doing the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from interleave import Cost, interleave
from sides import BLOCK_TOKENS, Chain, Side, Tokens

__all__ = ["FULL", "QUICK", "Measured", "Sizes", "measure_hash", "measure_pool"]

_KEY_BYTES = 16
_VOCABULARY = 150_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    slots: int
    """Slots in the pool; it is full before anything is timed."""
    round_blocks: int
    """Blocks in one timed call."""
    rounds: int
    """Timed calls of each side, after one that warms up."""
    lengths: tuple[int, ...]
    """Blocks in one chain; each divides `slots` and half of `round_blocks`."""


FULL = Sizes(slots=98_304, round_blocks=8192, rounds=9, lengths=(32, 128, 512))
"""For numbers that are reported."""
QUICK = Sizes(slots=8192, round_blocks=1024, rounds=3, lengths=(32, 128))
"""For a test that the measurement works; its numbers mean little."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of the report."""

    operation: str
    """Name, explained in README.md."""
    blocks: int
    """Blocks in one chain."""
    rounds: int
    """Timed calls of each side."""
    costs: Mapping[str, Cost]
    """Side -> cost per block; `ours` and `limit` always, `peer` if it could be imported."""


def measure_hash(sides: Mapping[str, Side], sizes: Sizes, name: str = "hash") -> Iterator[Measured]:
    """Yield the cost of making keys from tokens."""
    luck = random.Random(1)
    for length in sizes.lengths:
        prompts = [
            luck.choices(range(_VOCABULARY), k=length * BLOCK_TOKENS)
            for _ in range(sizes.round_blocks // length)
        ]
        costs = interleave(
            {key: partial(_ready_to_hash, side, prompts) for key, side in sides.items()},
            blocks=sizes.round_blocks,
            handled=sizes.round_blocks,
            rounds=sizes.rounds,
        )
        yield Measured(name, length, sizes.rounds, costs)


def _ready_to_hash(side: Side, prompts: list[Tokens], _turn: int) -> Callable[[], int]:
    return partial(side.hash, side.prompts(prompts))


def measure_pool(make: Callable[[int], Mapping[str, Side]], sizes: Sizes) -> Iterator[Measured]:
    """Yield the cost of every operation of a full pool; `make` builds the sides, empty."""
    for length in sizes.lengths:
        yield from _FullPool(make(sizes.slots), sizes, length).measure()


class _FullPool:
    """Every side's pool, full of the same chains. Rounds get their chains before they start."""

    def __init__(self, sides: Mapping[str, Side], sizes: Sizes, length: int) -> None:
        self.sides, self.sizes, self.length = sides, sizes, length
        self.luck = random.Random(length)
        self.residents = self.new_chains(sizes.slots // length)
        for side in sides.values():
            side.store(side.fresh(self.residents))

    def measure(self) -> Iterator[Measured]:
        """Measure; the last operations evict, so the order matters."""
        turns = range(self.sizes.rounds + 1)
        blocks = self.sizes.round_blocks
        count = blocks // self.length
        known = [self.luck.sample(self.residents, count) for _ in turns]
        strange = [self.new_chains(count) for _ in turns]
        forked = [list(map(self.fork, each)) for each in known]
        yield self.line("match", known, "fresh", "match")
        yield self.line("match, half", forked, "fresh", "match", handled=blocks // 2)
        yield self.line("match, none", strange, "fresh", "match", handled=0)
        yield self.line("store", strange, "fresh", "store")
        # What was stored last is resident on every side, and stays so while half as many blocks a
        # round are in play: what requests evict is older.
        recent = list(chain.from_iterable(strange))[-(count // 2) * len(turns) :]
        forks = list(map(self.fork, recent))
        requests = [forks[turn :: len(turns)] for turn in turns]
        yield self.line("request", requests, "fresh", "serve", handled=blocks // 2)
        # After the stores, because the peer's pins leave stale entries that its evictions pay for.
        known = [self.luck.sample(recent, count // 2) for _ in turns]
        yield self.line("use", known, "held", "use", handled=blocks // 2)
        yield self.line("touch", known, "held", "touch", handled=blocks // 2)

    def line(
        self,
        name: str,
        chains: Sequence[list[Chain]],
        form: str,
        method: str,
        handled: int | None = None,
    ) -> Measured:
        """Measure `method` on `chains[turn]`, given in the sides' `form`."""

        def ready(side: Side, turn: int) -> Callable[[], int]:
            return partial(getattr(side, method), getattr(side, form)(chains[turn]))

        blocks = len(chains[0]) * self.length
        costs = interleave(
            {key: partial(ready, side) for key, side in self.sides.items()},
            blocks=blocks,
            handled=blocks if handled is None else handled,
            rounds=self.sizes.rounds,
        )
        return Measured(name, self.length, self.sizes.rounds, costs)

    def new_chains(self, count: int) -> list[Chain]:
        """Return chains that nobody has seen."""
        return [[self.luck.randbytes(_KEY_BYTES) for _ in range(self.length)] for _ in range(count)]

    def fork(self, resident: Chain) -> Chain:
        """Return a chain that shares the first half of `resident` and is new from there on."""
        half = self.length // 2
        return resident[:half] + [self.luck.randbytes(_KEY_BYTES) for _ in range(half)]
