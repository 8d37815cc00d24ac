"""`Pool` against one obvious model: a word per slot, a pin count, a list of idle slots.

The machine also has to find planted bugs; otherwise its green says nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.policy import LruPolicy
from kvstrata.pool import Pin, Pool
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
    """Return the chain from the root to `number`."""
    parent = PARENTS[number]
    return [*(path_to(parent) if parent else []), key(number)]


CHAINS = st.sampled_from([path_to(number) for number in PARENTS])
COUNTS = st.integers(1, SLOTS + 1)
SOME_KEYS = st.lists(st.sampled_from([key(number) for number in PARENTS]), min_size=1, unique=True)


class PoolMachine(RuleBasedStateMachine):
    """Rules are the pool's calls; each does the same to the model and compares."""

    filling = Bundle("filling")
    staged = Bundle("staged")
    pinned = Bundle("pinned")
    held_back = Bundle("held_back")

    def __init__(self) -> None:
        super().__init__()
        self.policy = LruPolicy()
        self.pool = self.make_pool(self.policy)
        self.state = dict.fromkeys(range(SLOTS), "free")
        self.registry: dict[SequenceHash, int] = {}
        self.holds: Counter[int] = Counter()
        self.idle: list[int] = []  # coldest first
        self.generations = [0] * SLOTS
        self.evictions = self.duplicates = 0

    def make_pool(self, policy: LruPolicy) -> Pool:
        return Pool(SLOTS, policy)

    # -- the model's own steps -----------------------------------------------------------------

    def children_of(self, name: SequenceHash, gone: Iterable[SequenceHash]) -> list[SequenceHash]:
        left = set(self.registry) - set(gone)
        return [child for child in left if parent_key(child) == name]

    def key_in(self, slot: int) -> SequenceHash:
        return next(name for name, place in self.registry.items() if place == slot)

    def walk(self, count: int) -> tuple[list[SequenceHash], list[int]] | None:
        """Return (evicted, order afterwards) of taking the coldest leaves in one walk."""
        evicted: list[SequenceHash] = []
        passed: list[int] = []
        for place, slot in enumerate(self.idle):
            if len(evicted) == count:
                return evicted, self.idle[place:] + passed
            name = self.key_in(slot)
            if self.children_of(name, evicted):
                passed.append(slot)
            else:
                evicted.append(name)
        return (evicted, passed) if len(evicted) == count else None

    def could_leave(self) -> int:
        """Return how many idle blocks could be evicted, one after the other, leaves first."""
        gone: list[SequenceHash] = []
        found = True
        while found:
            names = [self.key_in(slot) for slot in self.idle]
            left = [name for name in names if name not in gone]
            found = next((name for name in left if not self.children_of(name, gone)), None)
            gone += [found] if found else []
        return len(gone)

    def drop_hold(self, slot: int) -> None:
        self.holds[slot] -= 1
        if self.holds[slot]:
            return
        if self.state[slot] == "registered":
            self.idle.append(slot)
        else:
            self.state[slot] = "free"

    # -- rules ---------------------------------------------------------------------------------

    @rule(target=filling, count=COUNTS)
    def reserve(self, count: int):
        slots = self.take(count)
        return multiple() if slots is None else multiple(slots)

    @rule(chain=CHAINS)
    def grow(self, chain: list[SequenceHash]) -> None:
        """Store a chain block by block, as a conversation does: its root becomes the coldest."""
        for name in chain:
            slots = None if name in self.registry else self.take(1)
            if slots:
                self.pool.stage(slots)
                assert self.pool.register(slots, [name], [parent_key(name)]) == list(slots)
                self.state[slots[0]] = "registered"
                self.registry[name] = slots[0]
                self.idle.append(slots[0])

    def take(self, count: int) -> tuple[SlotId, ...] | None:
        before = self.pool.statistics(), list(self.policy._order), list(self.pool.resident())
        free = [slot for slot in self.state if self.state[slot] == "free"]
        expected = self.walk(max(count - len(free), 0))
        reservation = self.pool.reserve(count)
        if reservation is None:
            after = self.pool.statistics(), list(self.policy._order), list(self.pool.resident())
            assert after == before, "a refusal changed something"
            assert len(free) + self.could_leave() < count, "refused although there was room"
            return None
        if expected is not None:
            assert (reservation.evicted, list(self.policy._order)) == expected
        for place, name in enumerate(reservation.evicted):
            slot = self.registry[name]
            assert not self.holds[slot], f"evicted pinned {slot=}"
            assert not self.children_of(name, reservation.evicted[:place]), "not leaf first"
        for name in reservation.evicted:
            self.state[self.registry.pop(name)] = "free"
        self.idle = list(self.policy._order)
        self.evictions += len(reservation.evicted)
        assert len(set(reservation.slots)) == count
        for slot in reservation.slots:
            assert self.state[slot] == "free"
            assert self.pool.generations[slot] > self.generations[slot], "generation did not rise"
            self.generations[slot] = self.pool.generations[slot]
            self.state[slot] = "filling"
        return tuple(reservation.slots)

    @rule(slots=consumes(filling))
    def abort_filling(self, slots: tuple[SlotId, ...]) -> None:
        self.pool.abort(slots)
        self.state.update(dict.fromkeys(slots, "free"))

    @rule(target=staged, slots=consumes(filling))
    def stage(self, slots: tuple[SlotId, ...]):
        self.pool.stage(slots)
        self.state.update(dict.fromkeys(slots, "staged"))
        return slots

    @rule(slots=consumes(staged))
    def abort_staged(self, slots: tuple[SlotId, ...]) -> None:
        self.pool.abort(slots)
        self.state.update(dict.fromkeys(slots, "free"))

    @rule(slots=consumes(staged), chain=CHAINS)
    def register(self, slots: tuple[SlotId, ...], chain: list[SequenceHash]) -> None:
        """Register a chain, the last block again and again where slots are left over."""
        names = (chain + [chain[-1]] * SLOTS)[: len(slots)]
        registered = self.pool.register(slots, names, [parent_key(name) for name in names])
        expected = []
        for slot, name in zip(slots, names, strict=True):
            if name in self.registry:
                self.state[slot] = "free"
                self.duplicates += 1
            else:
                self.state[slot] = "registered"
                self.registry[name] = slot
                expected.append(slot)
        assert registered == expected
        self.idle += reversed(expected)

    @rule(target=pinned, chain=CHAINS)
    def pin(self, chain: list[SequenceHash]):
        slots = self.pool.match(chain)
        pin = self.pool.pin(slots)
        for slot in slots:
            if slot in self.idle:
                self.idle.remove(slot)
            self.holds[slot] += 1
        return pin

    @rule(pin=consumes(pinned))
    def release_twice(self, pin: Pin) -> None:
        pin.release()
        pin.release()
        for slot in reversed(pin.slots):
            self.drop_hold(slot)

    @rule(chain=CHAINS)
    def touch(self, chain: list[SequenceHash]) -> None:
        slots = self.pool.match(chain)
        self.pool.touch(slots)
        for slot in reversed(slots):
            if slot in self.idle:
                self.idle.remove(slot)
                self.idle.append(slot)

    @rule(names=SOME_KEYS)
    def withdraw(self, names: list[SequenceHash]) -> None:
        slots = self.pool.withdraw(names)
        assert slots == self.take_out(names)
        for slot in slots:
            if not self.holds[slot]:
                self.state[slot] = "free"

    @rule(target=held_back, names=SOME_KEYS)
    def withdraw_and_hold_back(self, names: list[SequenceHash]):
        slots = self.pool.withdraw(names, quarantine=True)
        assert slots == self.take_out(names)
        for slot in slots:
            self.holds[slot] += 1
        return tuple(slots)

    def take_out(self, names: list[SequenceHash]) -> list[int]:
        slots = [self.registry.pop(name) for name in names if name in self.registry]
        for slot in slots:
            self.state[slot] = "quarantined"
            if slot in self.idle:
                self.idle.remove(slot)
        return slots

    @rule(target=held_back, slots=consumes(filling))
    def quarantine_filling(self, slots: tuple[SlotId, ...]):
        self.pool.quarantine_filling(slots)
        for slot in slots:
            self.state[slot] = "quarantined"
            self.holds[slot] += 1
        return slots

    @rule(slots=consumes(held_back))
    def end_quarantine(self, slots: tuple[SlotId, ...]) -> None:
        self.pool.end_quarantine(slots)
        for slot in slots:
            self.drop_hold(slot)

    # -- laws ----------------------------------------------------------------------------------

    @invariant()
    def the_pool_agrees_with_itself(self) -> None:
        self.pool.check()

    @invariant()
    def the_registry_is_the_models(self) -> None:
        assert set(self.pool.resident()) == set(self.registry)
        for name, slot in self.registry.items():
            assert self.pool.match([name]) == [slot]
            assert self.pool.hash_of(SlotId(slot)) == name
            assert self.pool.parent_of(SlotId(slot)) == parent_key(name)

    @invariant()
    def every_slot_is_in_exactly_one_set(self) -> None:
        found = self.pool.statistics()
        sums = found.free + found.filling + found.staged + found.idle + found.in_use
        assert sums + found.quarantined == found.total == SLOTS
        words = Counter(self.state.values())
        assert found.free == words["free"]
        assert found.filling == words["filling"]
        assert found.staged == words["staged"]
        assert found.idle == len(self.idle)
        assert found.in_use == words["registered"] - len(self.idle)
        assert found.quarantined == words["quarantined"]
        assert (found.evictions, found.duplicates) == (self.evictions, self.duplicates)
        assert self.pool.available == found.free + found.idle

    @invariant()
    def victims_would_leave_in_the_models_order(self) -> None:
        assert list(self.policy._order) == self.idle

    @invariant()
    def generations_rise_only_by_reservation(self) -> None:
        assert list(self.pool.generations) == self.generations


