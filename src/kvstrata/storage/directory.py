"""Blocks as files of a directory that may be shared by many machines (NFS, Lustre, local).

    ROOT/<layout fingerprint>/KVSTRATA         the marker
    ROOT/<layout fingerprint>/ab/c/<key>.kv    header, zeros to one page, payload
    ROOT/<layout fingerprint>/ab/c/.<key>.<who>.new    on its way, never read

A file is written under its own name and linked to its key's: it is there whole or not at all,
and of many writers one is first. Where there are no hard links it is renamed, and the last wins.
No order of times is believed; they only say what the collector takes first. Nothing is fsynced:
what a loss of power tears is exposed by header and seal, as in the slab.

Concurrency: any thread may call; one thread `kvstrata-collector`, if asked for, walks the
directory now and then and is woken when room runs short. `close` stops and joins it.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from kvstrata.core.errors import ChecksumError, ConfigError, LayoutError, TransferError
from kvstrata.core.ids import SequenceHash
from kvstrata.layout import BlockLayout
from kvstrata.storage.ages import Ages
from kvstrata.storage.base import PAGE_BYTES, align
from kvstrata.storage.blockfile import (
    SUFFIX,
    BlockFiles,
    LinkAnswer,
    is_full,
    is_missing,
    trouble,
)
from kvstrata.storage.envelope import HEADER_BYTES
from kvstrata.storage.keyed import (
    KeyedCounts,
    KeyedEntry,
    KeyedStatistics,
    PutAnswer,
    check_open,
    key_of_name,
    name_of_key,
)
from kvstrata.storage.marker import MARKER_BYTES_MAX, MARKER_NAME, check_marker, encode_marker

__all__ = ["DirectoryLimits", "DirectoryStore"]

_HEX: Final = frozenset("0123456789abcdef")
_ROUNDS_MAX: Final = 3
_CLOSE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class DirectoryLimits:
    """Bounds and rates of a directory; the defaults suit a share used by several daemons."""

    collect_interval_s: float | None = 300.0
    """Time between two walks of the collector's thread; None starts no thread."""
    collect_pause_s: float = 1.0
    """Shortest time from one walk to the next, however full the directory is."""
    collect_above: float = 0.95
    """Share of the capacity above which blocks are removed."""
    collect_to: float = 0.9
    """Share of the capacity down to which they are removed."""
    age_step_s: float = 60.0
    """Uses closer together than this count as equally old."""
    touch_interval_s: float = 600.0
    """A block that is read says so on disk at most this often."""
    unfinished_s: float = 3600.0
    """A file on its way that is older than this was left by a writer that died."""
    look_interval_s: float = 1.0
    """How often a miss looks whether the whole directory is gone."""


class _Found(NamedTuple):
    path: str
    key: SequenceHash
    stored_bytes: int
    used_s: float


