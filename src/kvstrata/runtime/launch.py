"""Starting a private daemon: a child of this process that ends with it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time

import msgspec

from kvstrata.core.config import NodeConfig
from kvstrata.core.errors import ConfigError, DaemonGoneError
from kvstrata.runtime.addresses import lock_path, private_address, socket_path
from kvstrata.runtime.daemon import PrivateOrder, ReadyLine
from kvstrata.runtime.process import start_ticks

__all__ = ["PrivateDaemon"]

_STOP_WAIT_S = 5.0


class PrivateDaemon:
    """A daemon being started or running for this process. `poll_ready` never waits."""

    def __init__(self, config: NodeConfig) -> None:
        """Start the process; it is ready later."""
        self.address = private_address()
        self._reader, writer = os.pipe()
        self._ready = False
        order = PrivateOrder(config, self.address, os.getpid(), start_ticks(os.getpid()), writer)
        try:
            self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
                [
                    sys.executable,
                    "-m",
                    "kvstrata.runtime.daemon",
                    msgspec.json.encode(order).decode(),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[writer],
                start_new_session=True,  # an interrupt at the terminal is for the engine
            )
        except OSError:
            os.close(self._reader)
            raise
        finally:
            os.close(writer)

    @property
    def pid(self) -> int:
        """The daemon's process."""
        return self._process.pid

    def poll_ready(self) -> bool:
        """Return whether it serves by now.

        Raises ConfigError with its reason if it refused to, DaemonGoneError if it just ended.
        """
        if self._ready:
            return True
        if not select.select([self._reader], [], [], 0)[0]:
            return False
        data = os.read(self._reader, 65536)
        if not data:
            raise DaemonGoneError(f"the private daemon ended with status {self._process.wait()}")
        line = msgspec.json.decode(data, type=ReadyLine)
        if line.error:
            raise ConfigError(line.error, hint=line.hint)
        self._ready = True
        return True

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until it serves; errors as `poll_ready`, and DaemonGoneError after the timeout."""
        deadline = time.monotonic() + timeout_s
        while not self.poll_ready():
            left = deadline - time.monotonic()
            if left <= 0:
                self.stop()
                raise DaemonGoneError(f"the private daemon was not ready in {timeout_s} s")
            select.select([self._reader], [], [], left)

    def stop(self) -> None:
        """Ask it to end, wait, kill it if it does not; twice is harmless."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_WAIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._clean_up()

    def abandon(self) -> None:
        """Kill it without waiting: its caller is in the middle of an engine's step."""
        self._process.kill()
        self._process.poll()  # if it is not gone yet, the next Popen of this process reaps it
        self._clean_up()

    def _clean_up(self) -> None:
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1
        for path in (socket_path(self.address), lock_path(self.address)):
            path.unlink(missing_ok=True)
