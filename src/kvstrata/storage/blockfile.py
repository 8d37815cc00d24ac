"""One block as one file: written aside and published at once, read without trusting its length.

    header 256 | zeros to one page | payload

The payload begins on a page, so it can move around the page cache (O_DIRECT) straight from and
to an arena slot; what does not fill a page at its end goes through a page of the thread's own.
File systems without O_DIRECT, and memory that is not aligned, take the plain way.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Final

import numpy as np

from kvstrata.core.errors import ChecksumError, TransferError
from kvstrata.storage.base import PAGE_BYTES
from kvstrata.storage.envelope import HEADER_BYTES

__all__ = ["SUFFIX", "BlockFiles", "LinkAnswer", "is_full", "is_missing", "trouble"]

SUFFIX: Final = ".kv"
"""Ending of a block's file name."""

_ZEROS: Final = bytes(PAGE_BYTES - HEADER_BYTES)
_MISSING: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESTALE})
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_ALLOWED: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR})
_NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_READ: Final = os.O_RDONLY | os.O_CLOEXEC
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class LinkAnswer(Enum):
    """What became of a file that was to take its key's name."""

    CREATED = "created"
    RESOLVED = "created, although the file system said otherwise"
    EXISTED = "existed"


def is_missing(error: OSError) -> bool:
    """Return whether the file is not there, also on a share that another machine changed."""
    return error.errno in _MISSING


def is_full(error: OSError) -> bool:
    """Return whether the file system or a quota has no room."""
    return error.errno in _FULL


def trouble(error: OSError, what: str) -> TransferError:
    """Return the error of the seam for one of the system's."""
    return TransferError(f"{what}: {error.strerror}", retryable=error.errno not in _NOT_ALLOWED)


class _Pages(threading.local):
    """Two aligned pages of each thread's own: one for the header, one for a payload's tail."""

    def __init__(self) -> None:
        whole = memoryview(mmap.mmap(-1, 2 * PAGE_BYTES))
        self.head, self.tail = whole[:PAGE_BYTES], whole[PAGE_BYTES:]


