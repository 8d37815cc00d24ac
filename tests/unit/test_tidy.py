"""The gates themselves: this repository passes them, and each rule fails on a planted fault."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tidy

ROOT = Path(__file__).resolve().parents[2]
ROOM = "src/kvstrata/core/thing.py"
POOL = "src/kvstrata/pool/thing.py"
SEAM = "src/kvstrata/policy/base.py"
ROOMS = [
    *("core", "tokens", "layout", "policy", "pool", "storage", "transfer", "manager"),
    *("runtime", "sim", "connectors", "apps", "testing"),
]
HOME = "/" + "home/someone/kv"


def plant(root: Path, files: dict[str, str]) -> list[str]:
    """Write `files` and return the rules that tidy then reports, a note being no rule."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [finding.rule for finding in tidy.findings(root) if finding.rule != "note"]


def lone(path: str, text: str) -> dict[str, str]:
    """Return a tree in which `path` is alive, so that nothing but its text can be wrong."""
    module = path.removeprefix("src/").removesuffix(".py").replace("/", ".")
    return {path: text, "tests/test_it.py": f"import {module}\n"}


def test_this_repository_is_tidy() -> None:
    command = [sys.executable, str(ROOT / "tools" / "tidy.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_finding_names_its_place_and_fails(tmp_path, capsys) -> None:
    plant(tmp_path, lone(ROOM, '"""Doc."""\n\nchunk = 1\n'))
    assert tidy.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.startswith(f"{ROOM}:3: word: 'chunk'")


def test_a_note_does_not_fail(tmp_path, capsys) -> None:
    plant(tmp_path, lone(ROOM, "x = 1\n" * 301))
    assert tidy.main([str(tmp_path)]) == 0
    assert ": note: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        ("syntax", "src/kvstrata/core/broken.py", "def (\n"),
        ("size", ROOM, "x = 1\n" * 601),
        ("size", ROOM, "def f():\n" + "    x = 1\n" * 60),
        ("module-name", "src/kvstrata/core/utils.py", ""),
        ("module-name", "src/kvstrata/common/thing.py", ""),
        ("word", ROOM, "def promote_all(): ...\n"),
        ("word", ROOM, "class HostChunk: ...\n"),
        ("word", ROOM, "def move(src): ...\n"),
        ("word", ROOM, "move(dst=1)\n"),
        ("word", ROOM, "x = 1  # cascades to disk\n"),
        ("word", ROOM, '"""Goes to G2."""\n'),
        ("word", ROOM, 'x = f"{chunk}"\n'),
        ("todo", ROOM, "x = 1  # TODO: later\n"),
        ("todo", "tests/unit/test_it.py", "x = 1  # FIXME\n"),
        ("field-docstring", ROOM, "@dataclass(frozen=True)\nclass A:\n    x: int\n"),
        ("field-docstring", ROOM, "class A(msgspec.Struct, tag=True):\n    x: int = 0\n"),
        ("field-docstring", ROOM, "class B(Struct): ...\nclass A(B):\n    x: int\n    y = 1\n"),
        ("hot-path", POOL, 'def f(x):\n    return f"{x}"\n'),
        ("hot-path", POOL, 'def f():\n    logger.info("x")\n'),
        ("machine-path", ROOM, f'x = "{HOME}"\n'),
    ],
)
def test_a_planted_fault_is_found(tmp_path, rule: str, path: str, text: str) -> None:
    assert set(plant(tmp_path, lone(path, text))) == {rule}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (ROOM, "def f():\n" + "    x = 1\n" * 59),
        (ROOM, "x = 1  # the folder src, and TODO: #12 later\n"),
        (ROOM, '@dataclass\nclass A:\n    x: int\n    """Doc."""\n    _y: int = 0\n'),
        (ROOM, "@dataclass\nclass _A:\n    x: int\n"),
        (ROOM, "class A:\n    x: int\n"),
        (POOL, 'def f(x):\n    if x:\n        raise ValueError(f"{x}")\n    assert x, f"{x}"\n'),
        (POOL, 'def __repr__(self):\n    return f"{self.x}"\n'),
        ("src/kvstrata/connectors/any/thing.py", "chunk = src = 1\n"),
        ("src/kvstrata/storage/thing.py", 'def f(x):\n    return f"{x}"\n'),
    ],
)
def test_what_is_right_passes(tmp_path, path: str, text: str) -> None:
    assert plant(tmp_path, lone(path, text)) == []


