"""One epoch of a tier's session: its keys, and the daemon's host tier as rows of bytes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvstrata.core.errors import CallRefusedError, KvstrataError
from kvstrata.core.ids import LineageDigest, SequenceHash
from kvstrata.runtime import messages as wire
from kvstrata.runtime.session import Session
from kvstrata.storage.arena import Arena
from kvstrata.tokens import sequence_hashes
from kvstrata.tokens.namespace import ModelKey, salted_key

__all__ = ["DaemonSide", "Epoch", "Rows"]

log = logging.getLogger("kvstrata.vllm")

AnswerT = TypeVar("AnswerT", bound=wire.Answer)

Rows: TypeAlias = NDArray[np.uint8]
"""Blocks of bytes, `[row, block bytes]`."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """What is void once the daemon is another one."""

    number: int
    """The session's epoch."""
    model_key: ModelKey
    """From which the keys of each mark are made."""
    arena: Arena
    """The host tier."""
    blocks: Rows
    """Its slots."""
    generations: NDArray[np.uint64]
    """The generation of each slot."""

    def hashes(self, mark: str, digests: Sequence[LineageDigest]) -> list[SequenceHash]:
        """Return the daemon's keys; what was stored under one mark is not found under another."""
        return sequence_hashes(salted_key(self.model_key, mark), digests)


class DaemonSide:
    """Owns the session. One owner thread; no call raises or waits longer than the session's."""

    def __init__(self, session: Session) -> None:
        """Take over `session`, which nobody else uses."""
        self.session = session
        self._epoch: Epoch | None = None

    def epoch(self) -> Epoch | None:
        """Return the epoch at hand, None while the daemon is away."""
        session = self.session
        if not session.usable():
            return None
        if self._epoch and self._epoch.number == session.epoch:
            return self._epoch
        self._unmap()
        welcome = session.welcome
        assert welcome is not None, "a usable session has been welcomed"
        try:
            arena = Arena.attach(welcome.arena, welcome.layout)
        except KvstrataError as error:
            log.warning("kvstrata cannot map the daemon's arena: %s", error)
            return None
        grid = arena.grid
        blocks: Rows = np.ndarray(
            (grid.slots, grid.block_bytes),
            np.uint8,
            arena.region.view,
            grid.base_bytes,
            (grid.stride_bytes, 1),
        )
        generations = np.frombuffer(arena.generations, np.uint64)
        key = ModelKey(welcome.model_key)
        self._epoch = Epoch(session.epoch, key, arena, blocks, generations)
        return self._epoch

    def call(self, call: wire.Call, kind: type[AnswerT]) -> AnswerT | None:
        """Make one call; None if it was refused or the daemon is gone."""
        try:
            return self.session.call(call, kind)
        except CallRefusedError as error:
            log.warning("kvstrata daemon refused a call: %s", error)
        except KvstrataError as error:  # a lost session has said so itself
            log.debug("no answer: %s", error)
        return None

    def close(self) -> None:
        """Leave the daemon, or end it if it is ours; twice is harmless."""
        self._unmap()
        self.session.close()

    def _unmap(self) -> None:
        if self._epoch:
            arena, self._epoch = self._epoch.arena, None
            arena.close()
