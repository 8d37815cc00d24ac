"""A server of a test's own: a program on a free local port, ended with the test."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["ServerProcess", "free_port"]

_READY_S = 30.0


def free_port() -> int:
    """Return a port of the loopback address that nobody listens at now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


class ServerProcess(contextlib.AbstractContextManager["ServerProcess"]):
    """A running program that takes connections; a context manager that ends it."""

    def __init__(
        self,
        command: Sequence[str],
        port: int | None,
        folder: Path,
        variables: Mapping[str, str],
        ready_s: float = _READY_S,
    ) -> None:
        """Start `command` in `folder`, with `variables` besides the path, and wait for its port.

        Without a port nothing is waited for. Raises RuntimeError if it does not come up.
        """
        self._process = subprocess.Popen(  # noqa: S603  # a test's own program
            command,
            cwd=folder,
            env={"PATH": os.environ.get("PATH", "")} | dict(variables),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if port is None:
            return
        deadline_s = time.monotonic() + ready_s
        while time.monotonic() < deadline_s and self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.02)
        self.close()
        raise RuntimeError(f"{Path(command[0]).name} did not come up")

    def __exit__(self, *_: object) -> None:
        self.close()

    def signal(self, number: int) -> None:
        """Send it a signal: SIGSTOP stalls it, SIGCONT lets it go on."""
        self._process.send_signal(number)

    def close(self) -> None:
        """End the server with SIGKILL; twice is harmless."""
        self._process.kill()
        self._process.wait()
