"""Which blocks a collector takes: oldest first, the same ones for every collector."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstrata.storage.ages import Ages

BLOCKS = st.lists(
    st.tuples(st.floats(0, 1e6), st.integers(1, 1 << 20), st.binary(min_size=16, max_size=16)),
    min_size=1,
    max_size=60,
)


def taken(ages, cut, blocks):
    return [block for block in blocks if cut.takes(ages.bucket(block[0]), block[2])]


@given(BLOCKS, st.floats(0.01, 1), st.booleans())
def test_nothing_younger_goes_before_something_older(blocks, share, whole):
    ages = Ages(60.0)
    for used_s, size, _ in blocks:
        ages.add(used_s, size)
    cut = ages.cut(int(share * ages.total_bytes), whole=whole)
    gone = taken(ages, cut, blocks)
    kept = [block for block in blocks if block not in gone]
    if gone and kept:
        assert max(ages.bucket(b[0]) for b in gone) <= min(ages.bucket(b[0]) for b in kept)


@given(BLOCKS, st.floats(0.01, 1))
def test_whole_buckets_are_enough_and_one_fewer_is_not(blocks, share):
    ages = Ages(60.0)
    for used_s, size, _ in blocks:
        ages.add(used_s, size)
    excess = max(1, int(share * ages.total_bytes))
    cut = ages.cut(excess, whole=True)
    gone = taken(ages, cut, blocks)
    assert sum(block[1] for block in gone) >= excess
    assert sum(b[1] for b in gone if ages.bucket(b[0]) < cut.bucket) < excess


def test_a_share_of_one_bucket_is_about_what_must_go():
    import random

    luck = random.Random(3)
    ages = Ages(60.0)
    blocks = [(5.0, 1000, luck.randbytes(16)) for _ in range(2000)]
    for used_s, size, _ in blocks:
        ages.add(used_s, size)
    gone = taken(ages, ages.cut(500_000, whole=False), blocks)
    assert 450 < len(gone) < 550


def test_nothing_is_in_the_way_of_an_empty_directory():
    assert not Ages(60.0).cut(100, whole=True).takes(1, bytes(16))
