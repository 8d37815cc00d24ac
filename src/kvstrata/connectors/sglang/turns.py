"""Taking turns with the daemon: one session, several threads, no wait without a limit.

SGLang calls from four threads; a session has one owner. So a lock is held for the calls to the
daemon, which are short and bounded, and never for a copy or a wait. Whoever cannot have it in time
goes on without the cache. What must be told to the daemon all the same (a seal, a release) is owed
and paid by whoever has the lock next.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvstrata.connectors.sglang.hostpages import PageSpace
from kvstrata.core.errors import ConfigError, KvstrataError
from kvstrata.core.ids import LineageDigest
from kvstrata.layout import Bridge
from kvstrata.runtime import messages as wire
from kvstrata.runtime.mapped import ask_or_go_on, try_map_host
from kvstrata.runtime.session import Session
from kvstrata.storage.arena import Arena
from kvstrata.tokens import NamespaceKey
from kvstrata.tokens.family import Family
from kvstrata.tokens.namespace import ModelKey, namespace_tag

__all__ = ["Mapped", "Turns"]

log = logging.getLogger("kvstrata.sglang")

AnswerT = TypeVar("AnswerT", bound=wire.Answer)

_OWED_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class Mapped:
    """One epoch of the session: keys and memory that are void in the next."""

    epoch: int
    """The session's epoch."""
    key: NamespaceKey
    """Under which digests become keys."""
    family: Callable[[LineageDigest], Family]
    """Tags a prompt by the digest of its first block."""
    arena: Arena
    """The host tier."""
    blocks: NDArray[np.uint8]
    """Its slots, shape `(slots, block bytes)`."""
    generations: NDArray[np.uint64]
    """The generation of each slot."""
    bridge: Bridge | None = None
    """What re-arranges blocks, if the daemon holds them in another layout than the engine's."""

    def load(self, slot: int, target: PageSpace, page: int) -> None:
        """Copy a slot into a page."""
        if self.bridge is None:
            target.write(page, self.blocks[slot])
            return
        block = np.empty((1, self.bridge.own_bytes), np.uint8)
        self.bridge.take(self.blocks, [slot], block)
        target.write(page, block[0])

    def save(self, source: PageSpace, page: int, slot: int) -> None:
        """Copy a page into a slot."""
        if self.bridge is None:
            source.read(page, self.blocks[slot])
            return
        block = np.empty((1, self.bridge.own_bytes), np.uint8)
        source.read(page, block[0])
        self.bridge.give(block, self.blocks, [slot])


@dataclass(slots=True)
class _Owed:
    epoch: int
    call: wire.Call
    done: bool = False


class Turns:
    """Owns the session. Any thread may call."""

    def __init__(self, session: Session, tenant: str = "") -> None:
        """Take over `session`, which nobody else uses; keys are those of `tenant`."""
        self.session = session
        self._tenant = tenant
        self.late = 0
        self.owed_dropped = 0
        self._lock = threading.Lock()
        self._mapped: Mapped | None = None
        self._owed: deque[_Owed] = deque()
        self._clear_owed = False

    def owe_clear(self) -> None:
        """From now on ask nothing before the daemon has forgotten this model's blocks."""
        self._clear_owed = True

    @contextmanager
    def turn(self, until: float) -> Iterator[Mapped | None]:
        """Have the session to ourselves; None if it is not to be had by `until`, or is down."""
        if not self._lock.acquire(timeout=max(0.0, until - time.monotonic())):
            self.late += 1
            yield None
            return
        try:
            yield self._up()
        finally:
            self._lock.release()

    def call(self, call: wire.Call, kind: type[AnswerT]) -> AnswerT | None:
        """Make one call in our turn; None if it was refused or the daemon is gone."""
        return ask_or_go_on(self.session, call, kind, log)

    def tell(self, epoch: int, call: wire.Call, until: float) -> bool:
        """Have the daemon told, by us if we get our turn in time; return whether it was."""
        owed = self._owe(epoch, call)
        with self.turn(until):
            return owed.done

    def close(self, timeout_s: float) -> None:
        """Leave the daemon, or end it if it is ours; twice is harmless."""
        locked = self._lock.acquire(timeout=timeout_s)
        try:
            if self._mapped:
                self._mapped.arena.close()
                self._mapped = None
            self.session.close()
        finally:
            if locked:
                self._lock.release()

    # -- private -------------------------------------------------------------------------------

    def _owe(self, epoch: int, call: wire.Call) -> _Owed:
        owed = _Owed(epoch, call)
        if len(self._owed) < _OWED_MAX:
            self._owed.append(owed)
        else:
            self.owed_dropped += 1
        return owed

    def _up(self) -> Mapped | None:
        """Return the epoch at hand, all debts paid; None while the daemon is away."""
        session = self.session
        if not session.usable() or not self._pay():
            return None
        if self._mapped and self._mapped.epoch == session.epoch:
            return self._mapped
        if self._mapped:
            self._mapped.arena.close()
            self._mapped = None
        welcome = session.welcome
        assert welcome is not None, "a usable session has been welcomed"
        try:
            bridge = None
            if welcome.layout != session.layout:
                bridge = Bridge(session.layout, welcome.layout)
        except KvstrataError as error:
            log.warning("kvstrata cannot re-arrange the daemon's blocks: %s", error)
            return None
        host = try_map_host(welcome, log)
        if host is None:
            return None
        self._mapped = Mapped(
            session.epoch,
            welcome.namespace_key("", self._tenant),  # SGLang's salts are in its digests
            functools.partial(welcome.family, salt="", tenant=self._tenant),
            host.arena,
            host.blocks,
            host.generations,
            bridge,
        )
        return self._mapped

    def _pay(self) -> bool:
        """Tell the daemon what is owed; False if it was lost over it. The lock is ours."""
        session = self.session
        if self._clear_owed and session.welcome:
            tag = namespace_tag(ModelKey(session.welcome.model_key))
            try:
                session.call(wire.Clear([], tag.hex()), wire.Cleared)
            except ConfigError:  # it keeps nothing of this model, which is what we want
                log.debug("nothing was kept that could be forgotten")
            except KvstrataError as error:
                log.warning("kvstrata's daemon could not be told to forget: %s", error)
                return False
            self._clear_owed = False
        while self._owed and session.welcome:
            owed = self._owed.popleft()
            if owed.epoch == session.epoch:
                owed.done = self.call(owed.call, wire.Done) is not None
        return session.welcome is not None
