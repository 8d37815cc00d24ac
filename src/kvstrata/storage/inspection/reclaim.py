"""Removes what no daemon uses: litter of dead writers, lines that nobody believes, other layouts.

Nothing is removed that does not look like ours from its first bytes on. Whatever stops this in the
middle, what is left is what was there before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvstrata.core.errors import ConfigError, TransferError
from kvstrata.core.ids import SequenceHash
from kvstrata.storage.ages import Ages
from kvstrata.storage.directory import DirectoryLimits
from kvstrata.storage.envelope import Refusal, decode_envelope
from kvstrata.storage.inspection import directory, objects
from kvstrata.storage.inspection.places import (
    THREADS,
    TIMEOUT_S,
    is_object,
    open_place,
    slab_paths,
)
from kvstrata.storage.inspection.records import side_by_side
from kvstrata.storage.inspection.slab import InspectedSlab
from kvstrata.storage.keyed import KeyedEntry
from kvstrata.storage.marker import MARKER_NAME
from kvstrata.storage.objects import ObjectStore

__all__ = ["GcOptions", "Reclaimed", "reclaim"]

_DELETE_EACH: Final = 1000


@dataclass(frozen=True, slots=True)
class GcOptions:
    """What is to go beside litter."""

    keep: tuple[bytes, ...] = ()
    """Fingerprints of the layouts that stay when others go; empty: no layout goes."""
    size_bytes: int | None = None
    """Down to which a shared directory is collected; None: not at all."""
    dry_run: bool = False
    """Whether to say only what would go."""


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """Something that went, or would go."""

    what: str
    """What it is."""
    name: str
    """Which one, or where they are."""
    count: int
    """How many."""
    size_bytes: int
    """Bytes that come back; 0 for index lines, whose slab keeps its length."""


def reclaim(place: str, options: GcOptions) -> Iterator[Reclaimed]:
    """Stream what goes. Raises ConfigError before anything went for what cannot be done there."""
    if is_object(place):
        _refuse(options.size_bytes is not None, "an object store", "--size")
        return _reclaim_objects(place, options)
    if paths := slab_paths(place):
        _refuse(options.size_bytes is not None, "a slab", "--size")
        _refuse(bool(options.keep), "a slab", "--other-layouts")
        return _reclaim_slab(place, paths, options)
    return _reclaim_directory(Path(place).expanduser(), options)


def _refuse(wanted: bool, what: str, option: str) -> None:  # noqa: FBT001  a condition
    if wanted:
        hints = {
            "a slab": "it has one length and one layout; delete the file to be rid of it",
            "an object store": "bound it with a lifecycle rule of the bucket",
        }
        raise ConfigError(f"gc: {option} means nothing for {what}", hint=hints[what])


def _reclaim_slab(place: str, paths: Sequence[Path], options: GcOptions) -> Iterator[Reclaimed]:
    with open_place(place, alone=True, write=not options.dry_run) as (slab,):
        assert isinstance(slab, InspectedSlab), "its paths are slabs"
        lines = slab.unbelieved()
        if not options.dry_run and any(lines):
            lines = slab.blank_unbelieved()
        elif slab.torn_floors:
            lines = lines._replace(torn=0, cleared=0)
        if lines.torn:
            yield Reclaimed("torn index lines", slab.name, lines.torn, 0)
        if lines.cleared:
            yield Reclaimed("index lines of cleared blocks", slab.name, lines.cleared, 0)
    for folder in dict.fromkeys(path.parent for path in paths):
        for each in directory.slab_leftovers(folder):
            if options.dry_run or _unlink(each.path):
                yield Reclaimed("unfinished slab", str(each.path), 1, each.size_bytes)


# -- directories -------------------------------------------------------------------------------


def _reclaim_directory(root: Path, options: GcOptions) -> Iterator[Reclaimed]:
    folders = directory.find_folders(root)
    if not folders:
        raise ConfigError(
            f"{str(root)!r} holds nothing of kvstrata's", hint="nothing else is ever touched"
        )
    kept = _kept([each.fingerprint for each in folders], options.keep)
    if options.size_bytes is not None and len(kept) > 1:
        raise ConfigError(
            f"gc: {str(root)!r} holds {len(kept)} layouts, and --size is for one of them",
            hint=f"name its folder, such as {folders[0].path}",
        )
    return _go_through(folders, kept, options)


def _go_through(
    folders: Sequence[directory.LayoutFolder], kept: frozenset[bytes], options: GcOptions
) -> Iterator[Reclaimed]:
    for folder in folders:
        for each in directory.leftovers(folder.path):
            if options.dry_run or _unlink(each.path):
                yield Reclaimed("unfinished file", str(each.path), 1, each.size_bytes)
        if folder.fingerprint not in kept:
            yield _remove_folder(folder, dry_run=options.dry_run)
        elif options.size_bytes is not None:
            yield _collect(folder, options.size_bytes, dry_run=options.dry_run)


def _remove_folder(folder: directory.LayoutFolder, *, dry_run: bool) -> Reclaimed:
    """Delete every block of a layout; its marker goes last, and only if nothing else is there."""
    count = size_bytes = 0
    for path in directory.block_files(folder.path):
        with suppress(OSError):  # gone since it was listed
            size = path.lstat().st_size
            if directory.is_ours(path) and (dry_run or _unlink(path)):
                count, size_bytes = count + 1, size_bytes + size
    if not dry_run:
        for fan in ("[0-9a-f][0-9a-f]/[0-9a-f]", "[0-9a-f][0-9a-f]"):
            for each in list(folder.path.glob(fan)):
                _remove_empty(each)
        if [each.name for each in folder.path.iterdir()] == [MARKER_NAME]:
            _unlink(folder.path / MARKER_NAME)
            _remove_empty(folder.path)
    return Reclaimed("blocks of another layout", str(folder.path), count, size_bytes)


def _collect(folder: directory.LayoutFolder, size_bytes: int, *, dry_run: bool) -> Reclaimed:
    """Let the store's own collector remove the longest unused, or say what it would."""
    with closing(directory.open_folder(folder, capacity_bytes=size_bytes)) as store:
        if not dry_run:
            store.collect()
            found = store.statistics()
            return Reclaimed(
                "longest unused blocks", str(folder.path), found.collected, found.collected_bytes
            )
        ages = Ages(DirectoryLimits().age_step_s)
        for each in store.entries():
            ages.add(each.used_s, each.stored_bytes)
        count = total = 0
        if ages.total_bytes > size_bytes:
            cut = ages.cut(ages.total_bytes - size_bytes, whole=False)
            for each in store.entries():
                if cut.takes(ages.bucket(each.used_s), each.key):
                    count, total = count + 1, total + each.stored_bytes
    return Reclaimed("longest unused blocks (about)", str(folder.path), count, total)


