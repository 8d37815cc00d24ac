"""The laws of `EvictionPolicy`; docs/contracts/eviction-policy.md says them in words."""

from __future__ import annotations

import random

import pytest

from kvstrata.core.ids import SlotId
from kvstrata.policy import EvictionPolicy

__all__ = ["EvictionPolicyContract"]


class EvictionPolicyContract:
    """Subclass and provide the fixture `policy`: a fresh, empty policy for each test."""

    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        """Return the policy under test."""
        raise NotImplementedError("a contract suite is given its subject by a subclass")

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

    def test_law_6_counts_hold_over_any_life(self, policy: EvictionPolicy) -> None:
        """Whatever the order of calls, the policy holds exactly what it was given and not asked."""
        luck = random.Random(6)
        held: set[SlotId] = set()
        for _ in range(2000):
            free = [slot for slot in _slots(20) if slot not in held]
            count = luck.randint(0, 4)
            match luck.randrange(3):
                case 0:
                    chosen = luck.sample(free, min(count, len(free)))
                    policy.admit(chosen)
                    held.update(chosen)
                case 1:
                    chosen = luck.sample(sorted(held), min(count, len(held)))
                    policy.reclaim(chosen)
                    held.difference_update(chosen)
                case _:
                    victims = policy.victims(count)
                    assert len(victims) == (count if count <= len(held) else 0)
                    assert held.issuperset(victims)
                    held.difference_update(victims)
            assert len(policy) == len(held)

    def test_law_7_slots_come_as_any_iterable(self, policy: EvictionPolicy) -> None:
        """A generator is read once and to its end."""
        policy.admit(slot for slot in _slots(4))
        policy.reclaim(slot for slot in _slots(2))
        assert len(policy) == 2
        assert sorted(policy.victims(2)) == [2, 3]


def _slots(count: int) -> list[SlotId]:
    return [SlotId(slot) for slot in range(count)]
