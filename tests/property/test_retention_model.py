"""Retention against a plain model: who leaves has the lowest priority of those that may leave."""

from __future__ import annotations

from math import inf

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.core.config import Limits
from kvstrata.core.ids import Holder, SequenceHash, SessionId
from kvstrata.core.retention import PRIORITY_DEFAULT, BlockHint
from kvstrata.manager import Manager
from kvstrata.policy import LruPolicy
from kvstrata.pool import Pool
from kvstrata.transfer.base import JobDone

SLOTS = 6
CHAINS = [(1, 2, 3, 4), (1, 2, 5), (1, 6), (7, 8), (9,), (10,), (11, 12)]
PARENT = {
    child: parent
    for chain in CHAINS
    for parent, child in zip((None, *chain[:-1]), chain, strict=True)
}


def key(number: int) -> SequenceHash:
    return SequenceHash(number.to_bytes(16, "big"))


HINTS = st.tuples(
    st.integers(0, 3),
    st.integers(1, 4),
    st.sampled_from([0, 20, 35, 50, 100]),
    st.sampled_from([None, 2.0, 7.0]),
    st.sampled_from([None, None, 3.0]),
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(CHAINS), st.lists(HINTS, max_size=2), st.sampled_from([0.0, 1.0, 4.0])
    ),
    max_size=25,
)


class Model:
    """Terms as the documentation has them, looked up by walking everything."""

    def __init__(self) -> None:
        self.kept: set[int] = set()
        self.terms: dict[int, list[float]] = {}  # priority, until, expires

    def priority(self, number: int, now: float) -> float:
        priority, until, _ = self.terms.get(number, (PRIORITY_DEFAULT, inf, inf))
        return priority if now < until else PRIORITY_DEFAULT

    def pass_time(self, now: float) -> None:
        self.kept = {each for each in self.kept if self.terms.get(each, (0, 0, inf))[2] > now}
        for each, term in list(self.terms.items()):
            if term[1] <= now:
                term[:2] = PRIORITY_DEFAULT, inf
                if each in self.kept:
                    raise_above(self, each)

    def leaves(self) -> set[int]:
        return self.kept - {PARENT[each] for each in self.kept}


@settings(max_examples=1000)
@given(STEPS)
def test_the_lowest_priority_leaves_first(steps) -> None:
    pool = Pool(SLOTS, LruPolicy())
    manager = Manager(pool, [], Limits())
    model, now = Model(), 0.0
    for turn, (chain, hints, pause) in enumerate(steps):
        now += pause
        holder = Holder(SessionId(1), str(turn))
        manager.step(now)
        model.pass_time(now)
        assert {key(each) for each in model.kept} == set(pool.resident())
        ranges = [
            BlockHint(first, min(count, len(chain) - first), priority, duration, ttl)
            for first, count, priority, duration, ttl in hints
            if first < len(chain)
        ]
        names = [key(each) for each in chain]
        room = manager.reserve(holder, None, names, ranges, now)
        gone = {each for each in model.kept if key(each) not in pool}
        check_gone(model, gone, chain, now)
        manager.seal(holder, room.slots)
        for job in manager.step(now):
            count = len(job.slots)
            manager.complete(JobDone(job.transfer, (True,) * count, (b"",) * count))
        pool.check()
        model.kept -= gone
        new = {chain[index] for index in room.indices}
        agree(model, chain, new, ranges, now)


def check_gone(model: Model, gone: set[int], chain: tuple[int, ...], now: float) -> None:
    """Of the chain none left; the others did in an order in which each was a lowest leaf."""
    assert gone.isdisjoint(chain)
    kept = set(model.kept)
    assert could_leave(model, gone, set(chain), now), f"{gone} left of {kept}"
    model.kept = kept


def could_leave(model: Model, gone: set[int], chain: set[int], now: float) -> bool:
    if not gone:
        return True
    free = model.leaves() - chain
    lowest = min((model.priority(each, now) for each in free), default=inf)
    for each in free & gone:
        if model.priority(each, now) == lowest:
            model.kept.discard(each)
            if could_leave(model, gone - {each}, chain, now):
                return True
            model.kept.add(each)
    return False


def agree(model: Model, chain, new: set[int], hints: list[BlockHint], now: float) -> None:
    for each in new:
        model.terms.pop(each, None)
    asked = {each: hint for hint in hints for each in chain[hint.first : hint.first + hint.count]}
    for each, hint in asked.items():
        until = inf if hint.duration_s is None else now + hint.duration_s
        model.terms[each] = [hint.priority, until, now + (hint.ttl_s or inf)]
    model.kept |= new
    for each in [number for number in chain if number in asked and number in model.kept] + [
        number for number in chain if number in new
    ]:
        raise_above(model, each)


def raise_above(model: Model, child: int) -> None:
    priority, until, _ = model.terms.get(child, (PRIORITY_DEFAULT, inf, inf))
    above = PARENT[child]
    while above in model.kept:
        term = model.terms.setdefault(above, [PRIORITY_DEFAULT, inf, inf])
        if term[0] >= priority and (term[1] >= until or priority <= PRIORITY_DEFAULT):
            return
        later = max(term[1], until) if term[0] > PRIORITY_DEFAULT else until
        term[:2] = max(term[0], priority), later
        above = PARENT[above]
