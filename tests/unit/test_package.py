"""The package from outside: what it exports, and what importing it costs."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kvstrata

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "zmq", "msgspec", "numpy")
IMPORT = """
import json, sys, time
begin = time.perf_counter()
import kvstrata
print(json.dumps({"s": time.perf_counter() - begin, "modules": sorted(sys.modules)}))
"""
READ_ONLY = (
    "kvstrata.connectors.sglang",
    "kvstrata.connectors.vllm",
    "kvstrata.apps.cli.demo",
    "kvstrata.transfer.cuda.kernel",
)
"""Not imported here: an engine takes half a minute to import, and triton is not everywhere."""
SOURCES = {
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "src" / "kvstrata").rglob("*.py"))
}


def bound(path: Path) -> set[str]:
    """Return the names that a module binds at its top, found without importing it."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(each.asname or each.name).partition(".")[0] for each in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {each.id for each in targets if isinstance(each, ast.Name)}
    return names


def exported(path: Path) -> list[str] | None:
    """Return a module's `__all__`, found without importing it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and "__all__" in {
            each.id for each in node.targets if isinstance(each, ast.Name)
        }:
            names: list[str] = ast.literal_eval(node.value)
            return names
    return None


def imported() -> dict:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True)
    return json.loads(done.stdout)


def test_importing_is_cheap_and_brings_nothing_heavy() -> None:
    found = [imported() for _ in range(5)]
    roots = {name.partition(".")[0] for name in found[0]["modules"]}
    assert not roots & set(HEAVY)
    assert min(each["s"] for each in found) < 0.3


def test_public_surface() -> None:
    assert kvstrata.__all__ == ["Client", "Retention", "__version__"]
    from kvstrata.core.retention import Retention
    from kvstrata.runtime.client import Client

    assert kvstrata.Client is Client
    assert kvstrata.Retention is Retention
    with pytest.raises(AttributeError, match="has no attribute 'Server'"):
        _ = kvstrata.Server


def test_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert kvstrata.__version__ == project["version"]


def test_the_walk_finds_the_rooms() -> None:
    rooms = {name.split(".")[1] for name in SOURCES if "." in name}
    assert rooms >= {"apps", "connectors", "core", "layout", "manager", "policy", "pool"}
    assert rooms >= {"runtime", "storage", "testing", "tokens", "transfer"}


@pytest.mark.parametrize("name", SOURCES)
def test_exported_names_exist(name) -> None:
    path = SOURCES[name]
    names = exported(path)
    defines = any(line.startswith(("def ", "class ")) for line in path.read_text().splitlines())
    assert names is not None or not defines, f"{name} defines things and has no __all__"
    assert len(set(names or ())) == len(names or ())
    if name.startswith(READ_ONLY):
        assert set(names or ()) <= bound(path)
        return
    module = importlib.import_module(name)
    assert [each for each in names or () if not hasattr(module, each)] == []


def test_it_says_that_it_is_typed() -> None:
    assert (Path(kvstrata.__file__).parent / "py.typed").exists()
