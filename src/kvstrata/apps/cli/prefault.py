"""What people see while the host tier's memory is taken: a bar on a terminal, else a few lines."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

__all__ = ["Prefault"]

log = logging.getLogger("kvstrata.prefault")

_LINES: Final = 10
"""Lines for all of it where there is no terminal."""


class Prefault:
    """Called with the bytes taken and all bytes; shows nothing before the first call."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._lines = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        """Show how far it is."""
        if not self._console.is_terminal:
            due = _LINES * done_bytes // total_bytes
            if due > self._lines:
                self._lines = due
                log.info("took %d of %d bytes of host memory", done_bytes, total_bytes)
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("host memory"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.add_task("host memory", total=total_bytes)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done_bytes)
        if done_bytes == total_bytes:
            self._end()

    def _end(self) -> None:
        """Leave the last state of the bar on the screen; its thread ends here."""
        if self._bar:
            self._bar.stop()
            self._bar = None
