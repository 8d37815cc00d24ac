"""Exact behaviour of the pool where the order matters."""

from __future__ import annotations

import pytest

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.policy import LruPolicy
from kvstrata.pool import Pool


def key(number: int) -> SequenceHash:
    return SequenceHash(number.to_bytes(16, "big"))


def store(pool: Pool, number: int, parent: int | None) -> SlotId:
    reservation = pool.reserve(1)
    assert reservation is not None
    pool.stage(reservation.slots)
    pool.register(reservation.slots, [key(number)], [None if parent is None else key(parent)])
    return reservation.slots[0]


def chain(slots: int, *numbers: int) -> Pool:
    """Return a pool that holds a chain which grew block by block: its root is the coldest."""
    pool, parent = Pool(slots, LruPolicy()), None
    for number in numbers:
        store(pool, number, parent)
        parent = number
    return pool


def test_a_fresh_pool_hands_out_neighbours_in_rising_order() -> None:
    reservation = Pool(4, LruPolicy()).reserve(3)
    assert reservation is not None
    assert reservation.slots == [0, 1, 2]
    assert reservation.evicted == []


def test_a_chain_leaves_from_its_end_although_its_root_is_the_coldest() -> None:
    pool = chain(3, 1, 2, 3)
    for number in (3, 2, 1):
        reservation = pool.reserve(1)
        assert reservation is not None
        assert reservation.evicted == [key(number)]
    pool.check()


def test_a_whole_chain_can_make_room_at_once() -> None:
    pool = chain(4, 1, 2, 3)
    reservation = pool.reserve(4)
    assert reservation is not None
    assert reservation.evicted == [key(3), key(2), key(1)]
    pool.check()


def test_a_pinned_leaf_keeps_its_ancestors() -> None:
    pool = chain(3, 1, 2, 3)
    with pool.pin(pool.match([key(1), key(2), key(3)])[2:]):
        before = pool.statistics()
        assert pool.reserve(1) is None
        assert pool.statistics() == before
    assert pool.reserve(1) is not None
    pool.check()


def test_a_parent_passed_over_becomes_the_hottest() -> None:
    pool = chain(4, 1, 2)
    store(pool, 8, None)
    store(pool, 9, None)
    evicted = []
    for _ in range(4):
        reservation = pool.reserve(1)
        assert reservation is not None
        evicted += reservation.evicted
    assert evicted == [key(2), key(8), key(9), key(1)]


def test_a_second_copy_is_dropped_and_its_slot_is_free_again() -> None:
    pool = Pool(3, LruPolicy())
    first = store(pool, 1, None)
    reservation = pool.reserve(2)
    assert reservation is not None
    pool.stage(reservation.slots)
    assert pool.register(reservation.slots, [key(1), key(1)], [None, None]) == []
    assert pool.match([key(1)]) == [first]
    assert pool.statistics().duplicates == 2
    assert pool.statistics().free == 2
    pool.check()


def test_a_block_withdrawn_while_it_is_read_is_freed_by_its_last_reader() -> None:
    pool = chain(1, 1)
    slots = pool.match([key(1)])
    first, second = pool.pin(slots), pool.pin(slots)
    pool.withdraw([key(1)])
    first.release()
    assert pool.statistics().quarantined == 1
    second.release()
    second.release()
    assert pool.statistics().free == 1
    pool.check()


@pytest.mark.parametrize("reader_leaves_first", [True, False])
def test_quarantine_and_reader_must_both_end(*, reader_leaves_first: bool) -> None:
    pool = chain(1, 1)
    pin = pool.pin(pool.match([key(1)]))
    held = pool.withdraw([key(1)], quarantine=True)
    ends = [pin.release, lambda: pool.end_quarantine(held)]
    for end in ends if reader_leaves_first else reversed(ends):
        assert pool.statistics().quarantined == 1
        end()
    assert pool.statistics().free == 1
    pool.check()


def test_every_reservation_raises_the_generation_also_of_a_slot_that_was_given_back() -> None:
    pool = Pool(1, LruPolicy())
    seen = [pool.generations[0]]
    for _ in range(3):
        reservation = pool.reserve(1)
        assert reservation is not None
        pool.abort(reservation.slots)
        seen.append(pool.generations[0])
    assert seen == sorted(set(seen))


def test_a_slot_is_never_given_back_by_someone_who_does_not_write_to_it() -> None:
    pool = chain(2, 1)
    for slot in (0, 1):
        with pytest.raises(AssertionError):
            pool.abort([SlotId(slot)])


def test_a_pool_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 slot"):
        Pool(0, LruPolicy())


@pytest.mark.parametrize("length", [2, 3, 5, 256, 257, 600])
@pytest.mark.parametrize("stranger", [False, True])
def test_a_match_stops_at_the_first_miss_wherever_it_is(length, stranger) -> None:
    """Neighbouring slots are compared piece by piece: a gap within a piece must not be missed."""
    whole = [key(number) for number in range(1, length + 1)]
    for gap in sorted({0, 1, length // 2, length - 1}):
        pool = Pool(length + 1, LruPolicy())
        room = pool.reserve(length, whole)
        assert room is not None
        pool.stage(room.slots)
        pool.register(room.slots, whole, [None, *whole[:-1]])
        assert pool.match(whole) == room.slots
        (slot,) = pool.withdraw([whole[gap]])
        if stranger:  # another block takes the very slot of the one that is gone
            spare = pool.reserve(2)
            assert spare is not None
            pool.abort([each for each in spare.slots if each != slot])
            pool.stage([slot])
            pool.register([slot], [key(9999)], [None])
        assert pool.match(whole) == room.slots[:gap]
        expected = [each if place != gap else None for place, each in enumerate(room.slots)]
        assert pool.scan(whole) == expected
        assert pool.match(tuple(whole)) == room.slots[:gap]
        pool.check()