def test_an_allowed_word_passes_in_its_file_only(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(tidy.ALLOWED_WORDS, ROOM, frozenset({"chunk"}))
    assert plant(tmp_path, lone(ROOM, "chunk = 1  # a chunk\n")) == []
    (tmp_path / ROOM).unlink()
    assert plant(tmp_path, lone(POOL, "chunk = 1\n")) == ["word"]


def test_a_module_is_dead_until_something_uses_it(tmp_path) -> None:
    assert plant(tmp_path, {ROOM: "import kvstrata.core.thing\n"}) == ["dead-module"]
    uses = {
        "tests/test_it.py": "from kvstrata.core import thing\n",
        "src/kvstrata/__init__.py": "from .core import thing\n",
        "bench/run.py": 'PATH = "kvstrata.core.thing"\n',
        "pyproject.toml": '[project.scripts]\nkv = "kvstrata.core.thing:app"\n',
        "Makefile": "sim:\n\tpython -m kvstrata.core.thing --seeds 1\n",
    }
    for name, text in uses.items():
        assert plant(tmp_path, {name: text}) == [], name
        (tmp_path / name).unlink()


def test_a_seam_needs_its_row_its_page_and_its_suite(tmp_path) -> None:
    suite = "class EvictionPolicyContract: ...\nclass OtherContract: ...\n"
    page = "docs/contracts/eviction-policy.md"
    tree = lone(SEAM, "class EvictionPolicy(Protocol): ...\n")
    assert plant(tmp_path, tree) == ["seam", "seam"]
    suite_file = "src/kvstrata/testing/contracts/policy.py"
    alive = {"tests/test_kit.py": "import kvstrata.testing.contracts.policy\n"}
    assert plant(tmp_path, {suite_file: suite, **alive}) == ["seam"]
    assert plant(tmp_path, {page: "# laws\n"}) == []
    assert plant(tmp_path, {SEAM: "class Other(Protocol): ...\n"}) == ["seam"]


def test_index_addresses_and_inexact_locks_are_found(tmp_path) -> None:
    option = "--index" + "-url"
    assert plant(tmp_path, {"README.md": f"pip install {option} x\n"}) == ["package-index"]
    lock = {"README.md": "", "requirements/lock.txt": "# made by\na==1\nb>=2\nc==1+cpu\n"}
    assert plant(tmp_path, lock) == ["lock", "lock"]
    agree = {"requirements/lock.txt": "a==1\n", "requirements/vllm-cpu.txt": "a==2\n"}
    assert plant(tmp_path, agree) == ["lock"]


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        ("T201", "src/kvstrata/core/thing.py", 'print("x")\n'),
        ("D100", "src/kvstrata/core/thing.py", "x = 1\n"),
        ("D101", "src/kvstrata/core/thing.py", "class A: ...\n"),
        ("D103", "src/kvstrata/core/thing.py", "def f(): ...\n"),
        ("BLE001", "src/kvstrata/core/thing.py", "try:\n    f()\nexcept Exception:\n    x = 1\n"),
    ],
)
def test_ruff_keeps_the_rules_that_tidy_leaves_to_it(rule: str, path: str, text: str) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--output-format=concise"]
    command += ["--stdin-filename", path, "-"]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1, done.stderr
    assert f" {rule} " in done.stdout


@pytest.mark.parametrize(
    ("room", "line", "contract"),
    [
        ("pool", "import time", "pure"),
        ("core", "import kvstrata.pool", "layers"),
        ("policy", "import kvstrata.layout", "policy and pool"),
        ("storage", "import kvstrata.tokens", "storage and transfer"),
        ("apps", "import kvstrata.testing", "applications"),
        ("runtime", "import vllm", "engines"),
        ("connectors/vllm", "import kvstrata.connectors.transformers", "connectors never"),
        ("connectors/trtllm", "import kvstrata.connectors.vllm", "connectors never"),
        ("connectors/sglang", "import kvstrata.connectors.vllm", "connectors never"),
    ],
)
def test_each_import_contract_can_break(tmp_path, room: str, line: str, contract: str) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    package = tmp_path / "src/kvstrata"
    connectors = [f"connectors/{name}" for name in ("sglang", "transformers", "trtllm", "vllm")]
    for name in (*ROOMS, *connectors, "."):
        (package / name).mkdir(parents=True, exist_ok=True)
        (package / name / "__init__.py").touch()
    (package / "transfer/plan.py").touch()
    (package / room / "planted.py").write_text(f"{line}\n")
    code = "from importlinter.cli import lint_imports_command as main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "src"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(
        text.startswith(contract) and text.endswith("BROKEN") for text in done.stdout.splitlines()
    ), done.stdout
