"""Whoever follows the daemon's changes knows at every moment what its tiers hold."""

from __future__ import annotations

import pytest

from kvstrata.core.ids import SequenceHash
from kvstrata.core.tier import HOST, TierName
from kvstrata.manager.changes import Changes
from kvstrata.testing.simworld import SimWorld


def keys(*numbers: int) -> list[SequenceHash]:
    return [SequenceHash(number.to_bytes(32, "big")) for number in numbers]


class FollowedWorld(SimWorld):
    """Compares what a follower believes with what can be found, after each step."""

    def _start_daemon(self) -> None:
        super()._start_daemon()
        self._cursor = self._manager.changes(0).cursor
        self._believed = {name: set(pool.resident()) for name, pool in self._pools()}

    def _check(self) -> None:
        super()._check()
        more = True
        while more:
            answer = self._manager.changes(self._cursor)
            assert not answer.lost
            self._cursor, more = answer.cursor, answer.more
            for change in answer.changes:
                if change.stored:
                    self._believed[change.tier] |= set(change.keys)
                else:
                    self._believed[change.tier] -= set(change.keys)
        for name, pool in self._pools():
            assert self._believed[name] == set(pool.resident()), name

    def _pools(self):
        return [(HOST, self._host), *self._lower.items()]


@pytest.mark.parametrize("first", [1, 41])
def test_a_follower_believes_what_is_true(first: int) -> None:
    served = 0
    for seed in range(first, first + 40):
        world = FollowedWorld(seed)
        try:
            world.run()
        except AssertionError as error:
            raise AssertionError(f"{seed=}") from error
        served += world.served
    assert served > 400, "worlds that serve nothing prove nothing"


def test_nothing_is_noted_before_somebody_asks() -> None:
    changes = Changes()
    changes.note(HOST, keys(1), stored=True)
    answer = changes.since(0)
    assert (answer.changes, answer.lost, answer.more) == ([], False, False)
    changes.note(HOST, keys(2), stored=True)
    (change,) = changes.since(answer.cursor).changes
    assert change.keys == keys(2)
    assert changes.since(answer.cursor).changes == [change], "asking takes nothing away"


def test_who_asks_too_seldom_is_told_so() -> None:
    changes = Changes(limit=3)
    cursor = changes.since(0).cursor
    for number in range(5):
        changes.note(HOST, keys(number), stored=True)
    answer = changes.since(cursor)
    assert (answer.lost, answer.changes) == (True, [])
    assert changes.lost_blocks == 2
    assert not changes.since(answer.cursor).lost
    assert [each.keys for each in changes.since(cursor + 2).changes] == [keys(n) for n in (2, 3, 4)]
    assert changes.since(cursor + 99).lost, "of another daemon"


def test_a_long_record_comes_in_pieces() -> None:
    changes = Changes()
    cursor = changes.since(0).cursor
    every = keys(*range(40_000))
    changes.note(TierName("disk"), every, stored=False)
    found, pieces, more = [], 0, True
    while more:
        answer = changes.since(cursor)
        cursor, more, pieces = answer.cursor, answer.more, pieces + 1
        found += [key for change in answer.changes for key in change.keys]
    assert found == every
    assert pieces == 3
