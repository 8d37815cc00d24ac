"""LRU, ARC and 2Q against libcachesim at every reference: somebody else's reading of the papers.

On random references, and on a piece of a real trace, deepest block first. The answers must be the
same at every single reference, not on average.
"""

from __future__ import annotations

import random
import sys
from functools import cache

import pytest

from kvstrata.core.ids import SequenceHash
from kvstrata.policy import make_policy
from kvstrata.policy.shadow import Shadow

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libcachesim has wheels for Linux")

RIVALS = {"lru": "LRU", "arc": "ARC", "2q": "TwoQ"}


def skewed(luck: random.Random) -> list[int]:
    return [int(luck.paretovariate(0.6)) % 3000 for _ in range(20_000)]


def looping(luck: random.Random) -> list[int]:
    return [
        turn * 7 % 500 if luck.random() < 0.7 else luck.randrange(5000) for turn in range(20_000)
    ]


def conversations(luck: random.Random) -> list[int]:
    """Chats that grow by a turn at a time, over and over, and are used from their ends."""
    chats: list[list[int]] = [[0] for _ in range(300)]
    references: list[int] = []
    new = 1
    while len(references) < 40_000:
        chat = chats[min(int(luck.paretovariate(0.5)), 300) - 1]
        chat += range(new, grown := new + luck.randint(1, 8))
        new = grown
        references += reversed(chat)
        if len(chat) > 80:
            chat[1:] = []
    return references


LOADS = {load.__name__: load for load in (skewed, looping, conversations)}


@cache
def references_of(load: str) -> list[int]:
    return LOADS[load](random.Random(5))


def theirs(name: str, references: list[int], capacity: int) -> list[bool]:
    import libcachesim

    cache, hits = getattr(libcachesim, RIVALS[name])(capacity), []
    for number in references:
        request = libcachesim.Request()
        request.obj_id, request.obj_size = number, 1
        hits.append(bool(cache.get(request)))
    return hits


@pytest.mark.parametrize("capacity", [50, 400, 2000])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("name", RIVALS)
def test_every_reference_has_the_same_answer(name, load, capacity) -> None:
    references = references_of(load)
    shadow = Shadow(make_policy(name), capacity)
    keys = [SequenceHash(number.to_bytes(16, "big")) for number in references]
    ours = [bool(shadow.use([key])) for key in keys]
    assert ours == theirs(name, references, capacity)
    assert 0 < sum(ours) < len(ours)
