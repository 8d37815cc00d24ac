"""Each policy against the plainest program for the same rule, one block at a time.

The programs below are written from the papers with lists of keys; they know nothing of slots,
batches or use. `libcachesim` is one more judge, in tests/property/test_policy_rivals.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.policy import make_policy, policy_names
from kvstrata.policy.auto import CANDIDATES
from kvstrata.policy.shadow import Shadow
from kvstrata.pool import Pool


def key(number: int) -> SequenceHash:
    return SequenceHash(number.to_bytes(16, "big"))


def play(name: str, references: Iterable[int], capacity: int) -> list[bool]:
    """Use one block after the other through the real pool."""
    pool, hits = Pool(capacity, make_policy(name)), []
    for number in references:
        slots = pool.match([key(number)])
        hits.append(bool(slots))
        if slots:
            pool.touch(slots)
            continue
        room = pool.reserve(1, [key(number)])
        assert room is not None
        pool.stage(room.slots)
        pool.register(room.slots, [key(number)], [None])
        pool.check()
    return hits


def lru(references: Iterable[int], capacity: int) -> list[bool]:
    order: list[int] = []
    hits = []
    for number in references:
        hits.append(number in order)
        order = [*(each for each in order if each != number), number][-capacity:]
    return hits


def arc(references: Iterable[int], size: int) -> list[bool]:  # noqa: C901  # four cases, as there
    """The procedure ARC(c) of the paper, figure 4; lists have their LRU end first."""
    t1: list[int] = []
    t2: list[int] = []
    b1: list[int] = []
    b2: list[int] = []
    p, hits = 0.0, []

    def replace(number: int) -> None:
        if t1 and (len(t1) > p or (number in b2 and len(t1) == p) or not t2):
            b1.append(t1.pop(0))
        else:
            b2.append(t2.pop(0))

    for number in references:
        hits.append(number in t1 + t2)
        if number in t1 + t2:
            (t1 if number in t1 else t2).remove(number)
            t2.append(number)
        elif number in b1 + b2:
            once, often = len(b1), len(b2)
            if number in b1:
                p = min(size, p + max(1.0, often / once))
            else:
                p = max(0.0, p - max(1.0, once / often))
            if len(t1) + len(t2) == size:
                replace(number)
            (b1 if number in b1 else b2).remove(number)
            t2.append(number)
        else:
            if len(t1) + len(t2) == size:
                replace(number)
            t1.append(number)
            while b1 and len(t1) + len(b1) > size:
                b1.pop(0)
            while b2 and len(t1 + t2 + b1 + b2) > 2 * size:
                b2.pop(0)
    return hits


def two_q(references: Iterable[int], size: int) -> list[bool]:
    queue: list[int] = []
    kept: list[int] = []
    ghosts: list[int] = []
    hits = []
    for number in references:
        hits.append(number in queue + kept)
        if number in kept:
            kept.remove(number)
            kept.append(number)
        elif number not in queue:
            returns = number in ghosts
            if returns:
                ghosts.remove(number)
            if len(queue + kept) == size:
                if len(queue) > max(1, int(size * 0.25)) or not kept:
                    ghosts.append(queue.pop(0))
                    del ghosts[: -max(1, int(size * 0.5))]
                else:
                    kept.pop(0)
            (kept if returns else queue).append(number)
    return hits


def lru2(references: Iterable[int], size: int) -> list[bool]:
    uses: dict[int, list[int]] = {}  # of residents: numbers of their uses
    young: dict[int, int] = {}
    old: dict[int, int] = {}
    hits = []
    for now, number in enumerate(references, 1):
        hits.append(number in uses)
        if number not in uses:
            if len(uses) == size:
                gone = min(uses, key=lambda each: (uses[each][-2:-1] or [0]) + uses[each][-1:])
                young[gone] = uses.pop(gone)[-1]
                if len(young) > 2 * size:
                    old, young = young, {}
            last = young.pop(number, 0) or old.pop(number, 0)
            uses[number] = [last] if last else []
        uses[number].append(now)
    return hits


def s3fifo(references: Iterable[int], size: int) -> list[bool]:
    small: list[int] = []
    main: list[int] = []
    ghosts: list[int] = []
    used: dict[int, int] = {}
    small_max = max(1, int(size * 0.1))
    hits = []

    def evict() -> bool:
        if small and (len(small) >= small_max or not main):
            number = small.pop(0)
            if used[number] > 1:
                used[number] = 0
                main.append(number)
                return False
            ghosts.append(number)
            del ghosts[: -max(1, size - small_max)]
            return True
        number = main.pop(0)
        if used[number]:
            used[number] -= 1
            main.append(number)
            return False
        return True

    for number in references:
        hits.append(number in small + main)
        if hits[-1]:
            used[number] = min(used[number] + 1, 3)
            continue
        if len(small + main) == size:
            while not evict():
                pass
        returns = number in ghosts
        if returns:
            ghosts.remove(number)
        used[number] = 0
        (main if returns else small).append(number)
    return hits


ORACLES: dict[str, Callable[[Iterable[int], int], list[bool]]] = {
    "lru": lru,
    "arc": arc,
    "lru2": lru2,
    "2q": two_q,
    "s3fifo": s3fifo,
}
REFERENCES = st.lists(st.integers(0, 24), max_size=300)
CAPACITIES = st.integers(2, 14)


@pytest.mark.parametrize("name", ORACLES)
@given(references=REFERENCES, capacity=CAPACITIES)
def test_a_policy_hits_what_the_plain_program_hits(name, references, capacity) -> None:
    assert play(name, references, capacity) == ORACLES[name](references, capacity)


def test_arc_remembers_a_block_whose_return_nobody_announced() -> None:
    policy, keys = make_policy("arc"), [key(number) for number in range(4)]
    policy.bind(4, keys)
    policy.admit([SlotId(slot) for slot in range(4)])
    assert policy.victims(1) == [0]
    policy.admit([SlotId(0)])  # the same block again, into the place that it left
    for slot in (1, 2, 3):
        policy.reclaim([SlotId(slot)])
        policy.spare([SlotId(slot)])  # by time alone, block 0 would be the coldest now
    assert policy.victims(4) == [1, 2, 3, 0]


def test_every_shipped_policy_but_auto_has_an_oracle() -> None:
    assert {*ORACLES, "auto"} == set(policy_names())


@given(references=REFERENCES, capacity=CAPACITIES)
def test_auto_with_one_candidate_is_that_candidate(references, capacity) -> None:
    from kvstrata.policy import AutoPolicy

    for name, make in CANDIDATES.items():
        pool = Pool(capacity, AutoPolicy({name: make}))
        hits = []
        for number in references:
            slots = pool.match([key(number)])
            hits.append(bool(slots))
            if slots:
                pool.touch(slots)
                continue
            room = pool.reserve(1, [key(number)])
            pool.stage(room.slots)
            pool.register(room.slots, [key(number)], [None])
        assert hits == play(name, references, capacity)


@pytest.mark.parametrize("name", CANDIDATES)
@given(references=REFERENCES, capacity=CAPACITIES)
def test_who_follows_itself_decides_alike(name, references, capacity) -> None:
    """A follower that is told of another one's victims goes on as if they had been its own."""
    leader, follower = CANDIDATES[name](), CANDIDATES[name]()
    keys: list[SequenceHash | None] = [None] * capacity
    leader.bind(capacity, keys)
    follower.bind(capacity, keys)
    for number in references:
        if key(number) in keys:
            slot = SlotId(keys.index(key(number)))
            leader.reclaim([slot])
            follower.reclaim([slot])
        else:
            slot = SlotId(keys.index(None)) if None in keys else leader.victims(1)[0]
            if None not in keys:
                follower.evict([slot])
            keys[slot] = key(number)
        leader.admit([slot])
        follower.admit([slot])
        assert len(leader) == len(follower)
    assert leader.victims(len(leader)) == follower.victims(len(follower))


@pytest.mark.parametrize("name", policy_names())
@given(references=REFERENCES, capacity=CAPACITIES)
def test_a_shadow_hits_what_the_pool_hits(name, references, capacity) -> None:
    shadow = Shadow(make_policy(name), capacity)
    assert [bool(shadow.use([key(number)])) for number in references] == play(
        name, references, capacity
    )
    assert (shadow.uses, shadow.hits) == (len(references), sum(play(name, references, capacity)))


def test_a_block_used_twice_outlives_a_newer_one_used_once() -> None:
    assert play("lru2", [1, 1, 2, 3, 1], 2) == [False, True, False, False, True]
