"""What the matrix says `works` ran in this run and passed; runs last, after every lane.

Here `works` speaks of each engine's newest tested release. Of an older one that has a lane of its
own (`make test-vllm-old`) what that lane names must have run, too.

Each lane of `make test` writes what came of its tests below build/outcomes (`--outcomes`). With
KVSTRATA_MATRIX=strict, as CI has it, a test that was skipped, or whose lane did not run, fails
here; otherwise it is named and skipped, since not every machine can run every engine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from kvstrata.connectors.matrix import matrix

FOLDER = Path(__file__).resolve().parents[2] / "build" / "outcomes"
OLDER = FOLDER.parents[1] / "tests" / "engine" / "older.txt"
NAMED = {
    engine: sorted({c.test for c in matrix() if (c.engine, c.status) == (engine, "works")})
    for engine in sorted({c.engine for c in matrix() if c.status == "works"})
}


def judge(lines: Iterable[str], named: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return which of these tests failed, and which did not pass in all that ran of them."""
    found: dict[str, set[str]] = {}
    for line in lines:
        outcome, _, test = line.partition(" ")
        for name in {test, test.partition("[")[0]}:
            found.setdefault(name, set()).add(outcome)
    failed = [test for test in named if "failed" in found.get(test, ())]
    return failed, [test for test in named if found.get(test) != {"passed"}]


@pytest.mark.parametrize("engine", NAMED)
def test_what_works_ran_and_passed(engine):
    texts = [path.read_text(encoding="utf-8") for path in FOLDER.glob("*.txt")]
    failed, unseen = judge("".join(texts).splitlines(), NAMED[engine])
    assert not failed, "the matrix says that they work"
    if os.environ.get("KVSTRATA_MATRIX") == "strict":
        assert not unseen, f"skipped, or their lane did not run; see {FOLDER.name}"
    elif unseen:
        count = f"{len(unseen)} of {len(NAMED[engine])}"
        pytest.skip(f"{engine}: {count} tests that the matrix names did not run here")


def test_the_older_release_ran_and_passed():
    found = FOLDER / "older" / "vllm.txt"
    lines = found.read_text(encoding="utf-8").splitlines() if found.exists() else []
    assert not [line for line in lines if line.startswith("failed ")]
    named = OLDER.read_text(encoding="utf-8").split()
    passed = tuple(line.removeprefix("passed ") for line in lines if line.startswith("passed "))
    unseen = [name for name in named if not any(test.startswith(name) for test in passed)]
    if os.environ.get("KVSTRATA_MATRIX") == "strict":
        assert not unseen, "skipped, or `make test-vllm-old` did not run"
    elif unseen:
        pytest.skip(f"older vLLM: {len(unseen)} of {len(named)} tests did not run here")


def test_only_what_passed_in_every_case_was_seen():
    lines = [
        *("passed a::good", "passed a::cases[1]", "passed a::cases[2]", "skipped a::cases[x y]"),
        *("skipped a::skipped", "passed a::late", "failed a::late"),
    ]
    named = ["a::good", "a::cases", "a::cases[1]", "a::skipped", "a::late", "a::goo"]
    assert judge(lines, named) == (["a::late"], ["a::cases", "a::skipped", "a::late", "a::goo"])