class BlockFiles:
    """Reads and writes block files of one directory the best way that it allows."""

    def __init__(self, folder: Path, *, direct: bool, links: bool) -> None:
        """Believe what is said of the directory. Use `probe`."""
        self._folder = folder
        self.direct = direct
        self.links = links
        self._pages = _Pages()

    @classmethod
    def probe(cls, folder: Path, *, direct: bool) -> BlockFiles:
        """Try out what the file system can do; raises OSError if it cannot be written."""
        name = folder / f".probe-{os.getpid()}-{os.urandom(4).hex()}.new"
        linked = name.with_suffix(".linked.new")
        name.touch(mode=0o600, exist_ok=False)
        links = True
        try:
            try:
                os.link(name, linked)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                links = False
            if direct:
                try:
                    os.close(os.open(name, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC))
                except OSError:
                    direct = False
        finally:
            name.unlink(missing_ok=True)
            linked.unlink(missing_ok=True)
        return cls(folder, direct=direct, links=links)

    def now_s(self) -> float:
        """Return the time by the clock that stamps the files, which need not be ours."""
        name = self._folder / f".probe-{os.getpid()}-{os.urandom(4).hex()}.new"
        try:
            name.touch(mode=0o600, exist_ok=False)
            return name.stat().st_mtime
        finally:
            name.unlink(missing_ok=True)

    def publish(
        self, unfinished: str, path: str, header: bytes | memoryview, payload: memoryview
    ) -> LinkAnswer:
        """Write a file aside and give it its name; nothing is left behind however it ends."""
        flags = os.O_DIRECT if self.direct and _is_aligned(payload) else 0
        descriptor = os.open(unfinished, _CREATE | flags, 0o600)
        try:
            try:
                self._write(descriptor, header, payload, direct=bool(flags))
            finally:
                os.close(descriptor)  # NFS tells only here that it could not write
            return self._name(unfinished, path)
        finally:
            with suppress(OSError):  # renamed away, or swept later
                os.unlink(unfinished)  # noqa: PTH108

    def read(self, path: str, header: memoryview, payload: memoryview) -> tuple[int, float]:
        """Fill header and payload; return the payload's length and when the file was last used.

        Raises OSError, and ChecksumError if the file cannot be a block of at most this length.
        """
        flags = os.O_DIRECT if self.direct and _is_aligned(payload) else 0
        descriptor = os.open(path, _READ | flags)
        try:
            status = os.fstat(descriptor)
            length = status.st_size - PAGE_BYTES
            if not 0 <= length <= len(payload):
                raise ChecksumError(f"{path}: {status.st_size} bytes are not a block of its kind")
            whole = length - length % PAGE_BYTES if flags else length
            tail = self._pages.tail[: PAGE_BYTES if whole < length else 0]
            views = [self._pages.head, payload[:whole], tail]
            moved = _move_all(os.preadv, descriptor, views, status.st_size)
            if moved != status.st_size:
                raise ChecksumError(f"{path}: ended after {moved} of {status.st_size} bytes")
            payload[whole:length] = tail[: length - whole]
            header[:] = self._pages.head[:HEADER_BYTES]
            if not flags:  # the host tier is the cache of these bytes
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            return length, status.st_mtime
        finally:
            os.close(descriptor)

    def peek(self, path: str) -> bytes:
        """Return what stands where the header is; raises OSError."""
        descriptor = os.open(path, _READ)
        try:
            return os.pread(descriptor, HEADER_BYTES, 0)
        finally:
            os.close(descriptor)

    def _write(
        self, descriptor: int, header: bytes | memoryview, payload: memoryview, *, direct: bool
    ) -> None:
        head, tail = self._pages.head, self._pages.tail
        head[:HEADER_BYTES] = header
        head[HEADER_BYTES:] = _ZEROS  # the page may hold what was read last
        whole = len(payload) - len(payload) % PAGE_BYTES if direct else len(payload)
        rest = len(payload) - whole
        tail[:rest] = payload[whole:]
        views = [head, payload[:whole], tail[: PAGE_BYTES if rest else 0]]
        length = sum(map(len, views))
        if _move_all(os.pwritev, descriptor, views, length) != length:
            raise OSError(errno.EIO, "the file system took no more bytes")
        if rest:
            os.ftruncate(descriptor, PAGE_BYTES + len(payload))

    def _name(self, unfinished: str, path: str) -> LinkAnswer:
        if not self.links:
            existed = os.path.exists(path)  # noqa: PTH110
            if not existed:
                os.rename(unfinished, path)  # noqa: PTH104
            return LinkAnswer.EXISTED if existed else LinkAnswer.CREATED
        try:
            os.link(unfinished, path)
        except FileExistsError:
            # NFS repeats a request whose answer was lost, and then finds its own link.
            ours = os.stat(unfinished).st_nlink > 1  # noqa: PTH116
            return LinkAnswer.RESOLVED if ours else LinkAnswer.EXISTED
        return LinkAnswer.CREATED


def _is_aligned(view: memoryview) -> bool:
    if len(view) < PAGE_BYTES:
        return False
    address: int = np.frombuffer(view, np.uint8).ctypes.data
    return address % PAGE_BYTES == 0


def _move_all(
    move: Callable[[int, list[memoryview], int], int],
    descriptor: int,
    views: Sequence[memoryview],
    length: int,
) -> int:
    """Call preadv or pwritev until `length` bytes have moved or none move any more."""
    done = 0
    while done < length:
        skip, left = done, []
        for view in views:
            if skip < len(view):
                left.append(view[skip:])
            skip = max(0, skip - len(view))
        moved = move(descriptor, left, done)
        if not moved:
            break
        done += moved
    return done
