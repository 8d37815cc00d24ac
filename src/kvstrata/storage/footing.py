"""What a slab stands on: a file that we make in a directory, or a whole block device.

Making is the only thing here that writes, and it never writes over what is not ours: a file is
made under another name and linked, a device must be blank at its front. Whoever opens one holds
it alone: a lock on the file, an exclusive open of the device, which the kernel also refuses while
it is mounted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvstrata.core.errors import ConfigError, LayoutError
from kvstrata.storage.base import PAGE_BYTES, FileRegion, Health
from kvstrata.storage.superblock import Superblock, is_marked

__all__ = [
    "SLAB_NAME",
    "Footing",
    "blank",
    "check_place",
    "is_device",
    "length_of",
    "lock",
    "open_device",
    "open_footing",
    "unreadable",
]

SLAB_NAME: Final = "blocks.slab"
"""Name of the file in the disk tier's directory."""
_FRONT_BYTES: Final = 1 << 20  # file systems, partition tables and volume managers begin in here


@dataclass(frozen=True, slots=True)
class Footing:
    """An open file or device; ours alone until it is closed."""

    path: Path
    """The file, or the device's node."""
    region: FileRegion
    """Its bytes."""
    buffered_because: str
    """Why payloads go through the page cache; empty if they do not."""

    def close(self) -> None:
        """Close what is open; once."""
        if self.region.direct >= 0:
            os.close(self.region.direct)
        os.close(self.region.descriptor)


def is_device(place: str) -> bool:
    """Return whether `place` is a block device rather than a directory, there or not."""
    try:
        return stat.S_ISBLK(Path(place).expanduser().stat().st_mode)
    except OSError:
        return False


def check_place(place: str) -> Path:
    """Return the device, or the directory, made if missing.

    Raises ConfigError if it cannot be written, for a device that is in use too.
    """
    if is_device(place):
        path = Path(place).expanduser()
        os.close(open_device(path))
        return path
    return check_directory(place)


def check_directory(directory: str, field: str = "tiers.disk") -> Path:
    """Return the directory, made if missing; raises ConfigError if it cannot be written."""
    path = Path(directory).expanduser()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = path / f".kvstrata-probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{field}: directory {directory!r} cannot be written ({error.strerror})",
            hint="choose a directory that this user may write to",
        ) from error
    return path


def open_footing(place: str, wanted: Superblock, capacity_bytes: int) -> Footing:
    """Open the slab `wanted` at `place`, made if there is none.

    Raises ConfigError for a place or size that cannot be used or that another process uses;
    LayoutError for what is not such a slab, which is left as it is.
    """
    path = check_place(place)
    if is_device(place):
        descriptor = open_device(path)
    else:
        path /= SLAB_NAME
        if not path.exists():
            _create_file(path, wanted)
        descriptor = _open_file(path)
    direct = -1
    try:
        if is_device(place):
            _prepare_device(descriptor, path, wanted)
        else:
            lock(descriptor, path)
        try:
            page = os.pread(descriptor, PAGE_BYTES, 0)
        except OSError as error:
            raise unreadable(path, error) from error
        wanted.check(page, str(path), capacity_bytes)
        wanted.check_length(length_of(descriptor), str(path))
        direct, why = _open_direct(descriptor, wanted.index_end)
        return Footing(path, FileRegion(descriptor, direct, Health(threading.Lock())), why)
    except BaseException:
        os.close(descriptor)
        if direct >= 0:
            os.close(direct)
        raise


def unreadable(path: Path, error: OSError) -> ConfigError:
    """Return what to tell when what keeps a slab together cannot be read."""
    return ConfigError(
        f"tiers.disk: {str(path)!r} cannot be read ({error.strerror})",
        hint="look for errors of the device in the system's log, or use another one",
    )


# -- files -------------------------------------------------------------------------------------


def _open_file(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"tiers.disk: {str(path)!r} cannot be opened ({error.strerror})",
            hint="make it readable and writable for this user, or use another directory",
        ) from error


