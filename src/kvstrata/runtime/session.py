"""A client's standing with a daemon: opened once, lost when the daemon goes, found again.

    down ---(retry time)---> starting ---(private daemon ready)---> greeting ---> up
      ^                          |                                      |         |
      +--------------------------+--------- failure, timeout -----------+---------+

`open` waits and raises: at start the operator wants to know. Afterwards `usable` drives the
states without ever waiting, so that an engine's step is not held up by a daemon that is gone.
Each time the session comes up anew `epoch` rises: slots and keys of earlier epochs are void.
Not thread-safe; one owner.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvstrata.core.config import NodeConfig
from kvstrata.core.errors import CallRefusedError, ConfigError, DaemonError, DaemonGoneError
from kvstrata.core.ids import SequenceHash
from kvstrata.core.retention import BlockHint
from kvstrata.layout import BlockLayout, check_bridge
from kvstrata.runtime import messages as wire
from kvstrata.runtime.addresses import check_address, socket_path
from kvstrata.runtime.launch import PrivateDaemon
from kvstrata.runtime.link import Link, expect
from kvstrata.runtime.process import start_ticks
from kvstrata.tokens import Namespace
from kvstrata.tokens.family import Family

__all__ = ["Session", "SessionLimits"]

log = logging.getLogger("kvstrata.session")

AnswerT = TypeVar("AnswerT", bound=wire.Answer)


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """How long a client waits for its daemon."""

    call_timeout_s: float = 1.0
    """Longest wait for the answer to one call; then the daemon counts as gone."""
    start_timeout_s: float = 60.0
    """Longest wait for a daemon to start and open its stores."""
    retry_interval_s: float = 1.0
    """Time between two attempts to reach a daemon that is gone."""


class Session:
    """One client's calls to one daemon, given by address or started privately."""

    def __init__(
        self,
        where: str | NodeConfig,
        layout: BlockLayout,
        namespace: Namespace,
        limits: SessionLimits | None = None,
        *,
        bridges: bool = False,
    ) -> None:
        """Remember where; nothing is started before `open`.

        With `bridges` the owner of the session re-arranges its blocks wherever the daemon holds
        another layout, which `welcome` names.
        """
        self.layout = layout
        self.namespace = namespace
        self.epoch = 0
        self.welcome: wire.Welcome | None = None
        self._where = where
        self._limits = limits or SessionLimits()
        self._bridges = bridges
        self._private: PrivateDaemon | None = None
        self._link: Link | None = None
        self._greeting: int | None = None
        self._greeting_until = 0.0
        self._retry_at = 0.0
        self._last_session = 0
        self._writers: list[wire.Process] = []
        self._closed = False

    def open(self) -> wire.Welcome:
        """Reach or start the daemon and say hello.

        Raises ConfigError if it refuses what we are or cannot serve, DaemonError if absent.
        """
        try:
            link = Link(_listening(self._address(wait=True)))
            self._link = link
            timeout_s = self._limits.start_timeout_s
            self._greet(link.call(self._hello(), wire.Welcome, timeout_s))
        except BaseException:
            self.close()
            raise
        assert self.welcome is not None
        return self.welcome

    def usable(self) -> bool:
        """Return whether calls can be made now; drive the way back up if not. Never waits."""
        if self._link and self.welcome is not None:
            try:  # whoever only maps its memory makes no call that would notice
                self._link.check_alive()
            except DaemonError as error:
                self.lost(error)
                return False
            return True
        if self._closed or time.monotonic() < self._retry_at:
            return False
        try:
            return self._try_up()
        except (DaemonError, ConfigError, OSError) as error:  # the last: no descriptor is left
            self._drop(str(error), quiet=True)
            return False

    def lost(self, error: DaemonError) -> None:
        """Take note that a call failed: void the session, say so once, try again later."""
        self._drop(str(error), quiet=False)

    def call(self, call: wire.Call, kind: type[AnswerT]) -> AnswerT:
        """Make one call of an open session.

        Raises CallRefusedError and leaves the session up; for any other DaemonError it is down
        when this returns, and the error is raised for the caller to go on without the cache.
        """
        if self._link is None or self.welcome is None:
            raise CallRefusedError("the session is down")
        try:
            return self._link.call(call, kind, self._limits.call_timeout_s)
        except CallRefusedError:
            raise
        except DaemonError as error:
            self.lost(error)
            raise

    def tell_all(self, calls: Sequence[wire.Call]) -> None:
        """Make calls whose answer is Done in one round trip, in their order; raises as `call`.

        A refused one does not keep those behind it from being carried out.
        """
        if self._link is None or self.welcome is None:
            raise CallRefusedError("the session is down")
        try:
            self._link.call_all(calls, wire.Done, self._limits.call_timeout_s)
        except CallRefusedError:
            raise
        except DaemonError as error:
            self.lost(error)
            raise

    def close(self) -> None:
        """Say goodbye and stop a private daemon; twice is harmless."""
        self._closed = True
        if self._link and self.welcome:
            try:
                self._link.call(wire.Bye(), wire.Done, self._limits.call_timeout_s)
            except (DaemonError, ConfigError):
                log.debug("the daemon did not answer our goodbye")
        self._void()
        if self._private:
            self._private.stop()
            self._private = None

    def fence(self, pids: Sequence[int]) -> None:
        """Name other processes that will write to our slots: none is reused before they end."""
        self._writers = [_process(pid) for pid in pids if pid != os.getpid()]
        if self._writers and self.welcome:
            self.call(wire.Fence(self._writers), wire.Done)

    # -- calls ---------------------------------------------------------------------------------

    def lookup(
        self,
        request: str,
        hashes: Sequence[SequenceHash],
        windows: Sequence[int] = (0,),
        *,
        prefill_tokens_per_s: float = 0.0,
        copy_bytes_per_s: float = 0.0,
    ) -> wire.Found:
        """See `Manager.lookup`; the speeds are the engine's, 0 where not known."""
        joined = wire.join_hashes(hashes)
        speeds = prefill_tokens_per_s, copy_bytes_per_s
        call = wire.Lookup(request, joined, tuple(windows), *speeds)
        return self.call(call, wire.Found)

    def acquire(
        self, request: str, hashes: Sequence[SequenceHash], windows: Sequence[int] = (0,)
    ) -> wire.Acquired:
        """See `Manager.acquire`."""
        message = wire.Acquire(request, wire.join_hashes(hashes), tuple(windows))
        return self.call(message, wire.Acquired)

    def release(self, requests: Sequence[str]) -> None:
        """See `Manager.release`."""
        self.call(wire.Release(list(requests)), wire.Done)

    def lease(self, name: str, hashes: Sequence[SequenceHash], seconds: float) -> wire.Leased:
        """See `Manager.lease`."""
        return self.call(wire.Lease(name, wire.join_hashes(hashes), seconds), wire.Leased)

    def reserve(
        self,
        request: str,
        parent: SequenceHash | None,
        hashes: Sequence[SequenceHash],
        hints: Sequence[BlockHint] = (),
        tenant: str = "",
        family: Family | None = None,
    ) -> wire.Reserved:
        """See `Manager.reserve`; `family` only at the root, for those who ask why it missed."""
        tags = b"".join(family) if family and parent is None else b""
        joined = wire.join_hashes(hashes)
        message = wire.Reserve(request, parent or b"", joined, list(hints), tenant, tags)
        return self.call(message, wire.Reserved)

    def why(self, key: SequenceHash, family: Family) -> str:
        """See `Manager.why_not_root`."""
        return self.call(wire.Why(key, b"".join(family)), wire.Because).why

    def seal(self, request: str, slots: Sequence[int]) -> None:
        """See `Manager.seal`."""
        self.call(wire.Seal(request, list(slots)), wire.Done)

    def abort(self, request: str, slots: Sequence[int]) -> None:
        """See `Manager.abort`."""
        self.call(wire.Abort(request, list(slots)), wire.Done)

    # -- private -------------------------------------------------------------------------------

    def _hello(self) -> wire.Hello:
        return wire.Hello(
            wire.PROTOCOL_VERSION,
            [_process(os.getpid()), *self._writers],
            self.layout,
            self.namespace,
            self._last_session,
            self._bridges,
        )

    def _address(self, *, wait: bool) -> str:
        """Return the daemon's address, or an empty one while a private one is starting."""
        if isinstance(self._where, str):
            return self._where
        if self._private is None:
            self._private = PrivateDaemon(self._where)
        if wait:
            self._private.wait_ready(self._limits.start_timeout_s)
        return self._private.address if self._private.poll_ready() else ""

    def _try_up(self) -> bool:
        if self._link is None:
            address = self._address(wait=False)
            if not address:
                return False
            self._link = Link(address)
            self._greeting = self._link.send(self._hello(), self._limits.start_timeout_s)
            self._greeting_until = time.monotonic() + self._limits.start_timeout_s
        assert self._greeting is not None
        answer = self._link.try_receive(self._greeting)
        if answer is not None:
            self._greet(expect(answer, wire.Welcome))
            log.warning("kvstrata daemon (pid %d) is back: using the cache again", self.daemon_pid)
            return True
        if time.monotonic() >= self._greeting_until:
            self._drop("no answer to hello", quiet=True)
        return False

    def _greet(self, welcome: wire.Welcome) -> None:
        assert self._link is not None
        check_bridge(self.layout, welcome.layout)
        self._link.session = self._last_session = welcome.session
        self._link.watch(welcome.pid)
        self.welcome = welcome
        self.epoch += 1

    @property
    def daemon_pid(self) -> int:
        """The daemon's process, 0 while the session is down."""
        return self.welcome.pid if self.welcome else 0

    @property
    def daemon_address(self) -> str:
        """Where the daemon listens, empty while the session is down."""
        return self._link.address if self._link else ""

    def _drop(self, why: str, *, quiet: bool) -> None:
        self._void()
        if self._private:
            self._private.abandon()
            self._private = None
        self._retry_at = time.monotonic() + self._limits.retry_interval_s
        if not quiet:
            log.warning(
                "kvstrata daemon lost (%s): going on without the cache, looking for it every %g s",
                why,
                self._limits.retry_interval_s,
            )

    def _void(self) -> None:
        if self._link:
            self._link.close()
        self._link = None
        self._greeting = None
        self.welcome = None


def _listening(address: str) -> str:
    """Return the address if there is a socket: an operator should not wait to learn of a typo."""
    if not socket_path(check_address(address)).exists():
        raise DaemonGoneError(f"nothing listens at {address}; start kvstrata serve there first")
    return address


def _process(pid: int) -> wire.Process:
    return wire.Process(pid, start_ticks(pid))
