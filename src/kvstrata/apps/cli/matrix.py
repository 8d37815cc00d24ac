"""`kvstrata matrix`: what works with which engine, and the tests that show it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Final

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvstrata.connectors.matrix import STATUSES, Cell, matrix
from kvstrata.connectors.versions import TESTED_VERSIONS

__all__ = ["markdown", "run_matrix"]

_COLOURS: Final = {"works": "green", "contract": "yellow", "no": "dim"}

_PAGE: Final = """\
# What works with which engine

`kvstrata matrix` prints this table, `kvstrata matrix --json` each cell with its test. Both, and
this page, are made from `src/kvstrata/connectors/matrix.toml`: add a line there, then run
`make matrix`. CI fails if a test that a `works` names did not run and pass. The last of the tested
releases is meant; on vLLM's older one CI runs a part of the tests (`tests/engine/older.txt`).

"""


def run_matrix(*, as_json: bool) -> None:
    """Print every cell to stdout."""
    if as_json:
        told = {
            "versions": {name: list(each.releases) for name, each in TESTED_VERSIONS.items()},
            "cells": [
                {
                    "engine": cell.engine,
                    "feature": cell.feature,
                    "status": cell.status,
                    "test": cell.test or None,
                    "note": cell.note,
                }
                for cell in matrix()
            ],
        }
        typer.echo(json.dumps(told, indent=2))
        return
    table = Table(box=box.SIMPLE)
    table.add_column("feature")
    for engine in TESTED_VERSIONS.values():
        table.add_column(f"{engine.title}\n{_releases(engine.releases)}")
    for feature, cells in _rows():
        table.add_row(feature, *(Text(c.status, style=_COLOURS[c.status]) for c in cells))
    console = Console()
    console.print(table)
    for status, meaning in STATUSES.items():
        console.print(f"{status:<9} {meaning}", highlight=False, soft_wrap=True)
    console.print("\nThe test of each cell: kvstrata matrix --json", highlight=False)


def markdown() -> str:
    """Return the page docs/matrix.md."""
    engines = TESTED_VERSIONS.values()
    lines = [
        f"| feature | {' | '.join(engine.title for engine in engines)} |",
        f"|---|{'---|' * len(engines)}",
        f"| tested releases | {' | '.join(_releases(engine.releases) for engine in engines)} |",
    ]
    lines += [f"| {name} | {' | '.join(map(_linked, cells))} |" for name, cells in _rows()]
    lines += ["", *(f"- `{status}`: {meaning}" for status, meaning in STATUSES.items())]
    lines += ["", "## Notes", "", "| feature | engine | note |", "|---|---|---|"]
    lines += [
        f"| {cell.feature} | {TESTED_VERSIONS[cell.engine].title} | {cell.note} |"
        for cell in matrix()
        if cell.note
    ]
    return _PAGE + "\n".join(lines) + "\n"


def _rows() -> Iterator[tuple[str, list[Cell]]]:
    for feature, cells in groupby(matrix(), key=lambda cell: cell.feature):
        yield feature, list(cells)


def _releases(releases: tuple[str, ...]) -> str:
    return ", ".join(releases) or "none"


def _linked(cell: Cell) -> str:
    path = cell.test.partition("::")[0]
    return f"[{cell.status}](../{path})" if path else cell.status