class DirectoryStore:
    """A `KeyedStore` of one layout's blocks below one directory."""

    def __init__(
        self, folder: Path, capacity_bytes: int, limits: DirectoryLimits, files: BlockFiles
    ) -> None:
        """Use a directory that has been checked. Use `open`."""
        self.capacity_bytes: int = capacity_bytes
        self._folder = str(folder)
        self._limits = limits
        self._files = files
        self._counts = KeyedCounts()
        self._closed = False
        self._looked_s = float("-inf")
        self._who = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        self._numbers = itertools.count()
        self._collecting = threading.Lock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if limits.collect_interval_s is not None:
            self._thread = threading.Thread(
                target=self._keep_collecting, name="kvstrata-collector", daemon=True
            )
            self._thread.start()

    @classmethod
    def open(
        cls,
        directory: str,
        capacity_bytes: int,
        layout: BlockLayout,
        *,
        limits: DirectoryLimits = DirectoryLimits(),
        direct: bool = True,
    ) -> DirectoryStore:
        """Open or make the place of `layout` below `directory`.

        Raises ConfigError if it cannot be written or one block does not fit, LayoutError if what
        is there is not ours. `direct` asks for reads and writes around the page cache.
        """
        least = align(layout.block_bytes) + PAGE_BYTES
        if capacity_bytes * limits.collect_to < least:
            raise ConfigError(
                f"tiers.directory: {capacity_bytes} bytes hold not one block of "
                f"{layout.block_bytes}",
                hint=f"use at least {int(least / limits.collect_to) // 1024 + 1}KiB",
            )
        folder = Path(directory).expanduser() / layout.fingerprint.hex()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _mark(folder, layout)
            files = BlockFiles.probe(folder, direct=direct)
        except OSError as error:
            raise ConfigError(
                f"tiers.directory: {directory!r} cannot be used ({error.strerror})",
                hint="choose a directory that this user may write to",
            ) from error
        return cls(folder, capacity_bytes, limits, files)

    @property
    def exclusive(self) -> bool:
        """Hard links decide who was first; a rename cannot."""
        return self._files.links

    def put(self, key: SequenceHash, header: bytes | memoryview, payload: memoryview) -> PutAnswer:
        """Write a file and link it to its key's name."""
        check_open(self._closed, "this directory")
        name = name_of_key(key)
        if len(header) != HEADER_BYTES:
            raise TransferError(f"a header has {HEADER_BYTES} bytes", retryable=False)
        path = self._path(name)
        if os.path.exists(path):  # noqa: PTH110  a Path costs as much as the question
            self._counts.add(existed=1)
            return PutAnswer.EXISTED
        size = align(PAGE_BYTES + len(payload))
        if self._counts.snapshot().used_bytes + size > self.capacity_bytes:
            return self._full()
        unfinished = f"{os.path.dirname(path)}/.{name}.{self._who}-{next(self._numbers)}.new"  # noqa: PTH120
        try:
            answer = self._write(unfinished, path, header, payload)
        except OSError as error:
            if is_full(error):
                return self._full()
            raise self._trouble(error, "put", name) from error
        if answer is LinkAnswer.EXISTED:
            self._counts.add(existed=1)
            return PutAnswer.EXISTED
        self._counts.add(created=1, used_bytes=size, resolved=answer is LinkAnswer.RESOLVED)
        if self._counts.snapshot().used_bytes > self._limits.collect_above * self.capacity_bytes:
            self._wake.set()
        return PutAnswer.CREATED

    def get(self, key: SequenceHash, header: memoryview, payload: memoryview) -> int | None:
        """Read a file, its payload straight into place."""
        check_open(self._closed, "this directory")
        name = name_of_key(key)
        try:
            length, used_s = self._files.read(self._path(name), header, payload)
        except ChecksumError:
            self._counts.add(hits=1)
            raise
        except OSError as error:
            if not is_missing(error):
                raise self._trouble(error, "get", name) from error
            self._miss()
            return None
        self._counts.add(hits=1)
        if time.time() - used_s > self._limits.touch_interval_s:
            with suppress(OSError):  # a reader without the right to write still reads
                os.utime(self._path(name))
        return length

    def peek(self, key: SequenceHash) -> bytes | None:
        """Read the front of a file."""
        check_open(self._closed, "this directory")
        name = name_of_key(key)
        try:
            return self._files.peek(self._path(name))
        except OSError as error:
            if not is_missing(error):
                raise self._trouble(error, "peek at", name) from error
            self._miss()
            return None

    def exists(self, keys: Sequence[SequenceHash]) -> list[bool]:
        """Ask the file system for each."""
        check_open(self._closed, "this directory")
        return [os.path.exists(self._path(name_of_key(key))) for key in keys]  # noqa: PTH110

    def delete(self, keys: Sequence[SequenceHash]) -> None:
        """Remove the files."""
        check_open(self._closed, "this directory")
        for name in map(name_of_key, keys):
            size = 0
            try:
                size = align(os.stat(self._path(name)).st_size)  # noqa: PTH116
                os.unlink(self._path(name))  # noqa: PTH108
            except OSError as error:
                if not is_missing(error):
                    raise self._trouble(error, "delete", name) from error
                size = 0
            self._counts.add(deleted=1, used_bytes=-size)

    def entries(self) -> Iterator[KeyedEntry]:
        """Walk the directory."""
        check_open(self._closed, "this directory")
        return (KeyedEntry(each.key, each.stored_bytes, each.used_s) for each in self._walk())

    def statistics(self) -> KeyedStatistics:
        """Return the counters."""
        return self._counts.snapshot()

    def close(self) -> None:
        """Stop the collector; later calls are refused."""
        self._closed = True
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)  # a walk over a share that hangs ends with the process
            self._thread = None

    def collect(self) -> int:
        """Count what is there, remove the longest unused if it is too much; return bytes removed.

        Any number of machines may do this at once. Blocks; the collector's thread calls it.
        """
        removed = 0
        if not self._collecting.acquire(blocking=False):
            return 0
        try:
            for turn in range(_ROUNDS_MAX):
                ages, since = Ages(self._limits.age_step_s), self._counts.snapshot().used_bytes
                for found in self._walk(sweep=turn == 0):
                    ages.add(found.used_s, found.stored_bytes)
                self._counts.set_used(ages.total_bytes, since)
                if ages.total_bytes <= self._limits.collect_above * self.capacity_bytes:
                    break
                excess = ages.total_bytes - int(self._limits.collect_to * self.capacity_bytes)
                cut = ages.cut(excess, whole=turn > 0)
                for found in self._walk():
                    if cut.takes(ages.bucket(found.used_s), found.key):
                        removed += self._collect_one(found)
        finally:
            self._collecting.release()
        return removed

    # -- one block -----------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name[:2]}/{name[2]}/{name}{SUFFIX}"

    def _write(
        self, unfinished: str, path: str, header: bytes | memoryview, payload: memoryview
    ) -> LinkAnswer:
        try:
            return self._files.publish(unfinished, path, header, payload)
        except FileNotFoundError:
            if not self._is_there():
                raise
        # The fan-out is made on first use; the place itself never is: a share that was unmounted
        # must not come back as a directory of the disk below it.
        middle = Path(path).parent
        for each in (middle.parent, middle):
            with suppress(FileExistsError):
                each.mkdir(mode=0o700)
        return self._files.publish(unfinished, path, header, payload)

    def _collect_one(self, found: _Found) -> int:
        try:
            os.unlink(found.path)  # noqa: PTH108
        except OSError:
            return 0  # another collector was faster, or may remove it and we may not
        self._counts.add(
            collected=1, collected_bytes=found.stored_bytes, used_bytes=-found.stored_bytes
        )
        return found.stored_bytes

    def _full(self) -> PutAnswer:
        self._counts.add(full=1)
        self._wake.set()
        return PutAnswer.FULL

    def _miss(self) -> None:
        self._counts.add(misses=1)
        now_s = time.monotonic()
        if now_s - self._looked_s >= self._limits.look_interval_s:
            self._looked_s = now_s
            if not self._is_there():
                self._counts.add(vanished=1)

    def _is_there(self) -> bool:
        return os.path.exists(f"{self._folder}/{MARKER_NAME}")  # noqa: PTH110

    def _trouble(self, error: OSError, verb: str, name: str) -> TransferError:
        self._counts.add(errors=1)
        if is_missing(error) and not self._is_there():
            self._counts.add(vanished=1)
            return TransferError(f"{verb} {name}: {self._folder} is gone", retryable=True)
        return trouble(error, f"{verb} {name}")

    # -- all of them ---------------------------------------------------------------------------

    def _walk(self, *, sweep: bool = False) -> Iterator[_Found]:
        """Stream the blocks; count what is not ours; with `sweep` remove what was left behind."""
        old_s = self._files.now_s() - self._limits.unfinished_s if sweep else float("-inf")
        for first in _listing(self._folder):
            if len(first.name) != 2 or not _HEX.issuperset(first.name):  # noqa: PLR2004
                self._counts.add(foreign=first.name != MARKER_NAME and first.name[0] != ".")
                continue
            for second in _listing(first.path):
                for entry in _listing(second.path):
                    if (found := self._look(entry, first.name + second.name, old_s)) is not None:
                        yield found

    def _look(self, entry: os.DirEntry[str], place: str, old_s: float) -> _Found | None:
        key = key_of_name(entry.name.removesuffix(SUFFIX))
        ours = entry.name.endswith(SUFFIX) and key is not None and entry.name.startswith(place)
        try:
            status = entry.stat(follow_symlinks=False)
            if entry.name.startswith(".") and entry.name.endswith(".new"):
                if status.st_mtime < old_s:
                    os.unlink(entry.path)  # noqa: PTH108
                return None
        except OSError:
            return None  # gone since it was listed
        if not ours or key is None:
            self._counts.add(foreign=1)
            return None
        return _Found(entry.path, key, align(status.st_size), status.st_mtime)

    def _keep_collecting(self) -> None:
        while not self._closed:
            self._wake.clear()
            with suppress(OSError):  # a share that is gone is counted where blocks are asked for
                self.collect()
            if not self._stop.wait(self._limits.collect_pause_s):
                self._wake.wait(self._limits.collect_interval_s)


def _listing(path: str) -> Iterator[os.DirEntry[str]]:
    """Stream a directory; one that is gone or is none is empty."""
    try:
        with os.scandir(path) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):
        return


def _mark(folder: Path, layout: BlockLayout) -> None:
    """Check the marker, or make it in a directory that is empty but for others' unfinished ones."""
    marker = folder / MARKER_NAME
    with suppress(FileNotFoundError):
        with marker.open("rb") as file:
            check_marker(
                file.read(MARKER_BYTES_MAX + 1), layout, f"tiers.directory: {str(folder)!r}"
            )
        return
    if any(not entry.name.startswith(f".{MARKER_NAME}.") for entry in folder.iterdir()):
        if marker.exists():  # another daemon was faster between the two looks
            _mark(folder, layout)
            return
        raise LayoutError(
            f"tiers.directory: {str(folder)!r} has no {MARKER_NAME} and is not empty",
            hint="kvstrata never changes what it did not write: use another directory",
        )
    unfinished = (
        folder / f".{MARKER_NAME}.{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
    )
    try:
        with unfinished.open("xb") as file:
            file.write(encode_marker(layout))
        unfinished.replace(marker)  # all who come first write the same
    finally:
        unfinished.unlink(missing_ok=True)
