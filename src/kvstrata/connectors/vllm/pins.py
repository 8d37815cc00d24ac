"""Blocks that a request asks to have pinned once it has ended: leases on what the host has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from kvstrata.core.errors import DaemonError
from kvstrata.core.ids import SequenceHash
from kvstrata.runtime.session import Session

__all__ = ["Pins"]

log = logging.getLogger("kvstrata.vllm")

_DUE_MAX: Final = 4096
_TRIES_MAX: Final = 20


@dataclass(slots=True)
class _Due:
    epoch: int
    name: str
    hashes: list[SequenceHash]
    seconds: float
    tries: int = 0


class Pins:
    """Owner: the scheduler half. vLLM ends a request before it tells what its last step saved.

    The daemon, too, verifies what was saved before it can be found. So a lease that is not whole is
    taken anew in the engine's next steps, a bounded number of times.
    """

    def __init__(self, session: Session, note: Callable[[DaemonError], None]) -> None:
        """Take leases in `session`; `note` is told what goes wrong."""
        self._session, self._note = session, note
        self._due: list[_Due] = []

    def ask(
        self,
        epoch: int,
        hashes: Sequence[SequenceHash],
        prompt_blocks: int,
        seconds: float | None,
    ) -> None:
        """Remember that blocks of the session's `epoch` are to be pinned; 0 seconds end it.

        The first `prompt_blocks` are the prompt's: one prompt has one pin, whatever was answered.
        """
        if seconds is None or not hashes:
            return
        last = hashes[min(max(prompt_blocks, 1), len(hashes)) - 1]
        if len(self._due) >= _DUE_MAX:
            log.warning("kvstrata pins no more than %d requests at once: one is not", _DUE_MAX)
            return
        self._due.append(_Due(epoch, f"pin {last.hex()}", list(hashes), seconds))

    def take(self) -> None:
        """Take the leases that are due; those of a daemon that is gone ended with its host tier."""
        due, self._due = self._due, []
        for each in due:
            if each.epoch != self._session.epoch or self._session.welcome is None:
                continue
            try:
                kept = self._session.lease(each.name, each.hashes, each.seconds).blocks
            except DaemonError as error:
                self._note(error)
                continue
            each.tries += 1
            if each.seconds and kept < len(each.hashes) and each.tries < _TRIES_MAX:
                self._due.append(each)
