"""Slots of a device that is gone: taken out of use when they are free, for good."""

from __future__ import annotations

import pytest

from kvstrata.core.config import Limits
from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.core.tier import DISK
from kvstrata.manager import LowerTier, Manager
from kvstrata.policy import make_policy
from kvstrata.pool import Pool
from kvstrata.storage.base import StoredBlock


def key(number):
    return SequenceHash(bytes([number]) * 16)


def fill(pool, *numbers):
    room = pool.reserve(len(numbers))
    pool.stage(room.slots)
    keys = [key(number) for number in numbers]
    pool.register(room.slots, keys, [None, *keys[:-1]])
    return room.slots


@pytest.fixture
def pool():
    return Pool(8, make_policy("lru"))


def test_free_slots_are_never_given_out_again(pool):
    left = pool.retire([SlotId(0), SlotId(3)])
    assert left == []
    assert pool.available == 6
    assert set(fill(pool, *range(1, 7))) == {1, 2, 4, 5, 6, 7}
    assert pool.reserve(7) is None
    assert set(pool.reserve(6).slots) == {1, 2, 4, 5, 6, 7}
    assert pool.statistics().quarantined == 2
    pool.check()


def test_slots_in_use_wait_for_their_end(pool):
    slots = fill(pool, 1, 2)
    pin = pool.pin(slots[:1])
    writing = pool.reserve(1).slots
    assert pool.retire([*slots, *writing]) == [*slots, *writing]
    pool.withdraw([key(1), key(2)])
    assert pool.retire([*slots, *writing]) == [slots[0], *writing]
    pin.release()
    pool.abort(writing)
    assert pool.retire([slots[0], *writing]) == []
    assert pool.available == 5
    pool.check()


def test_nothing_to_retire_changes_nothing(pool):
    before = pool.statistics()
    assert pool.retire([]) == []
    assert pool.statistics() == before


def test_owners_are_counted_for_what_is_left(pool):
    pool.retire([SlotId(0)])
    room = pool.reserve(2, owner=5)
    assert {slot: pool.owner_of(slot) for slot in room.slots} == dict.fromkeys(room.slots, 5)
    pool.abort(room.slots)
    pool.check()


def test_what_a_lost_device_held_is_withdrawn_and_explained():
    tier = LowerTier(DISK, Pool(8, make_policy("lru")))
    manager = Manager(Pool(8, make_policy("lru")), [tier], Limits())
    manager.recover(
        [StoredBlock(SlotId(slot), key(slot + 1), None, bytes(16), slot + 1) for slot in range(4)]
    )
    manager.lose(DISK, [SlotId(1), SlotId(2), SlotId(7)])
    assert manager.counters.lost_blocks == 2
    assert set(tier.pool.resident()) == {key(1), key(4)}
    assert manager._loading.why(key(2)).startswith("lost in disk")
    manager.lose(DISK, [SlotId(1), SlotId(2)])
    assert manager.counters.lost_blocks == 2
    assert not manager.step(1.0), "no line is blanked on a device that is gone"
    tier.pool.check()
