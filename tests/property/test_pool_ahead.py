"""Blocks given up ahead of eviction, against a model that only knows who was used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.policy import make_policy, policy_names
from kvstrata.pool import Pin, Pool
from kvstrata.pool.ahead import Ahead
from kvstrata.testing.plants import assert_machine_fails

SLOTS = 7
PARENTS = {1: None, 2: 1, 3: 2, 4: 3, 5: 2, 6: 5, 7: None, 8: 7, 9: None}
"""A small forest: 1-2-3-4, 2-5-6, 7-8, 9."""


def key(number: int) -> SequenceHash:
    return SequenceHash(number.to_bytes(16, "big"))


def parent_key(name: SequenceHash) -> SequenceHash | None:
    parent = PARENTS[int.from_bytes(name, "big")]
    return None if parent is None else key(parent)


def path_to(number: int) -> list[SequenceHash]:
    parent = PARENTS[number]
    return [*(path_to(parent) if parent else []), key(number)]


CHAINS = st.sampled_from([path_to(number) for number in PARENTS])


class AheadMachine(RuleBasedStateMachine):
    """`ahead` are the keys that were given up and not used since, in that order."""

    given = Bundle("given")
    pinned = Bundle("pinned")
    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(SLOTS, make_policy(self.policy))
        self.ahead: list[SequenceHash] = []
        self.holds: Counter[SequenceHash] = Counter()

    def resident(self) -> set[SequenceHash]:
        return set(self.pool.resident())

    def children_of(self, name: SequenceHash, gone: Collection[SequenceHash]) -> set[SequenceHash]:
        """Return the resident blocks that keep `name`: those given up keep nobody."""
        left = self.resident() - set(gone) - set(self.ahead)
        return {child for child in left if parent_key(child) == name}

    def could_leave(self) -> int:
        gone: set[SequenceHash] = set()
        found = True
        while found:
            left = [name for name in self.resident() - gone if not self.holds[name]]
            found = next((name for name in left if not self.children_of(name, gone)), None)
            gone |= {found} if found else set()
        return len(gone)

    @rule(chain=CHAINS)
    def grow(self, chain: list[SequenceHash]) -> None:
        for name in chain:
            slots = None if name in self.resident() else self.take(1)
            if slots:
                self.pool.stage(slots)
                self.pool.register(slots, [name], [parent_key(name)])
                self.bring_back(parent_key(name))

    @rule(count=st.integers(1, SLOTS + 1))
    def reserve(self, count: int) -> None:
        slots = self.take(count)
        if slots:
            self.pool.abort(slots)

    def take(self, count: int) -> list[SlotId] | None:
        before, could = self.resident(), self.could_leave()
        free = self.pool.statistics().free
        ready = [name for name in self.ahead if not self.holds[name]]
        ahead = set(self.ahead)
        kept = {name: self.children_of(name, ()) for name in before}
        reservation = self.pool.reserve(count)
        if reservation is None:
            assert self.resident() == before, "a refusal changed something"
            assert free + could < count, "refused although there was room"
            return None
        evicted = reservation.evicted
        assert before - self.resident() == set(evicted)
        assert not any(self.holds[name] for name in evicted), "evicted what is held"
        for place, name in enumerate(evicted):
            assert not kept[name] - set(evicted[:place]), "a block that somebody needs left"
        first = [name for name in evicted if name in ahead]
        assert evicted[: len(first)] == first == ready[: len(first)], "not in the order given up"
        assert len(first) == len(evicted) or len(first) == len(ready), "a warmer block left first"
        self.ahead = [name for name in self.ahead if name in self.resident()]
        return reservation.slots

    def bring_back(self, name: SequenceHash | None) -> None:
        """What is used, and what it hangs on, is not given up any more."""
        while name in self.ahead:
            self.ahead.remove(name)
            name = parent_key(name)

    @rule(target=pinned, chain=CHAINS, used=st.booleans())
    def pin(self, chain: list[SequenceHash], *, used: bool):
        slots = self.pool.match(chain)
        names = chain[: len(slots)]
        self.holds.update(names)
        if used:
            for name in names:
                self.bring_back(name)
        return self.pool.pin(slots, used=used), names

    @rule(held=consumes(pinned))
    def release(self, held: tuple[Pin, list[SequenceHash]]) -> None:
        pin, names = held
        pin.release()
        self.holds.subtract(names)

    @rule(target=given, count=st.integers(1, SLOTS))
    def give_up(self, count: int):
        before = set(self.ahead)
        pins = self.pool.give_up_ahead(count)
        names = [self.pool.hash_of(pin.slots[0]) for pin in pins]
        assert len(names) <= count
        assert before.isdisjoint(names)
        assert not any(self.holds[name] for name in names)
        for place, name in enumerate(names):
            assert not self.children_of(name, names[:place]), "not leaf first"
        self.ahead += names
        self.holds.update(names)
        return multiple(*((pin, [name]) for pin, name in zip(pins, names, strict=True)))

    @rule(held=consumes(given))
    def written(self, held: tuple[Pin, list[SequenceHash]]) -> None:
        self.release(held)

    @rule(chain=CHAINS)
    def withdraw(self, chain: list[SequenceHash]) -> None:
        name = chain[-1]
        if not self.holds[name]:
            self.pool.withdraw([name])
            self.ahead = [each for each in self.ahead if each != name]

    @invariant()
    def the_pool_agrees_with_itself(self) -> None:
        self.pool.check()
        inside = self.pool._ahead
        given = [name for name in self.pool.resident() if self.pool.match([name])[0] in inside]
        assert set(given) == set(self.ahead)


class TestAhead(AheadMachine.TestCase):
    settings = settings(stateful_step_count=40)


@pytest.mark.parametrize("name", [each for each in policy_names() if each != "lru"])
def test_under_every_other_policy(name) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    class Machine(AheadMachine):
        policy = name

    few = settings(max_examples=30, stateful_step_count=40)
    run_state_machine_as_test(Machine, settings=few)


def stay_given_up(patch: pytest.MonkeyPatch) -> None:
    """A block that is used goes all the same."""
    patch.setattr(Pool, "_bring_back", lambda *_: None)


def forget_who_pins(patch: pytest.MonkeyPatch) -> None:
    """Slots that are being written are given out."""
    patch.setattr(Ahead, "first", lambda self, count: list(self._order)[:count])


@pytest.mark.parametrize("plant", [stay_given_up, forget_who_pins])
def test_a_planted_bug_is_found(plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert_machine_fails(AheadMachine, steps=30)