def _unlink(path: Path) -> bool:
    try:
        os.unlink(path)  # noqa: PTH108  never follows a link
    except OSError:
        return False  # another one was faster, or we may not
    return True


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty, or gone
        folder.rmdir()


# -- object stores -----------------------------------------------------------------------------


def _reclaim_objects(url: str, options: GcOptions) -> Iterator[Reclaimed]:
    prefixes = objects.find_prefixes(url, TIMEOUT_S)
    if not prefixes:
        raise ConfigError("the prefix holds nothing of kvstrata's", hint="see kvstrata ls")
    kept = _kept([each.fingerprint for each in prefixes], options.keep)
    return (
        _remove_prefix(each, dry_run=options.dry_run)
        for each in prefixes
        if each.fingerprint not in kept
    )


def _remove_prefix(found: objects.LayoutPrefix, *, dry_run: bool) -> Reclaimed:
    """Delete every block of a layout; its marker goes last, and only if nothing else is there."""
    count = size_bytes = others = 0
    with closing(objects.open_prefix(found, TIMEOUT_S)) as store:
        batch: list[SequenceHash] = []
        for entry, ours in side_by_side(
            lambda entry: (entry, _is_block(store, entry)), store.entries(), THREADS
        ):
            others += not ours
            if ours:
                count, size_bytes = count + 1, size_bytes + entry.stored_bytes
                batch.append(entry.key)
            if len(batch) == _DELETE_EACH and not dry_run:
                store.delete(batch)
                batch.clear()
        if not dry_run:
            if batch:
                store.delete(batch)
            if not others and not store.statistics().foreign:
                objects.remove_marker(found)
    return Reclaimed("blocks of another layout", found.name, count, size_bytes)


def _is_block(store: ObjectStore, entry: KeyedEntry) -> bool:
    try:
        header = store.peek(entry.key)
    except TransferError:
        return False  # it stays, and so does the marker
    return header is not None and len(header) > 0 and decode_envelope(header) is not Refusal.FOREIGN


def _kept(found: Sequence[bytes], keep: Sequence[bytes]) -> frozenset[bytes]:
    """Return the layouts that stay.

    Raises ConfigError if one to keep is not there: a misspelling would delete everything.
    """
    if unknown := set(keep) - set(found):
        raise ConfigError(
            f"gc: no layout {', '.join(sorted(each.hex() for each in unknown))} is there",
            hint=f"there are {', '.join(each.hex() for each in found)}; nothing was removed",
        )
    return frozenset(keep or found)
