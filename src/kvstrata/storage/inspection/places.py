"""What a PLACE on the command line is: a slab, a stripe, a shared directory or an object store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from kvstrata.core.errors import ConfigError
from kvstrata.core.ids import SequenceHash
from kvstrata.storage.footing import SLAB_NAME, is_device
from kvstrata.storage.inspection import directory, objects
from kvstrata.storage.inspection.keyed import InspectedKeyed
from kvstrata.storage.inspection.records import Inspected
from kvstrata.storage.inspection.slab import InspectedSlab
from kvstrata.storage.keyed import name_of_key

__all__ = ["THREADS", "TIMEOUT_S", "is_object", "open_place", "slab_paths"]

THREADS: Final = 16
"""Blocks of a directory or a bucket that are looked at at once."""
TIMEOUT_S: Final = 30.0
"""Longest time that an object server may take for one block."""
_WHAT: Final = (
    "name a slab's directory, file or device, a shared tier's directory, or an object tier's URL"
)


@contextmanager
def open_place(
    place: str,
    *,
    alone: bool = False,
    write: bool = False,
    secrets: Sequence[bytes] = (),
    timeout_s: float = TIMEOUT_S,
) -> Iterator[list[Inspected]]:
    """Open what is at `place`: one slab or stripe (`a|b`), or a store for each layout.

    `alone` refuses a slab that a daemon has open, `write` lets index lines be blanked; `secrets`
    are what blocks may be encrypted under. Raises ConfigError for a place that cannot be used,
    LayoutError for one that holds nothing of ours or something damaged.
    """
    with ExitStack() as opened:
        found: list[Inspected] = []
        if is_object(place):
            for each in objects.find_prefixes(place, timeout_s):
                store = objects.open_prefix(each, timeout_s)
                layout = (each.fingerprint, each.description)
                found.append(
                    InspectedKeyed(
                        store, "object", each.name, layout, name_of_key, secrets, THREADS
                    )
                )
                opened.callback(store.close)
        elif paths := slab_paths(place):
            slab = InspectedSlab.open(paths, alone=alone, write=write)
            opened.callback(slab.close)
            found.append(slab)
        else:
            found += _folders(Path(place).expanduser(), secrets, opened)
        if not found:
            raise ConfigError(f"{place!r} holds nothing of kvstrata's", hint=_WHAT)
        yield found


def is_object(place: str) -> bool:
    """Return whether it is a URL."""
    return "://" in place


def slab_paths(place: str) -> list[Path]:
    """Return the files or devices of a slab or stripe; empty for a shared directory.

    Raises ConfigError for a place that is not there, that is both, or that is no slab in a stripe.
    """
    parts = place.split("|")
    paths = [path for each in parts for path in _slab(each)]
    if len(parts) > 1 and len(paths) < len(parts):
        raise ConfigError(
            f"{place!r}: only slabs are joined by |", hint="name other places one at a time"
        )
    return paths


def _slab(place: str) -> list[Path]:
    path = Path(place).expanduser()
    if is_device(place) or path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{place!r} is not there", hint=_WHAT)
    if not (path / SLAB_NAME).exists():
        return []
    if directory.find_folders(path):
        raise ConfigError(
            f"{place!r} holds a slab and a shared tier",
            hint=f"name {path / SLAB_NAME} or the folder of one layout",
        )
    return [path / SLAB_NAME]


def _folders(root: Path, secrets: Sequence[bytes], opened: ExitStack) -> Iterator[InspectedKeyed]:
    for each in directory.find_folders(root):
        store = directory.open_folder(each)
        opened.callback(store.close)
        layout = (each.fingerprint, each.description)

        def place_of(key: SequenceHash) -> str:
            return directory.place_of(key)

        yield InspectedKeyed(store, "directory", str(each.path), layout, place_of, secrets, THREADS)
