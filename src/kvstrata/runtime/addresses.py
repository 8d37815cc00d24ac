"""Where daemons listen: sockets in a directory that only this user can enter."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import Final

from kvstrata.core.errors import ConfigError

__all__ = ["check_address", "default_address", "lock_path", "private_address", "socket_path"]

_PREFIX: Final = "ipc://"
_PATH_BYTES_MAX: Final = 107  # sun_path of a Unix socket, less its closing zero


def default_address() -> str:
    """Return where `kvstrata serve` listens unless told otherwise."""
    return f"{_PREFIX}{_run_directory() / 'node.sock'}"


def private_address() -> str:
    """Return a fresh address for a daemon of this process alone; sweep those of dead processes."""
    folder = _run_directory()
    for left in folder.glob("private-*"):
        owner = left.name.split("-")[1]
        if owner.isdigit() and not Path("/proc", owner).exists():
            left.unlink(missing_ok=True)
    return f"{_PREFIX}{folder / f'private-{os.getpid()}-{secrets.token_hex(4)}.sock'}"


def check_address(address: str) -> str:
    """Return `address`; raises ConfigError unless it is an `ipc://` path that a socket can have."""
    path = address.removeprefix(_PREFIX)
    if not address.startswith(_PREFIX) or not path.startswith("/"):
        raise ConfigError(
            f"address: {address!r} is not an absolute ipc:// path",
            hint="write ipc:///run/user/1000/kvstrata/node.sock, or leave it out",
        )
    if len(path.encode()) > _PATH_BYTES_MAX:
        raise ConfigError(
            f"address: {path!r} is longer than the {_PATH_BYTES_MAX} bytes of a socket's path",
            hint="use a shorter directory, for example under /run or /tmp",
        )
    return address


def socket_path(address: str) -> Path:
    """Return the file of a checked address."""
    return Path(address.removeprefix(_PREFIX))


def lock_path(address: str) -> Path:
    """Return the file that the daemon of a checked address holds locked."""
    path = socket_path(address)
    return path.with_name(f"{path.name}.lock")


def _run_directory() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        folder = Path(runtime, "kvstrata")
    else:
        folder = Path("/tmp", f"kvstrata-{os.getuid()}")  # noqa: S108  # made 0700 and checked
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"address: {str(folder)!r} is not a directory of this user alone",
            hint="remove it, or set XDG_RUNTIME_DIR to a directory of yours with mode 0700",
        )
    return folder