TestPool = PoolMachine.TestCase
TestPool.settings = settings(stateful_step_count=40)


# -- planted bugs ------------------------------------------------------------------------------


class PolicyNotToldOfAPin(Pool):
    def pin(self, slots: Sequence[SlotId]) -> Pin:
        for slot in slots:
            if self._pins[slot]:
                continue
            self._pins[slot] += 1
        return Pin(slots, self._unpin)


class EvictsParents(Pool):
    """Forgets who has children while it makes room."""

    def _evict(self, count: int, coming: Sequence[SequenceHash], owner: int):
        del owner
        slots = self._policy.victims(count - len(self._free), coming)
        for slot in slots:
            parent = self._parent[slot]
            if parent is not None:
                self._leaves.drop_child(parent)
        return self._forget(slots) if slots else None


class RefusalLosesTheOrder(Pool):
    def __init__(self, slots: int, policy: LruPolicy) -> None:
        super().__init__(slots, policy)
        self._leaves._return_victims = lambda taken: self._policy.admit(reversed(taken))


class RefusalEvictsPartly(Pool):
    def reserve(self, count: int):
        found = super().reserve(count)
        if found is None and self._policy:
            smaller = super().reserve(len(self._free) + 1)
            if smaller:
                self.abort(smaller.slots)
        return found


