"""What a client without a thread of its own shares with others of its kind: mapping and asking.

An engine's connector maps the daemon's host tier itself, and goes on without the cache where a
call is refused or the daemon is gone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvstrata.core.errors import CallRefusedError, KvstrataError
from kvstrata.runtime import messages as wire
from kvstrata.runtime.session import Session
from kvstrata.storage.arena import Arena

__all__ = ["MappedHost", "ask_or_go_on", "try_map_host"]

AnswerT = TypeVar("AnswerT", bound=wire.Answer)


@dataclass(frozen=True, slots=True)
class MappedHost:
    """The daemon's host tier in this process, for one epoch of a session."""

    arena: Arena
    """The mapping; whoever has asked for it closes it."""
    blocks: NDArray[np.uint8]
    """Its slots, shape `(slots, block bytes)`."""
    generations: NDArray[np.uint64]
    """The generation of each slot."""


def try_map_host(welcome: wire.Welcome, log: logging.Logger) -> MappedHost | None:
    """Return the host tier of the daemon that answered `welcome`; None if that is gone by now."""
    try:
        arena = Arena.attach(welcome.arena, welcome.layout)
    except KvstrataError as error:
        log.warning("kvstrata cannot map the daemon's arena: %s", error)
        return None
    grid = arena.grid
    blocks: NDArray[np.uint8] = np.ndarray(
        (grid.slots, grid.block_bytes),
        np.uint8,
        arena.region.view,
        grid.base_bytes,
        (grid.stride_bytes, 1),
    )
    return MappedHost(arena, blocks, np.frombuffer(arena.generations, np.uint64))


def ask_or_go_on(
    session: Session, call: wire.Call, kind: type[AnswerT], log: logging.Logger
) -> AnswerT | None:
    """Make one call; None if it was refused, which is logged, or if the daemon is gone."""
    try:
        return session.call(call, kind)
    except CallRefusedError as error:
        log.warning("kvstrata daemon refused a call: %s", error)
    except KvstrataError as error:  # a lost session has said so itself
        log.debug("no answer: %s", error)
    return None
