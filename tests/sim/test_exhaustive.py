"""Every order of everything that can happen to a tiny node, up to a depth."""

from __future__ import annotations

import pytest

from kvstrata.core.tier import Admission
from kvstrata.pool.states import LEGAL_MOVES, SlotState
from kvstrata.testing.plants import (
    keep_stale_writes,
    register_stale_seals,
    trust_what_was_read,
)
from kvstrata.testing.tinyworld import TinyWorld, direct_moves, explore

ARRIVAL = (int(SlotState.FILLING), int(SlotState.REGISTERED))  # staged and registered in one step


@pytest.mark.parametrize(
    ("blocks", "host", "disk", "depth", "counts"),
    [
        (1, 1, 1, 10, (3633, 18155, 268)),
        (2, 1, 2, 9, (2029, 8589, 162)),
        (2, 2, 1, 9, (2578, 9870, 332)),
        (3, 2, 2, 9, (2668, 10140, 332)),
        (4, 3, 3, 8, (3295, 9717, 156)),
    ],
)
def test_no_order_of_events_breaks_a_law(blocks, host, disk, depth, counts) -> None:
    """`counts`: states, steps, blocks served. They change only with what the manager does."""
    census = explore(TinyWorld(blocks, host, disk), depth)
    assert (census.states, census.steps, census.served) == counts
    assert set(census.moves) <= LEGAL_MOVES | {ARRIVAL}
    assert direct_moves(census) == LEGAL_MOVES, "every line of the table of moves was used"


@pytest.mark.parametrize(
    ("admission", "blocks", "host", "disk", "depth", "counts"),
    [
        (Admission.ON_EVICT, 2, 2, 1, 8, (1049, 3782, 140)),
        (Admission.ON_EVICT, 3, 2, 2, 8, (1053, 3782, 140)),
        (Admission.FREQUENCY, 1, 1, 1, 10, (1965, 9566, 121)),
        (Admission.FREQUENCY, 2, 2, 1, 9, (1327, 5435, 128)),
    ],
)
def test_no_order_of_events_breaks_a_law_whatever_enters_the_disk(
    admission, blocks, host, disk, depth, counts
) -> None:
    census = explore(TinyWorld(blocks, host, disk, admission), depth)
    assert (census.states, census.steps, census.served) == counts
    assert set(census.moves) <= LEGAL_MOVES | {ARRIVAL}


def test_counts_do_not_depend_on_the_run() -> None:
    assert explore(TinyWorld(2, 1, 1), 6) == explore(TinyWorld(2, 1, 1), 6)


@pytest.mark.parametrize("plant", [trust_what_was_read, register_stale_seals, keep_stale_writes])
def test_a_planted_bug_is_met(plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="after"):
        explore(TinyWorld(1, 1, 1), 10)
