"""Merged and split runs against a byte-by-byte copy, targets poisoned."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.transfer.cuda.runs import Run, merge_runs, split_runs

UNIT, UNITS = 3, 12
POISON = 0xEE
SOURCE = bytes(range(UNIT * UNITS))
PAIRS = st.permutations(range(UNITS)).flatmap(
    lambda targets: st.lists(st.integers(0, UNITS - 1), min_size=1, max_size=UNITS).map(
        lambda sources: list(zip(sources, targets, strict=False))
    )
)


def moved(runs):
    target = bytearray([POISON]) * len(SOURCE)
    for run in runs:
        piece = SOURCE[run.source : run.source + run.length_bytes]
        target[run.target : run.target + run.length_bytes] = piece
    assert len(target) == len(SOURCE), "a run reaches outside"
    return bytes(target)


@given(PAIRS, st.integers(1, 40))
def test_merged_and_split_runs_move_what_was_asked_and_nothing_else(pairs, limit):
    asked = [Run(source * UNIT, target * UNIT, UNIT) for source, target in pairs]
    merged = merge_runs(asked)
    assert moved(merged) == moved(asked)
    assert not any(
        a.source + a.length_bytes == b.source and a.target + a.length_bytes == b.target
        for a, b in pairwise(merged)
    )
    pieces = split_runs(merged, limit)
    assert moved(pieces) == moved(asked)
    assert all(1 <= piece.length_bytes <= limit for piece in pieces)


def test_neighbours_on_one_side_only_stay_apart():
    assert merge_runs([Run(0, 10, 5), Run(5, 15, 5)]) == [Run(0, 10, 10)]
    assert len(merge_runs([Run(0, 10, 5), Run(6, 15, 5)])) == 2
    assert len(merge_runs([Run(0, 10, 5), Run(5, 16, 5)])) == 2


@pytest.mark.parametrize("runs", [[Run(0, 0, 0)], [Run(-1, 0, 4)], [Run(0, 0, 4), Run(8, 3, 4)]])
def test_what_cannot_be_meant_is_refused(runs):
    with pytest.raises(ValueError, match=r"moves nothing|same bytes"):
        merge_runs(runs)


def test_a_limit_below_one_byte_is_refused():
    with pytest.raises(ValueError, match="move nothing"):
        split_runs([Run(0, 0, 4)], 0)
