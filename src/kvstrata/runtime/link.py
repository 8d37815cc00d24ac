"""One client's line to a daemon: calls with ids and deadlines, waited for or polled.

Not thread-safe; one owner. A call that timed out leaves the daemon's view unknown, so the owner
closes the link and says hello again rather than guess (`runtime.session` does).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TypeVar

import msgspec
import zmq

from kvstrata.core.errors import (
    CallRefusedError,
    CallTimeoutError,
    ConfigError,
    DaemonGoneError,
)
from kvstrata.runtime import messages as wire
from kvstrata.runtime.addresses import check_address
from kvstrata.runtime.process import ProcessWatch, start_ticks

__all__ = ["Link"]

AnswerT = TypeVar("AnswerT", bound=wire.Answer)

_RECONNECT_MS = 50
_CALLS_MAX = 64  # out at once, far below what ZeroMQ queues
_DESCRIPTORS = 24  # more than a context, a socket and the watch of a process take


class Link:
    """A DEALER socket to one daemon."""

    def __init__(self, address: str) -> None:
        """Connect; that there is a daemon shows only when it answers.

        Raises DaemonGoneError if this process has too few descriptors left for it.
        """
        self.address = check_address(address)
        self.session = 0
        self._watch: ProcessWatch | None = None
        _check_descriptors(self.address)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.reconnect_ivl = _RECONNECT_MS
        # Until the daemon's process is known nothing else shows that it took a call and ended: the
        # socket would connect to the next daemon by itself, which never saw that call.
        self._broken: zmq.Socket[bytes] | None = self._socket.get_monitor_socket(
            zmq.EVENT_DISCONNECTED
        )
        self._socket.connect(self.address)
        self._last_id = 0
        self._answers: dict[int, wire.Answer] = {}
        self._awaited: set[int] = set()

    def watch(self, pid: int) -> None:
        """From now on notice the end of the daemon's process `pid` at once."""
        self._watch = ProcessWatch(pid, start_ticks(pid))
        self._stop_monitor()

    def send(self, call: wire.Call, timeout_s: float) -> int:
        """Send `call` and return its id for `try_receive`.

        Raises DaemonGoneError if the daemon ended: another one may listen there by now, and it
        knows nothing of our session.
        """
        self.check_alive()
        self._last_id += 1
        deadline = time.monotonic() + timeout_s
        envelope = wire.Envelope(self._last_id, deadline, self.session, call)
        try:
            self._socket.send(wire.encode(envelope), zmq.NOBLOCK)
        except zmq.Again as error:
            raise DaemonGoneError(f"nothing takes calls at {self.address}") from error
        self._awaited.add(self._last_id)
        return self._last_id

    def try_receive(self, call_id: int) -> wire.Answer | None:
        """Return the answer to a call if it is there; raises DaemonGoneError if none can come."""
        while True:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                reply = wire.decode_reply(data)
            except msgspec.MsgspecError as error:
                raise DaemonGoneError(f"{self.address} does not speak our protocol") from error
            if reply.id in self._awaited:
                self._answers[reply.id] = reply.answer
        if call_id in self._answers:
            self._awaited.discard(call_id)
            return self._answers.pop(call_id)
        self.check_alive()
        return None

    def call(self, call: wire.Call, kind: type[AnswerT], timeout_s: float) -> AnswerT:
        """Send `call` and wait for its answer of type `kind`.

        Raises CallTimeoutError, DaemonGoneError, CallRefusedError, or ConfigError where the daemon
        says that the operator must change something.
        """
        deadline = time.monotonic() + timeout_s
        call_id = self.send(call, timeout_s)
        return expect(self._wait(call_id, type(call).__name__, deadline), kind)

    def call_all(
        self, calls: Sequence[wire.Call], kind: type[wire.Answer], timeout_s: float
    ) -> None:
        """Send `calls` and only then wait for their answers, so that all share one round trip.

        They share the deadline too. A refused one does not keep those behind it from being carried
        out. Raises as `call`, a refusal only once every answer is there.
        """
        refused: Exception | None = None
        deadline = time.monotonic() + timeout_s
        for start in range(0, len(calls), _CALLS_MAX):
            part = calls[start : start + _CALLS_MAX]
            left_s = max(0.0, deadline - time.monotonic())
            sent = [(self.send(call, left_s), type(call).__name__) for call in part]
            for call_id, name in sent:
                answer = self._wait(call_id, name, deadline)
                try:
                    expect(answer, kind)
                except (CallRefusedError, ConfigError) as error:
                    refused = refused or error
        if refused:
            raise refused

    def _wait(self, call_id: int, name: str, deadline: float) -> wire.Answer:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        if self._watch and self._watch.fileno() >= 0:
            poller.register(self._watch.fileno(), zmq.POLLIN)
        if self._broken:
            poller.register(self._broken, zmq.POLLIN)
        while (answer := self.try_receive(call_id)) is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                self._awaited.discard(call_id)
                raise CallTimeoutError(f"{name} had no answer from {self.address} in time")
            poller.poll(max(1, int(left_s * 1000)))
        return answer

    def check_alive(self) -> None:
        """Raise DaemonGoneError if the daemon is known to have ended; never waits."""
        if self._watch and self._watch.ended():
            raise DaemonGoneError(f"the daemon (pid {self._watch.pid}) ended")
        if self._broken and self._broken.poll(0):
            raise DaemonGoneError(f"the daemon at {self.address} ended before it answered")

    def _stop_monitor(self) -> None:
        if self._broken:
            self._socket.disable_monitor()
            self._broken.close(0)
            self._broken = None

    def close(self) -> None:
        """Close the line; twice is harmless."""
        if self._context.closed:
            return
        self._stop_monitor()
        self._socket.close()
        self._context.term()
        if self._watch:
            self._watch.close()


def _check_descriptors(address: str) -> None:
    """Raise DaemonGoneError unless there is room: ZeroMQ ends its process where it gets none."""
    taken: list[int] = []
    try:
        for _ in range(_DESCRIPTORS):
            taken.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))  # noqa: PERF401  # freed below
    except OSError as error:
        raise DaemonGoneError(
            f"no descriptors left to reach {address}: {error.strerror}"
        ) from error
    finally:
        for each in taken:
            os.close(each)


def expect(answer: wire.Answer, kind: type[AnswerT]) -> AnswerT:
    """Return `answer` if it is of `kind`, else raise what it says."""
    if isinstance(answer, wire.Refused):
        if answer.kind == "config":
            raise ConfigError(answer.message, hint=answer.hint)
        raise CallRefusedError(answer.message)
    if not isinstance(answer, kind):
        raise CallRefusedError(f"the daemon answered {type(answer).__name__}, not {kind.__name__}")
    return answer
