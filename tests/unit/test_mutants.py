"""The list of planted bugs must fit the source; `make mutants` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

import mutants

SOURCE = Path(__file__).parents[2] / "src/kvstrata"


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda each: each.name)
def test_each_planted_bug_fits_the_source_once(mutant) -> None:
    text = (SOURCE / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    assert mutant.old != mutant.new


def test_names_are_unique_and_the_page_lists_them_all() -> None:
    names = [mutant.name for mutant in mutants.MUTANTS]
    assert len(set(names)) == len(names)
    page = mutants.PAGE.read_text()
    assert all(f"| {name} |" in page for name in names)
    assert "SURVIVED" not in page


def test_a_mutant_that_does_not_fit_is_refused(tmp_path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="occurs 0 times"):
        mutants.plant(mutants.Mutant("none", "a.py", "y", "z"), tmp_path)
