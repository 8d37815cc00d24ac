"""What works with which engine: reads `matrix.toml`, the one place where it is written down."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final, Literal

import msgspec

from kvstrata.connectors.versions import TESTED_VERSIONS

__all__ = ["STATUSES", "Cell", "matrix"]

Status = Literal["works", "contract", "no"]

STATUSES: Final[dict[Status, str]] = {
    "works": "a test ran it on the real engine",
    "contract": "tested on the engine's own classes or a stand-in, without a running engine",
    "no": "refused, served without the cache, not there, or shown by no test",
}
"""Status -> what it says."""


class _Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    status: Status
    test: str = ""
    note: str = ""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    features: dict[str, dict[str, _Written]]


@dataclass(frozen=True, slots=True)
class Cell:
    """One feature with one engine."""

    engine: str
    """The engine, as `TESTED_VERSIONS` names it."""
    feature: str
    """The feature, in a few words."""
    status: Status
    """What is known of it."""
    test: str
    """`path::function` that proves it, perhaps with a `[case]`; empty if `no` needs none."""
    note: str
    """What else a reader should know; may be empty."""


@cache
def matrix() -> tuple[Cell, ...]:
    """Return every cell: features in the order of the file, of each the engines in theirs.

    Raises ValueError if the file is wrong, or has not just one cell for each engine and feature.
    """
    text = files("kvstrata.connectors").joinpath("matrix.toml").read_text(encoding="utf-8")
    written = msgspec.toml.decode(text, type=_File).features
    cells = []
    for feature, row in written.items():
        if row.keys() != TESTED_VERSIONS.keys():
            odd = ", ".join(sorted(row.keys() ^ TESTED_VERSIONS.keys()))
            raise ValueError(f"matrix.toml: {feature}: one cell for each engine, but see {odd}")
        for engine in TESTED_VERSIONS:
            cell = row[engine]
            cells.append(Cell(engine, feature, cell.status, cell.test, cell.note))
    return tuple(cells)
