"""Groups of layers: what a hit is, against the definition itself, and small stories of hybrids."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.core.config import Limits
from kvstrata.core.ids import Holder, SequenceHash, SessionId
from kvstrata.core.tier import DISK, HOST
from kvstrata.manager import Costs, EngineSpeed, LowerTier, Manager
from kvstrata.manager.groups import Chain, longest, split
from kvstrata.policy import LruPolicy
from kvstrata.pool import Pool
from kvstrata.transfer.base import EraseJob, JobDone, ReadJob

BLOCKS = 4


def keys(group: int, *places: int) -> list[SequenceHash]:
    """Return the keys of blocks of a prompt in one group of layers."""
    return [SequenceHash(bytes([group, place]).ljust(16, b"\0")) for place in places]


# -- the definition ------------------------------------------------------------------------------

GROUPS = st.integers(0, 6).flatmap(
    lambda blocks: st.lists(
        st.tuples(st.integers(0, 4), st.lists(st.booleans(), min_size=blocks, max_size=blocks)),
        min_size=1,
        max_size=4,
    )
)


def serves(window: int, there: list[bool], blocks: int) -> bool:
    first = max(blocks - window, 0) if window else 0
    return all(there[first:blocks])


@given(GROUPS)
def test_a_hit_is_the_most_that_every_group_can_serve(groups) -> None:
    total = len(groups[0][1])
    expected = max(
        blocks
        for blocks in range(total + 1)
        if all(serves(window, there, blocks) for window, there in groups)
    )
    whole = [[*there, False].index(False) for window, there in groups if not window]
    windowed = [(window, there) for window, there in groups if window]
    assert longest(whole, windowed) == expected


@given(st.integers(0, 5), st.integers(0, 9))
def test_a_window_needs_the_last_blocks(window, blocks) -> None:
    needed = Chain([], window).needed(blocks)
    assert list(needed) == [
        place for place in range(blocks) if not window or place >= blocks - window
    ]


def test_keys_that_do_not_come_out_even_are_refused() -> None:
    with pytest.raises(ValueError, match="3 are not the same for each of 2 groups"):
        split(keys(0, 0, 1, 2), (0, 1))


# -- stories -------------------------------------------------------------------------------------


class Hybrid:
    """A model with full attention (group 0), a window of 2 blocks (1), and a state (2)."""

    windows = (0, 2, 1)

    def __init__(self, disk: int = 0) -> None:
        self.host = Pool(32, LruPolicy())
        self.disk = Pool(disk, LruPolicy()) if disk else None
        lower = [LowerTier(DISK, self.disk)] if self.disk else []
        limits = Limits(staging_timeout_s=5.0)
        self.manager = Manager(self.host, lower, limits, costs=Costs(64, 1 << 20))
        self.now, self.turn = 0.0, 0
        self.reads: list[SequenceHash] = []

    def holder(self) -> Holder:
        self.turn += 1
        return Holder(SessionId(1), str(self.turn))

    def work(self) -> None:
        while jobs := self.manager.step(self.now):
            for job in jobs:
                count = len(job.targets if isinstance(job, EraseJob) else job.slots)
                self.manager.complete(JobDone(job.transfer, (True,) * count, (b"",) * count))
                self.reads += job.keys if isinstance(job, ReadJob) else ()

    def store(self) -> None:
        for group in range(3):
            holder = self.holder()
            answer = self.manager.reserve(holder, None, keys(group, *range(BLOCKS)))
            self.manager.seal(holder, answer.slots)
        self.work()

    def all_keys(self, blocks: int = BLOCKS) -> list[SequenceHash]:
        return [key for group in range(3) for key in keys(group, *range(blocks))]

    def find(self):
        holder = self.holder()
        while True:
            answer = self.manager.lookup(holder, self.all_keys(), self.now, self.windows)
            if not answer.pending:
                return holder, answer
            self.work()


def test_a_hit_holds_what_each_group_needs_and_no_more() -> None:
    node = Hybrid()
    node.store()
    holder, answer = node.find()
    assert (answer.ready, answer.why) == (BLOCKS, "")
    got = node.manager.acquire(holder, node.all_keys(), 0.0, node.windows)
    expected = keys(0, 0, 1, 2, 3) + keys(1, 2, 3) + keys(2, 3)
    assert [node.host.hash_of(slot) for slot in got.slots] == expected
    assert got.blocks == BLOCKS
    assert len(got.generations) == len(expected)
    assert node.manager.counters.hit_blocks_host == len(expected)


@pytest.mark.parametrize(
    ("lost", "ready"),
    [
        (keys(0, 2), 2),  # full attention stops at the first block that is missing
        (keys(1, 0), 4),  # out of the window
        (keys(1, 1), 4),
        (keys(1, 2), 2),  # 3 and 4 need it
        (keys(1, 3), 3),
        (keys(2, 0), 4),
        (keys(2, 3), 3),
        (keys(2, 3) + keys(1, 2), 2),
        (keys(2, 0, 1, 2, 3), 0),
    ],
)
def test_a_block_that_is_missing_shortens_the_hit_as_far_as_its_group_needs_it(lost, ready) -> None:
    node = Hybrid()
    node.store()
    node.host.withdraw(lost)
    _, answer = node.find()
    assert answer.ready == ready
    assert bool(answer.why) == (ready < BLOCKS)


def test_only_what_is_needed_is_read_from_below() -> None:
    node = Hybrid(disk=32)
    node.store()
    node.manager.clear([HOST])
    holder, answer = node.find()
    assert answer.ready == BLOCKS
    assert sorted(node.reads) == sorted(keys(0, 0, 1, 2, 3) + keys(1, 2, 3) + keys(2, 3))
    got = node.manager.acquire(holder, node.all_keys(), 0.0, node.windows)
    assert got.staged == {DISK: 7}


def test_a_hit_is_not_longer_than_what_the_tiers_have_together() -> None:
    node = Hybrid(disk=32)
    node.store()
    node.manager.clear([HOST])
    node.disk.withdraw(keys(1, 3))
    _, answer = node.find()
    assert answer.ready == 3
    assert keys(0, 3)[0] not in node.reads, "nobody could use it"


def test_keys_of_unequal_groups_change_nothing() -> None:
    node = Hybrid()
    before = node.manager.counters.lookups
    with pytest.raises(ValueError, match="hashes"):
        node.manager.lookup(node.holder(), node.all_keys()[:-1], 0.0, node.windows)
    assert (node.manager.counters.lookups, node.manager.holds) == (before, 0)


@pytest.mark.parametrize(("lost", "ready"), [([], 2), (keys(2, 1), 1)])
def test_a_hit_is_cut_to_what_every_group_has_without_the_slow_tier(lost, ready) -> None:
    node = Hybrid(disk=32)
    node.store()
    node.host.withdraw(keys(0, 2, 3) + lost)
    node.disk.withdraw(lost)
    costs = node.manager._state.costs
    for number in range(8):  # a disk that takes a second for a block
        costs.note_read(-number, "disk", 1, float(number))
        costs.note_done(-number, number + 1.0)
    engine = EngineSpeed(10_000.0, 0.0)
    answer = node.manager.lookup(node.holder(), node.all_keys(), 9.0, node.windows, engine)
    assert (answer.ready, answer.pending) == (ready, 0)
    assert answer.why.startswith("too slow to be worth it: 2 blocks of disk") == (not lost)


class Stateful(Hybrid):
    """Attention (group 0) and a state (1) behind its blocks 1 and 3, on which the states hang."""

    windows = (0, 1)

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.host = Pool(slots, LruPolicy())
        self.manager = Manager(self.host, [], Limits(), costs=Costs(64, 1 << 20))

    def put(self, parent: SequenceHash | None, *new: SequenceHash) -> None:
        holder = self.holder()
        answer = self.manager.reserve(holder, parent, new)
        self.manager.seal(holder, answer.slots)
        self.work()

    def store(self) -> None:
        a = keys(0, *range(BLOCKS))
        self.put(None, *a[:2])
        self.put(a[1], *keys(1, 1))
        self.put(a[1], *a[2:])
        self.put(a[3], *keys(1, 3))

    def all_keys(self, blocks: int = BLOCKS) -> list[SequenceHash]:
        return [key for group in range(2) for key in keys(group, *range(blocks))]

    def kept(self, group: int) -> list[int]:
        found = self.host.scan(keys(group, *range(BLOCKS)))
        return [place for place, slot in enumerate(found) if slot is not None]


def test_a_state_is_evicted_alone_and_cuts_the_hit_to_where_there_is_one() -> None:
    node = Stateful(slots=6)
    node.store()
    seen = []
    for stranger in range(2):
        holder, answer = node.find()
        got = node.manager.acquire(holder, node.all_keys(), 0.0, node.windows)
        expected = keys(0, *range(answer.ready)) + keys(1, *node.kept(1)[-1:])
        assert [node.host.hash_of(slot) for slot in got.slots] == expected
        node.manager.release(holder)
        seen.append((node.kept(0), node.kept(1), answer.ready))
        node.put(None, *keys(9, stranger))  # a block of somebody else's needs a slot
    everything = [0, 1, 2, 3]
    assert seen == [(everything, [1, 3], 4), (everything, [1], 2)], "the deepest one goes first"


def test_a_state_that_is_lost_cuts_the_hit_to_the_one_before() -> None:
    node = Stateful(slots=8)
    node.store()
    node.host.withdraw(keys(1, 3))
    assert node.kept(0) == [0, 1, 2, 3]
    assert node.find()[1].ready == 2


def test_a_forgotten_prompt_takes_its_states_along() -> None:
    node = Stateful(slots=8)
    node.store()
    assert node.manager.forget(keys(0, 2)[0]) == 3
    assert (node.kept(0), node.kept(1)) == ([0, 1], [1])
    assert node.find()[1].ready == 2
