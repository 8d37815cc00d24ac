"""`LruPolicy` against a plain list, coldest first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.core.ids import SlotId
from kvstrata.policy import LruPolicy

CALLS = st.lists(
    st.tuples(
        st.sampled_from(["admit", "reclaim", "victims"]),
        st.lists(st.integers(0, 12).map(SlotId), min_size=1, max_size=6, unique=True),
        st.integers(0, 15),
    ),
    min_size=1,
    max_size=40,
)


@given(CALLS)
def test_slots_leave_in_the_order_in_which_they_came(calls) -> None:
    policy, held = LruPolicy(), []
    for verb, slots, count in calls:
        if verb == "admit":
            new = [slot for slot in slots if slot not in held]
            policy.admit(new)
            held += new
        elif verb == "reclaim":
            old = [slot for slot in slots if slot in held]
            policy.reclaim(old)
            held = [slot for slot in held if slot not in old]
        else:
            expected = held[:count] if count <= len(held) else []
            assert policy.victims(count) == expected
            held = held[len(expected) :]
        assert len(policy) == len(held)
    assert policy.victims(len(held)) == held
    assert len(policy) == 0


@given(st.lists(st.integers(0, 30).map(SlotId), min_size=1, unique=True), st.integers(1, 5))
def test_a_demand_that_cannot_be_met_takes_nothing(slots, excess) -> None:
    policy = LruPolicy()
    policy.admit(iter(slots))
    assert policy.victims(len(slots) + excess) == []
    assert policy.victims(0) == []
    assert policy.victims(len(slots)) == slots


def test_a_slot_that_came_back_is_the_hottest() -> None:
    policy = LruPolicy()
    policy.admit([SlotId(1), SlotId(2), SlotId(3)])
    policy.reclaim([SlotId(1)])
    policy.admit([SlotId(1)])
    assert policy.victims(3) == [2, 3, 1]


def test_a_slot_that_is_not_held_cannot_be_reclaimed() -> None:
    with pytest.raises(KeyError):
        LruPolicy().reclaim([SlotId(1)])
