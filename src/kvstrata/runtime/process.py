"""Other processes: are they the ones we mean, and have they ended."""

from __future__ import annotations

import os
import select
from pathlib import Path

__all__ = ["ProcessWatch", "start_ticks"]

_STARTTIME_FIELD = 19  # of /proc/<pid>/stat, counted after the command's closing parenthesis


def start_ticks(pid: int) -> int:
    """Return when `pid` started, in clock ticks since boot; 0 if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[_STARTTIME_FIELD])


class ProcessWatch:
    """Tells when one process ends; a later process with the same pid does not fool it."""

    def __init__(self, pid: int, started: int) -> None:
        """Watch `pid`, which started at `started` ticks; a mismatch counts as ended."""
        self.pid = pid
        self._descriptor = -1
        try:
            self._descriptor = os.pidfd_open(pid)
        except (ProcessLookupError, FileNotFoundError):  # the latter: a thread, not a process
            return
        if start_ticks(pid) != started:
            self.close()

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when the process ends, or -1 if it has."""
        return self._descriptor

    def ended(self) -> bool:
        """Return whether the process has ended, without waiting."""
        if self._descriptor < 0:
            return True
        poller = select.poll()
        poller.register(self._descriptor, select.POLLIN)
        return bool(poller.poll(0))

    def close(self) -> None:
        """Give the descriptor back; twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
