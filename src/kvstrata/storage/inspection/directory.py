"""Shared directories: which layouts are there, and what dead writers left in them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from kvstrata.core.errors import ConfigError, LayoutError
from kvstrata.core.ids import SequenceHash
from kvstrata.storage.blockfile import SUFFIX, BlockFiles
from kvstrata.storage.directory import DirectoryLimits, DirectoryStore
from kvstrata.storage.envelope import HEADER_BYTES, Refusal, decode_envelope
from kvstrata.storage.footing import SLAB_NAME
from kvstrata.storage.keyed import name_of_key
from kvstrata.storage.marker import MARKER_BYTES_MAX, MARKER_NAME, decode_marker, is_marker_begun
from kvstrata.storage.superblock import is_marked

__all__ = [
    "LayoutFolder",
    "Leftover",
    "block_files",
    "find_folders",
    "is_ours",
    "leftovers",
    "open_folder",
    "place_of",
    "slab_leftovers",
]

_LAYOUT: Final = re.compile(r"[0-9a-f]{32}")
_BLOCK: Final = re.compile(rf"[0-9a-f]{{32}}{re.escape(SUFFIX)}")
_UNFINISHED: Final = re.compile(r"\.[0-9a-f]{32}\..+\.new")
_PROBE: Final = re.compile(r"\.probe-\d+-[0-9a-f]{8}(?:\.linked)?\.new")
_UNFINISHED_MARKER: Final = re.compile(rf"\.{MARKER_NAME}\..+-[0-9a-f]{{8}}")
_UNFINISHED_SLAB: Final = re.compile(rf"{re.escape(SLAB_NAME)}\.(\d+)\.new")
_FANS: Final = ("[0-9a-f][0-9a-f]", "[0-9a-f]")
_OLD_S: Final = DirectoryLimits().unfinished_s


class LayoutFolder(NamedTuple):
    """A folder with a marker of ours."""

    path: Path
    """Where it is."""
    fingerprint: bytes
    """Fingerprint of the layout that its marker names."""
    description: str
    """That layout in words."""


class Leftover(NamedTuple):
    """A file that a process began and did not live to finish."""

    path: Path
    """Which one."""
    size_bytes: int
    """How long it is."""


def find_folders(root: Path) -> list[LayoutFolder]:
    """Return the layouts in a shared tier's directory, or the one whose own folder this is.

    Folders without a marker are not ours and are left out. Raises LayoutError for a marker that is
    damaged or of another version, ConfigError if the directory cannot be read.
    """
    try:
        if (root / MARKER_NAME).is_file():
            return [_read_marker(root)]
        return [
            _read_marker(each)
            for each in sorted(root.iterdir())
            if _LAYOUT.fullmatch(each.name) and (each / MARKER_NAME).is_file()
        ]
    except OSError as error:
        raise ConfigError(
            f"{str(root)!r} cannot be read ({error.strerror})",
            hint="run this as the user of the daemon",
        ) from error


def open_folder(folder: LayoutFolder, *, capacity_bytes: int = 0) -> DirectoryStore:
    """Open one layout's blocks for looking, collecting and deleting; nothing is written or touched.

    `collect` of the store returned removes the longest unused blocks down to `capacity_bytes`.
    """
    limits = DirectoryLimits(
        collect_interval_s=None,
        collect_above=1.0,
        collect_to=1.0,
        touch_interval_s=float("inf"),
    )
    files = BlockFiles(folder.path, direct=_takes_direct(folder.path), links=True)
    return DirectoryStore(folder.path, capacity_bytes, limits, files)


def place_of(key: SequenceHash) -> str:
    """Return where a block's file is below its layout's folder."""
    name = name_of_key(key)
    return f"{name[:2]}/{name[2]}/{name}{SUFFIX}"


def block_files(folder: Path) -> Iterator[Path]:
    """Stream the files that have a block's name, in the place where it belongs."""
    for path in folder.glob("/".join((*_FANS, f"*{SUFFIX}"))):
        if _BLOCK.fullmatch(path.name) and path.name.startswith("".join(path.parts[-3:-1])):
            yield path


def is_ours(path: Path) -> bool:
    """Return whether a file begins as a block does."""
    front = _front(path, HEADER_BYTES)
    return front is not None and len(front) > 0 and decode_envelope(front) is not Refusal.FOREIGN


def leftovers(folder: Path, *, now_s: float | None = None) -> Iterator[Leftover]:
    """Stream what writers that died left in a layout's folder: old, named by us, begun by us."""
    now_s = time.time() if now_s is None else now_s
    kinds = (
        (folder.glob("/".join((*_FANS, ".*.new"))), _UNFINISHED, _is_block_begun),
        (folder.glob(".probe-*.new"), _PROBE, lambda front: not front),
        (folder.glob(f".{MARKER_NAME}.*"), _UNFINISHED_MARKER, is_marker_begun),
    )
    for paths, name, begun in kinds:
        for path in paths:
            with suppress(OSError):  # gone since it was listed
                status = path.lstat()
                front = _front(path, HEADER_BYTES)
                ours = name.fullmatch(path.name) and front is not None and begun(front)
                if ours and status.st_mtime < now_s - _OLD_S:
                    yield Leftover(path, status.st_size)


def slab_leftovers(folder: Path) -> Iterator[Leftover]:
    """Stream slabs that a process of this machine began to make and did not live to finish."""
    for path in folder.glob(f"{SLAB_NAME}.*.new"):
        found = _UNFINISHED_SLAB.fullmatch(path.name)
        front = _front(path, HEADER_BYTES)
        if found is None or front is None or not (is_marked(front) or not any(front)):
            continue
        with suppress(OSError):
            status = path.lstat()  # the process may be of another container: then only time tells
            old = status.st_mtime < time.time() - _OLD_S
            if old and not Path("/proc", found[1]).exists():
                yield Leftover(path, status.st_size)


def _read_marker(folder: Path) -> LayoutFolder:
    with (folder / MARKER_NAME).open("rb") as file:
        fingerprint, description = decode_marker(file.read(MARKER_BYTES_MAX + 1), repr(str(folder)))
    if _LAYOUT.fullmatch(folder.name) and folder.name != fingerprint.hex():
        raise LayoutError(
            f"{str(folder)!r} has the {MARKER_NAME} of layout {fingerprint.hex()}",
            hint="kvstrata never changes it: move it away",
        )
    return LayoutFolder(folder, fingerprint, description)


def _takes_direct(folder: Path) -> bool:
    """Return whether files can be opened with O_DIRECT there; tried on one that is there."""
    try:
        os.close(os.open(folder / MARKER_NAME, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _front(path: Path, length: int) -> bytes | None:
    """Return the first bytes of a regular file, None if it is none or cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        try:
            return file.read(length)
        except OSError:
            return None


def _is_block_begun(front: bytes) -> bool:
    return decode_envelope(front) is not Refusal.FOREIGN or not any(front)