class PassesOverParents(Pool):
    """Refuses although parents could leave once their children have."""

    def __init__(self, slots: int, policy: LruPolicy) -> None:
        super().__init__(slots, policy)
        self._leaves._choose_bared = lambda *_: None


class SameGeneration(Pool):
    def reserve(self, count: int):
        found = super().reserve(count)
        if found:
            self.generations[found.slots[-1]] -= 1
        return found


class FreesASlotInUse(Pool):
    def withdraw(self, hashes: Iterable[SequenceHash], *, quarantine: bool = False):
        slots = super().withdraw(hashes, quarantine=quarantine)
        for slot in slots:
            if self._pins[slot] and not quarantine:
                self._pins[slot] = 0
                self._free_now([slot])
        return slots


@pytest.mark.parametrize(
    "broken",
    [
        PolicyNotToldOfAPin,
        EvictsParents,
        RefusalLosesTheOrder,
        RefusalEvictsPartly,
        PassesOverParents,
        SameGeneration,
        FreesASlotInUse,
    ],
)
def test_a_planted_bug_is_found(broken: type[Pool]) -> None:
    class Planted(PoolMachine):
        def make_pool(self, policy: LruPolicy) -> Pool:
            return broken(SLOTS, policy)

    assert_machine_fails(Planted, steps=30)