def _create_file(path: Path, superblock: Superblock) -> None:
    """Make the file under another name and link it: a half-made slab is never found."""
    length = superblock.length_bytes
    _sweep(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.new")
    descriptor = -1
    try:
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        _allocate(descriptor, length)
        os.pwrite(descriptor, superblock.encode(), 0)
        os.fsync(descriptor)
        os.link(unfinished, path)  # unlike a rename this never replaces another daemon's slab
    except FileExistsError:
        return  # another daemon was faster: the lock decides
    except OSError as error:
        raise ConfigError(
            f"tiers.disk: cannot preallocate {length} bytes at {str(path)!r} ({error.strerror})",
            hint="free space on that file system or use a smaller disk tier",
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
        if descriptor >= 0:
            os.close(descriptor)


def _sweep(path: Path) -> None:
    """Remove slabs that a process began to make and did not live to finish."""
    for left in path.parent.glob(f"{path.name}.*.new"):
        owner = left.name.removeprefix(f"{path.name}.").removesuffix(".new")
        if owner.isdigit() and not Path("/proc", owner).exists():
            left.unlink(missing_ok=True)


def _allocate(descriptor: int, length: int) -> None:
    free = os.fstatvfs(descriptor)
    if length > free.f_bavail * free.f_frsize:  # some systems let fallocate overcommit
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        os.posix_fallocate(descriptor, 0, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, length)  # no fallocate here: a full disk then fails single writes


def lock(descriptor: int, path: Path) -> None:
    """Claim a slab's file until it is closed; raises ConfigError if another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"tiers.disk: {str(path)!r} is in use by another kvstrata daemon",
            hint="connect to that daemon by its address, or give this one another directory",
        ) from error


# -- devices -----------------------------------------------------------------------------------


def open_device(path: Path, flags: int = os.O_RDWR) -> int:
    """Open a device and claim it; raises ConfigError if it is in use or cannot be opened."""
    try:
        # O_EXCL on a device needs no O_CREAT: it claims the device, and fails where it is claimed.
        return os.open(path, flags | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            where = _mounted_at(path)
            raise ConfigError(
                f"tiers.disk: device {str(path)!r} is "
                + (f"mounted at {where!r}" if where else "in use by another kvstrata daemon, "
                   "a volume manager or swap"),
                hint="name a device that nothing else uses, or a directory on its file system",
            ) from error  # fmt: skip
        raise ConfigError(
            f"tiers.disk: device {str(path)!r} cannot be opened ({error.strerror})",
            hint="make it readable and writable for this user, or use another device",
        ) from error


def _mounted_at(path: Path) -> str:
    number = path.stat().st_rdev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            fields = line.split()
            if fields[2] == wanted:
                return fields[4]
    return ""


def _prepare_device(descriptor: int, path: Path, wanted: Superblock) -> None:
    """Make a slab on a device that is blank; leave one that carries our mark as it is."""
    if wanted.length_bytes > (there := length_of(descriptor)):
        raise ConfigError(
            f"tiers.disk: device {str(path)!r} has {there} bytes, fewer than {wanted.length_bytes}",
            hint="use a smaller disk tier, or a larger device",
        )
    try:
        front = os.pread(descriptor, _FRONT_BYTES, 0)
        if is_marked(front):
            return
        if any(front):
            raise LayoutError(
                f"tiers.disk: device {str(path)!r} holds something that is not a kvstrata slab",
                hint=f"if nobody needs it: dd if=/dev/zero of={path} bs=1M count=1",
            )
        # The mark comes last: until then the front is blank, and a crash here changes nothing.
        # Lines of an older slab must not be found.
        blank(descriptor, PAGE_BYTES, wanted.index_end)
        os.pwrite(descriptor, wanted.encode(), 0)
        os.fsync(descriptor)
    except OSError as error:
        raise ConfigError(
            f"tiers.disk: device {str(path)!r} cannot be used ({error.strerror})",
            hint="look for errors of the device in the system's log, or use another one",
        ) from error


# -- both --------------------------------------------------------------------------------------


def blank(descriptor: int, start: int, end: int) -> None:
    """Write zeros from `start` to `end`; they survive a loss of power."""
    for offset in range(start, end, _FRONT_BYTES):
        size = min(_FRONT_BYTES, end - offset)
        if os.pwrite(descriptor, bytes(size), offset) != size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(descriptor)


def length_of(descriptor: int) -> int:
    """Return the length of an open file or device, in bytes."""
    return os.lseek(descriptor, 0, os.SEEK_END)  # a device's st_size is 0


def _open_direct(descriptor: int, offset: int) -> tuple[int, str]:
    """Return a second descriptor that moves pages past the page cache, or -1 and why not."""
    try:
        direct = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        return -1, f"O_DIRECT is refused: {error.strerror}"
    try:
        with mmap.mmap(-1, PAGE_BYTES) as page:
            moved = os.preadv(direct, [page], offset)
    except OSError as error:
        os.close(direct)
        return -1, f"a page cannot be read with O_DIRECT: {error.strerror}"
    if moved != PAGE_BYTES:
        os.close(direct)
        return -1, f"a read of a page with O_DIRECT gave {moved} bytes"
    return direct, ""
