"""Tables of runs against single runs, and tiles against the runs that they are cut from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.transfer.cuda.runs import Run, merge_runs, split_runs
from kvstrata.transfer.cuda.tables import RunTable, merge_table, table_of, tile_table, unit_bytes

RUNS = st.lists(
    st.builds(Run, st.integers(0, 12), st.integers(0, 40), st.integers(1, 5)), max_size=8
)
# Pieces of two bytes side by side at the target; neighbours come from one place, or from anywhere.
SIDE_BY_SIDE = st.lists(st.integers(0, 3), min_size=2, max_size=8).map(
    lambda sources: [Run(2 * source, 2 * at, 2) for at, source in enumerate(sources)]
)


def runs_of(table):
    columns = (table.sources.tolist(), table.targets.tolist(), table.lengths.tolist())
    return [Run(*row) for row in zip(*columns, strict=True)]


@given(RUNS | SIDE_BY_SIDE)
def test_a_table_is_merged_or_refused_as_its_runs_are(runs):
    try:
        expected = merge_runs(runs)
    except ValueError:
        with pytest.raises(ValueError, match="same bytes"):
            merge_table(table_of(runs))
    else:
        assert runs_of(merge_table(table_of(runs))) == expected


@pytest.mark.parametrize("run", [Run(0, 0, 0), Run(-1, 0, 1), Run(0, -1, 1)])
def test_a_run_that_moves_nothing_is_refused(run):
    with pytest.raises(ValueError, match="moves nothing"):
        merge_table(table_of([Run(50, 50, 1), run]))


@given(RUNS, st.integers(1, 7))
def test_tiles_are_the_split_runs(runs, tile_bytes):
    tiles = tile_table(table_of(runs), tile_bytes)
    assert runs_of(tiles) == split_runs(runs, tile_bytes)
    assert len(tiles) == len(tiles.targets)


def test_tiles_of_no_bytes_are_refused():
    with pytest.raises(ValueError, match="move nothing"):
        tile_table(table_of([]), 0)


@given(st.lists(st.builds(Run, *[st.integers(1, 64)] * 3), min_size=1), st.sampled_from([1, 2, 16]))
def test_the_unit_divides_all_and_twice_of_it_does_not(runs, scale):
    table = table_of(runs)
    table = RunTable(table.sources * scale, table.targets * scale, table.lengths * scale)
    unit = unit_bytes(table)
    numbers = np.concatenate((table.sources, table.targets, table.lengths))
    assert not np.any(numbers % unit)
    assert unit == 16 or np.any(numbers % (2 * unit))


@pytest.mark.parametrize("run", [Run(8, 16, 16), Run(16, 8, 16), Run(16, 16, 8)])
def test_each_number_of_a_run_limits_the_unit(run):
    assert unit_bytes(table_of([Run(32, 32, 32), run])) == 8
