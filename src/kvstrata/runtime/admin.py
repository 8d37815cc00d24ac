"""What an operator asks of a daemon: statistics, clearing, waiting for writes to land."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from kvstrata.core.errors import CallTimeoutError, DaemonGoneError
from kvstrata.runtime import messages as wire
from kvstrata.runtime.addresses import lock_path, socket_path
from kvstrata.runtime.link import Link

__all__ = ["AdminClient", "wait_until_idle"]

_POLL_S = 0.01


class AdminClient:
    """A line to a daemon that needs no session and no layout."""

    def __init__(self, address: str, timeout_s: float = 5.0) -> None:
        """Connect to `address`; each call waits at most `timeout_s`.

        Raises DaemonGoneError if there is no socket at all.
        """
        self._link = Link(address)
        if not _listening(address):
            self._link.close()
            raise DaemonGoneError(f"nothing listens at {address}")
        self._timeout_s = timeout_s

    def stats(self) -> dict[str, Any]:
        """Return counters and tier states."""
        return self._link.call(wire.Stats(), wire.StatsAnswer, self._timeout_s).stats

    def clear(
        self,
        tiers: Sequence[str] = (),
        *,
        namespace: str = "",
        tenant: str | None = None,
    ) -> int:
        """Forget every block in `tiers`, or in all of them; return how many there were.

        With a `namespace`, by model name or tag in hexadecimal, or a `tenant`, only what is
        theirs, and in every tier. Raises ConfigError if nothing of theirs is kept.
        """
        message = wire.Clear(list(tiers), namespace, tenant)
        return self._link.call(message, wire.Cleared, self._timeout_s).blocks

    def wait_idle(self, timeout_s: float) -> None:
        """Wait until nothing is on its way between tiers; CallTimeoutError if that takes longer."""
        wait_until_idle(self.stats, timeout_s)

    def close(self) -> None:
        """Close the line; twice is harmless."""
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def wait_until_idle(stats: Callable[[], dict[str, Any]], timeout_s: float) -> None:
    """Ask for `stats` until nothing is on its way; CallTimeoutError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        node = stats()["node"]
        if node is None or not node["pending"]:
            return
        if time.monotonic() >= deadline:
            raise CallTimeoutError(f"{node['pending']} blocks still on their way")
        time.sleep(_POLL_S)


def _listening(address: str) -> bool:
    """Return whether a daemon holds the address: a socket file alone may be a dead one's."""
    if not socket_path(address).exists():
        return False
    try:
        descriptor = os.open(lock_path(address), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return True  # not ours to look at; asking will tell
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
