"""Following a daemon's tiers: what is told of blocks, and what is told when nobody can know."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from kvstrata.connectors.following import Follower, Moved, is_local
from kvstrata.core.config import parse_tiers, tier_names
from kvstrata.core.errors import DaemonError
from kvstrata.core.ids import HASH_BYTES, SequenceHash
from kvstrata.core.tier import DISK, HOST
from kvstrata.manager.changes import Changes
from kvstrata.runtime import messages as wire

KEYS = [SequenceHash(bytes([block] * HASH_BYTES)) for block in range(5)]


def came(tier, names):
    return Moved(tier, stored=True, names=names)


def left(tier, names):
    return Moved(tier, stored=False, names=names)


class Followed:
    """A session's standing, and a record of changes as the daemon keeps it."""

    def __init__(self, limit: int) -> None:
        self.welcome, self.epoch, self.record, self.asked = object(), 1, Changes(limit), 0
        self.fails = False

    def changes(self, cursor):
        self.asked += 1
        if self.fails:
            raise DaemonError("gone")
        got = self.record.since(cursor)
        rows = [(str(each.tier), each.stored, b"".join(each.keys)) for each in got.changes]
        return wire.Changed(got.cursor, got.lost, got.more, rows)


class World:
    """A follower of five blocks, named 0 to 4, with its session and what it counts."""

    def __init__(self, *, known_max=100, limit=1000, interval_s=0.0) -> None:
        self.session, self.counted = Followed(limit), Counter()
        self.follower = Follower[int](self._count, interval_s=interval_s, known_max=known_max)
        self.take()
        for name, key in enumerate(KEYS):
            self.follower.know(key, name)

    def _count(self, name, number) -> None:
        self.counted[name] += number

    def note(self, tier, keys, *, stored) -> None:
        self.session.record.note(tier, keys, stored=stored)

    def take(self):
        return self.follower.take(self.session)


def test_a_block_is_told_of_once_in_each_tier():
    world = World()
    world.note(HOST, KEYS[:2], stored=True)
    world.note(HOST, KEYS[:3], stored=True)
    world.note(DISK, KEYS[1:2], stored=True)
    world.note(HOST, [SequenceHash(b"?" * HASH_BYTES)], stored=True)
    assert world.take() == [came("host", [0, 1]), came("host", [2]), came("disk", [1])]
    assert world.counted["untold_blocks"] == 1, "another engine's"
    assert world.take() == []
    world.note(HOST, KEYS, stored=False)
    assert world.take() == [left("host", [0, 1, 2])], "the others were never there"
    world.note(HOST, KEYS[:1], stored=False)
    assert world.take() == []
    world.note(HOST, KEYS[:2], stored=True)
    assert world.take() == [came("host", [0, 1])], "once more"


@pytest.mark.parametrize("how", ["missed", "another daemon", "no daemon", "forgotten"])
def test_what_cannot_be_followed_is_told_as_gone(how):
    world = World(limit=8)
    world.note(HOST, KEYS[:2], stored=True)
    world.note(DISK, KEYS[1:2], stored=True)
    world.take()
    if how == "missed":
        world.note(HOST, KEYS * 2, stored=False)
        world.note(HOST, KEYS * 2, stored=True)
    elif how == "another daemon":
        world.session.epoch = 2
    elif how == "no daemon":
        world.session.welcome = None
    else:
        world.follower.forget()
    assert world.take() == [left("host", [0, 1]), left("disk", [1])]
    assert world.counted["missed_changes"] == (how == "missed")
    assert world.take() == []
    world.session.welcome = object()
    world.take()
    world.note(HOST, KEYS[:1], stored=True)
    assert world.take() == [came("host", [0])], "it goes on"


def test_a_call_that_fails_says_nothing():
    world = World()
    world.note(HOST, KEYS[:1], stored=True)
    world.session.fails = True
    assert world.take() == []
    world.session.fails = False
    assert world.take() == [came("host", [0])]


def test_no_more_is_remembered_than_there_is_room_for():
    world = World(known_max=2)
    assert [world.follower.knows(key) for key in KEYS] == [False] * 3 + [True] * 2
    world.note(HOST, KEYS, stored=True)
    assert world.take() == [came("host", [3, 4])], "the others were forgotten first"
    assert world.counted["untold_blocks"] == 3
    for name in range(2):
        world.follower.know(KEYS[name], name)
    world.note(HOST, KEYS[:2], stored=True)
    gone = [left("host", [3]), left("host", [4])]
    assert world.take() == [came("host", [0, 1]), *gone], "no room for them"
    world.note(HOST, KEYS, stored=False)
    assert world.take() == [left("host", [0, 1])]


@pytest.mark.parametrize("seed", range(40))
def test_what_is_believed_is_there(seed):
    """Whatever happens; and nothing is told of as gone that was not told of."""
    luck = random.Random(seed)
    world = World(known_max=luck.choice([2, 3, 100]), limit=luck.choice([4, 10, 1000]))
    there, believed = set(), set()
    for _ in range(300):
        tier, name = luck.choice([HOST, DISK]), luck.randrange(5)
        match luck.randrange(12):
            case 0:
                world.session.epoch += 1  # another daemon, which has nothing
                world.session.record, there = Changes(10), set()
            case 1:
                world.follower.forget()
            case 2 | 3:
                for place, key in enumerate(KEYS):
                    world.follower.know(key, place)
            case 4 | 5 | 6 | 7:
                there.add((tier, name))
                world.note(tier, [KEYS[name]], stored=True)
            case _:
                there.discard((tier, name))
                world.note(tier, [KEYS[name]], stored=False)
        if luck.random() < 0.5:
            continue
        for _ in range(3):  # what cannot be followed, what came since, nothing
            moves = world.take()
            for moved in moves:
                named = {(moved.tier, name) for name in moved.names}
                assert len(named) == len(moved.names) > 0
                assert named.isdisjoint(believed) if moved.stored else named <= believed
                believed ^= named
        assert not moves
        assert believed <= there
        assert len({name for _, name in believed}) <= world.follower._known_max


def test_the_daemon_is_asked_once_in_an_interval_and_at_once_if_there_is_more():
    world = World(interval_s=3600.0)
    asked = world.session.asked
    world.note(HOST, KEYS[:1], stored=True)
    assert world.take() == []
    assert world.session.asked == asked == 1
    world = World()
    for place in range(300):  # an answer has 64 changes, a turn four answers
        world.note(HOST, KEYS[:1], stored=not place % 2)
    asked = world.session.asked
    assert len(world.take()) == 256
    assert len(world.take()) == 44
    assert world.session.asked - asked == 5


def test_only_a_tier_that_daemons_may_share_is_not_local():
    tiers = parse_tiers("host:1GiB,disk:/a:1GiB,disk:/b:1GiB,shared:/c:1GiB,shared:/d:1GiB")
    local = {str(name): is_local(name) for name in tier_names(tiers)}
    assert local == {
        "host": True, "disk": True, "disk2": True, "shared": False, "shared2": False,
    }  # fmt: skip
