"""A nameless file of transparent huge pages, whatever the system does with other shared memory.

`shmem_enabled` is `never` on nearly every system and speaks of anonymous files (memfd) only: a
tmpfs has a `huge=` of its own. So one is made, of no size limit and mounted nowhere, and a file in
it that has no name; both are gone when the last descriptor and mapping are. It takes the right to
mount (CAP_SYS_ADMIN). Source: fsopen(2), fsmount(2), tmpfs(5); Linux 5.2.

Owner: nobody; the caller owns the descriptor.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

__all__ = ["open_huge_file"]

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # the same on every architecture but alpha
_CLOEXEC: Final = 1
_SET_STRING, _CREATE = 1, 6
_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8
_OPTIONS: Final = ((b"huge", b"advise"), (b"size", b"0"), (b"mode", b"0700"))


def open_huge_file() -> int:
    """Return the descriptor of an empty file whose mappings may ask for huge pages.

    Raises OSError where that is not allowed or not known.
    """
    filesystem = _call(_FSOPEN, b"tmpfs", _CLOEXEC)
    try:
        for name, value in _OPTIONS:
            _call(_FSCONFIG, filesystem, _SET_STRING, name, value, 0)
        _call(_FSCONFIG, filesystem, _CREATE, None, None, 0)
        mount = _call(_FSMOUNT, filesystem, _CLOEXEC, _NOSUID_NODEV_NOEXEC)
    finally:
        os.close(filesystem)
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=mount)
    finally:
        os.close(mount)


def _call(number: int, *arguments: int | bytes | None) -> int:
    library = ctypes.CDLL(None, use_errno=True)
    whole = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    found: int = library.syscall(ctypes.c_long(number), *whole)
    if found < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return found
