"""The laws of `EvictionPolicy`; docs/contracts/eviction-policy.md says them in words."""

from __future__ import annotations

import random

import pytest

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.policy import EvictionPolicy

__all__ = ["EvictionPolicyContract"]

_CAPACITY = 20


class EvictionPolicyContract:
    """Subclass and provide the fixture `new_policy`: a fresh policy for each test, not bound."""

    @pytest.fixture
    def new_policy(self) -> EvictionPolicy:
        """Return the policy under test."""
        raise NotImplementedError("a contract suite is given its subject by a subclass")

    @pytest.fixture
    def keys(self) -> list[SequenceHash | None]:
        """Return the view slot -> key of a tier of 20 slots; tests rename blocks in it."""
        return [_key(slot) for slot in range(_CAPACITY)]

    @pytest.fixture
    def policy(self, new_policy: EvictionPolicy, keys: list[SequenceHash | None]) -> EvictionPolicy:
        """Return the policy under test, bound to `keys`."""
        new_policy.bind(_CAPACITY, keys)
        return new_policy

    def test_law_1_victims_are_exactly_as_many_or_none(self, policy: EvictionPolicy) -> None:
        """A refusal takes nothing, so it can be repeated with a smaller wish."""
        policy.admit(_slots(3))
        assert policy.victims(4) == []
        assert len(policy) == 3
        assert len(policy.victims(2)) == 2
        assert len(policy) == 1
        assert policy.victims(0) == []

    def test_law_2_a_slot_leaves_once(self, policy: EvictionPolicy) -> None:
        """What left as a victim is forgotten, and each held slot leaves sooner or later."""
        policy.admit(_slots(5))
        left = [*policy.victims(2), *policy.victims(3)]
        assert sorted(left) == _slots(5)
        assert len(policy) == 0
        assert policy.victims(1) == []

    def test_law_3_a_reclaimed_slot_never_leaves(self, policy: EvictionPolicy) -> None:
        """A slot that came into use is no longer the policy's to give."""
        policy.admit(_slots(6))
        policy.reclaim([SlotId(1), SlotId(4)])
        assert len(policy) == 4
        assert sorted(policy.victims(4)) == [0, 2, 3, 5]

    def test_law_4_within_one_call_the_first_is_coldest(self, policy: EvictionPolicy) -> None:
        """The pool gives chains deepest block first and relies on them leaving in that order."""
        policy.admit([SlotId(slot) for slot in (7, 3, 9)])
        assert policy.victims(3) == [7, 3, 9]

    def test_law_5_a_slot_may_come_back(self, policy: EvictionPolicy) -> None:
        """Idle, in use, idle again: held once, and leaves once."""
        for _ in range(3):
            policy.admit(_slots(2))
            policy.reclaim(_slots(2))
        policy.admit(_slots(2))
        assert sorted(policy.victims(2)) == _slots(2)

    def test_law_6_counts_hold_over_any_life(
        self, policy: EvictionPolicy, keys: list[SequenceHash | None]
    ) -> None:
        """Whatever the order of calls, the policy holds exactly what it was given and not asked."""
        world = _World(policy, keys, random.Random(6))
        for _ in range(5000):
            world.step()
            assert len(policy) == len(world.held)

    def test_law_7_slots_come_as_any_iterable(self, policy: EvictionPolicy) -> None:
        """A generator is read once and to its end."""
        policy.admit(slot for slot in _slots(4))
        policy.reclaim(slot for slot in _slots(2))
        assert len(policy) == 2
        assert sorted(policy.victims(2)) == [2, 3]

    def test_law_8_spared_slots_are_held_again(self, policy: EvictionPolicy) -> None:
        """Reclaimed and not used, or chosen and not evicted: as if nothing had happened."""
        policy.admit(_slots(4))
        policy.reclaim([SlotId(2)])
        policy.spare([SlotId(2)])
        policy.spare(policy.victims(4))
        assert len(policy) == 4
        assert sorted(policy.victims(4)) == _slots(4)

    def test_law_9_a_forgotten_slot_is_a_new_one(self, policy: EvictionPolicy) -> None:
        """Held or in use, known or not: a forgotten slot never leaves, and may come back."""
        policy.admit(_slots(4))
        policy.reclaim([SlotId(3)])
        policy.forget([SlotId(0), SlotId(3), SlotId(9)])
        assert len(policy) == 2
        policy.admit([SlotId(0), SlotId(3), SlotId(9)])
        assert sorted(policy.victims(5)) == [0, 1, 2, 3, 9]

    def test_law_10_what_comes_only_advises(
        self, policy: EvictionPolicy, keys: list[SequenceHash | None]
    ) -> None:
        """Keys of blocks known, unknown, gone, or more of them than places: still n or none."""
        policy.admit(_slots(8))
        for count in (1, 2, 3):
            coming = [_key(number) for number in (0, 3, 99, 100 + count, 7)]
            gone = policy.victims(count, coming)
            assert len(gone) == count
            for slot, key in zip(gone, coming, strict=False):
                keys[slot] = key
            policy.admit(gone)
        assert len(policy.victims(8)) == 8


class _World:
    """A tier as the pool lives it: free, idle and in-use slots, and blocks that come back."""

    def __init__(
        self, policy: EvictionPolicy, keys: list[SequenceHash | None], luck: random.Random
    ) -> None:
        self.policy, self.keys, self.luck = policy, keys, luck
        self.held: set[SlotId] = set()
        self.in_use: set[SlotId] = set()

    def step(self) -> None:
        """Do one thing that a pool may do."""
        policy, luck = self.policy, self.luck
        idle, busy = self._some(self.held), self._some(self.in_use)
        match luck.randrange(6):
            case 0:
                self._insert()
            case 1:
                policy.reclaim(idle)
                self.held.difference_update(idle)
                self.in_use.update(idle)
            case 2 | 3 as which:
                (policy.admit if which == 2 else policy.spare)(busy)
                self.in_use.difference_update(busy)
                self.held.update(busy)
            case 4:
                policy.forget(gone := [*idle, *busy])
                self.held.difference_update(gone)
                self.in_use.difference_update(gone)
            case _:
                self._evict()

    def _some(self, slots: set[SlotId]) -> list[SlotId]:
        return self.luck.sample(sorted(slots), min(self.luck.randint(0, 4), len(slots)))

    def _insert(self) -> None:
        free = set(_slots(_CAPACITY)) - self.held - self.in_use
        resident = {self.keys[slot] for slot in self.held | self.in_use}
        names = [key for number in range(60) if (key := _key(number)) not in resident]
        for slot in (chosen := self._some(free)):
            self.keys[slot] = names.pop(self.luck.randrange(len(names)))
        self.policy.admit(chosen)
        self.held.update(chosen)

    def _evict(self) -> None:
        count = self.luck.randint(0, 4)
        coming = [_key(self.luck.randrange(60)) for _ in range(self.luck.randint(0, 6))]
        victims = self.policy.victims(count, coming)
        assert len(victims) == (count if count <= len(self.held) else 0)
        assert self.held.issuperset(victims)
        if self.luck.random() < 0.3:
            self.policy.spare(victims)
            return
        self.held.difference_update(victims)


def _slots(count: int) -> list[SlotId]:
    return [SlotId(slot) for slot in range(count)]


def _key(number: int) -> SequenceHash:
    return SequenceHash(number.to_bytes(16, "big"))
