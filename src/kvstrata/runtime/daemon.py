"""The daemon's process: `serve` runs one in this process, `python -m` one for a parent.

A private daemon is told by one line of JSON on its command line what to be, and tells its parent
by one line on a pipe whether it is ready. It ends with its parent, however the parent ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

import msgspec

from kvstrata.core.config import NodeConfig
from kvstrata.core.errors import ConfigError
from kvstrata.policy import make_policy
from kvstrata.runtime.addresses import check_address, lock_path, socket_path
from kvstrata.runtime.process import ProcessWatch
from kvstrata.runtime.server import NodeServer
from kvstrata.storage.footing import check_place
from kvstrata.storage.hostmemory import HostMemory
from kvstrata.storage.memory import check_host_size
from kvstrata.storage.opening import check_keyed
from kvstrata.transfer.mover import check_mover

__all__ = ["PrivateOrder", "ReadyLine", "check", "main", "serve"]


class PrivateOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a parent asks of its private daemon."""

    config: NodeConfig
    """What to own."""
    address: str
    """Where to listen."""
    parent_pid: int
    """With whom to end."""
    parent_started: int
    """Start time of that process, in clock ticks since boot."""
    ready_descriptor: int
    """Pipe on which to say `ReadyLine`."""


class ReadyLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a private daemon tells its parent once."""

    error: str = ""
    """Why it cannot serve; empty when it serves."""
    hint: str = ""
    """What to do about it."""


def check(config: NodeConfig) -> None:
    """Raise ConfigError for what cannot work whatever the blocks' layout is.

    The layout is known only when the first client connects; an operator should not have to wait
    for that to learn of a wrong size or directory.
    """
    make_policy(config.policy)
    check_mover(config.backend)
    limits = config.limits
    if not (0.0 <= limits.cost_margin < math.inf and limits.cost_probe_interval_s >= 0.0):
        raise ConfigError(
            f"cost_margin: {limits.cost_margin}, cost_probe_interval_s: "
            f"{limits.cost_probe_interval_s}: one is negative or no number",
            hint="leave them out, or give 0.1 and 10 for the defaults",
        )
    check_host_size(config.host.capacity_bytes, config.host_memory.share_max)
    for tier in config.lower.values():
        if tier.kind.keyed:
            check_keyed(tier)
        for place in tier.places:
            check_place(place)


def serve(
    config: NodeConfig,
    address: str,
    *,
    parent: ProcessWatch | None = None,
    ready: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Serve until SIGTERM, SIGINT or the parent's end; `ready` is called once calls are taken.

    If the host tier is prefaulted, `progress` is told bytes taken and all bytes before that.
    Raises ConfigError if the address is taken or the configuration cannot be served.
    """
    check(config)
    path = socket_path(check_address(address))
    if path.exists() and not path.is_socket():  # binding would delete it
        raise ConfigError(
            f"address: {str(path)!r} is a file and not a socket",
            hint="choose another address, or move the file away",
        )
    lock = _lock_address(address)
    told = threading.Event()
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: told.set())
        memory = HostMemory.take(config.host.capacity_bytes, config.host_memory)
        with contextlib.closing(memory):
            if memory.fill(progress, lambda: told.is_set() or _orphaned(parent)):
                server = NodeServer(config, address, parent=parent, memory=memory)
                _run(server, told, ready)
    finally:
        lock_path(address).unlink(missing_ok=True)
        os.close(lock)


def _orphaned(parent: ProcessWatch | None) -> bool:
    return parent is not None and parent.ended()


def _run(server: NodeServer, told: threading.Event, ready: Callable[[], None]) -> None:
    """Run `server` until it is told to end, which it may have been already."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        server.stop()

    # Without it a signal that comes just before the poll would wait for the poll's timeout.
    signal.set_wakeup_fd(server.wake_descriptor, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with contextlib.closing(server):
        try:
            if told.is_set():
                return
            ready()
            server.run()
        finally:
            signal.set_wakeup_fd(-1)  # before the pipe is closed


def main(argument: str) -> int:
    """Run a private daemon as ordered; return the process's exit status."""
    order = msgspec.json.decode(argument, type=PrivateOrder)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    parent = ProcessWatch(order.parent_pid, order.parent_started)

    def say(line: ReadyLine) -> None:
        with contextlib.suppress(BrokenPipeError):  # the parent is gone, which `serve` notices
            os.write(order.ready_descriptor, msgspec.json.encode(line) + b"\n")
        os.close(order.ready_descriptor)

    try:
        serve(order.config, order.address, parent=parent, ready=lambda: say(ReadyLine()))
    except ConfigError as error:
        say(ReadyLine(error.message, error.hint))
        return 2
    return 0


def _lock_address(address: str) -> int:
    """Hold the address's lock file: a second daemon must not take over a living one's socket."""
    path = lock_path(address)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"address: cannot listen at {address!r} ({error.strerror})",
            hint="choose a directory that exists and that this user may write to",
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink == 0:  # its last owner was just removing it
            os.close(descriptor)
            return _lock_address(address)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigError(
            f"address: another daemon listens at {address!r}",
            hint="connect to it, or give this one another --address",
        ) from error
    return descriptor


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
