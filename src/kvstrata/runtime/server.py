"""The daemon's one loop: messages in, brain, answers out.

Concurrency: `run` is the owner thread of sockets, sessions and brain. Executor threads only wake
it through a pipe. A caller that stopped waiting is not served: the daemon drops its call.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from kvstrata.core.config import NodeConfig, tier_names
from kvstrata.core.errors import CallRefusedError, ConfigError, KvstrataError
from kvstrata.core.ids import HASH_BYTES, Holder, SequenceHash, SessionId, SlotId
from kvstrata.manager import EngineSpeed, Manager
from kvstrata.runtime import messages as wire
from kvstrata.runtime.addresses import check_address, socket_path
from kvstrata.runtime.holding import choose_layout, refuse_layout
from kvstrata.runtime.node import Node
from kvstrata.runtime.process import ProcessWatch
from kvstrata.runtime.secret import node_secret
from kvstrata.storage.footing import is_device
from kvstrata.storage.hostmemory import HostMemory
from kvstrata.tokens.family import family_key
from kvstrata.tokens.namespace import namespace_tag
from kvstrata.transfer.mover import choose_mover

__all__ = ["NodeServer"]

log = logging.getLogger("kvstrata.daemon")

_IDLE_WAIT_MS = 1000
_BUSY_WAIT_MS = 10
_MESSAGE_BYTES_MAX = 16 << 20


@dataclass(slots=True)
class _Session:
    watches: list[ProcessWatch]
    namespace: bytes  # its tag
    closed: bool = False

    def fence(self, processes: list[wire.Process]) -> None:
        """Watch those of `processes` that are not watched yet."""
        known = {watch.pid for watch in self.watches}
        self.watches += [
            ProcessWatch(each.pid, each.started) for each in processes if each.pid not in known
        ]

    def alive(self) -> bool:
        """Return whether some process is left that may still write to the session's slots."""
        return any(not watch.ended() for watch in self.watches)


class NodeServer:
    """Serves one node's tiers at one address."""

    def __init__(
        self,
        config: NodeConfig,
        address: str,
        *,
        parent: ProcessWatch | None = None,
        memory: HostMemory | None = None,
    ) -> None:
        """Bind the address; with `parent` the server stops when that process ends.

        `memory` is for the host tier and stays the caller's to close; without, the server takes
        its own. Raises ConfigError for a configuration that cannot be served.
        """
        self.address = check_address(address)
        self._config = config
        self._mover = choose_mover(config.backend, _disk_directory(config), config.limits)
        self._secret = node_secret(config)
        self._own_memory = (
            None if memory else HostMemory.take(config.host.capacity_bytes, config.host_memory)
        )
        self._memory = memory or self._own_memory
        self._parent = parent
        self._node: Node | None = None
        self._sessions: dict[SessionId, _Session] = {}
        self._stopping = False
        self._orphaned = False  # the parent is gone: nothing may outlive it for long
        self._malformed = 0
        self._late_calls = 0
        self._wake, self.wake_descriptor = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.maxmsgsize = _MESSAGE_BYTES_MAX
        try:
            self._socket.bind(self.address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(
                f"address: cannot listen at {address!r} ({error.strerror})",
                hint="choose a directory that exists and that this user may write to",
            ) from error

    def run(self) -> None:
        """Serve until `stop` or the parent's end, then close."""
        try:
            while not self._stopping:
                self._wait()
                self._receive_all()
                if self._node:
                    self._node.work(time.monotonic())
            if self._node and not self._orphaned:
                self._write_out(self._node)
        finally:
            self.close()

    def stop(self) -> None:
        """End `run` soon; may be called from any thread or a signal handler."""
        self._stopping = True
        self.wake()

    def wake(self) -> None:
        """Make the loop look for news; called by executor threads."""
        with contextlib.suppress(BlockingIOError):  # full: the loop is awake already
            os.write(self.wake_descriptor, b"\0")

    def close(self) -> None:
        """Give everything back; twice is harmless."""
        if self._context.closed:
            return
        if self._node:
            self._node.close()
        if self._own_memory:
            self._own_memory.close()
        for watch in self._watches():
            watch.close()
        self._socket.close()
        self._context.term()
        os.close(self._wake)
        os.close(self.wake_descriptor)
        socket_path(self.address).unlink(missing_ok=True)

    # -- the loop ------------------------------------------------------------------------------

    def _write_out(self, node: Node) -> None:
        """Let what was on its way down arrive, for a bounded time: an orderly end keeps it."""
        until = time.monotonic() + self._config.limits.drain_timeout_s
        while node.writing and (now := time.monotonic()) < until:
            if select.select([self._wake], [], [], _BUSY_WAIT_MS / 1000)[0]:
                os.read(self._wake, 65536)
            node.work(now)
        if node.writing:
            log.warning("stopped before %d blocks were written below the host", node.writing)

    def _wait(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        for watch in [*self._watches(), *([self._parent] if self._parent else [])]:
            if watch.fileno() >= 0:
                poller.register(watch.fileno(), zmq.POLLIN)
        ready = dict(
            poller.poll(_BUSY_WAIT_MS if self._node and self._node.busy else _IDLE_WAIT_MS)
        )
        if self._wake in ready:
            os.read(self._wake, 65536)
        if self._parent and (self._parent.fileno() < 0 or self._parent.fileno() in ready):
            self._stopping = self._orphaned = True
        for identifier, session in list(self._sessions.items()):
            for watch in session.watches:
                if watch.fileno() in ready:
                    watch.close()
            if not session.alive():
                self._forget(identifier, session)

    def _forget(self, identifier: SessionId, session: _Session) -> None:
        del self._sessions[identifier]
        for watch in session.watches:
            watch.close()
        if self._node:
            self._node.manager.session_dead(identifier)

    def _watches(self) -> list[ProcessWatch]:
        return [watch for session in self._sessions.values() for watch in session.watches]

    def _receive_all(self) -> None:
        for _ in range(1000):  # then let the brain work, however many callers there are
            try:
                identity, data = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except ValueError:  # not two frames: not one of our clients
                self._malformed += 1
                continue
            reply = self._serve(data)
            if reply is not None:
                self._socket.send_multipart([identity, wire.encode(reply)], zmq.NOBLOCK)

    def _serve(self, data: bytes) -> wire.Reply | None:
        try:
            envelope = wire.decode_envelope(data)
        except (msgspec.MsgspecError, KvstrataError) as error:
            self._malformed += 1
            log.warning("dropped a malformed message of %d bytes: %s", len(data), error)
            return None
        now = time.monotonic()
        if now >= envelope.deadline:
            self._late_calls += 1
            return None
        try:
            answer = self._answer(SessionId(envelope.session), envelope.call, now)
        except ConfigError as error:
            answer = wire.Refused(error.message, error.hint, "config")
        except (CallRefusedError, ValueError) as error:
            answer = wire.Refused(str(error))
        return wire.Reply(envelope.id, answer)

    # -- calls ---------------------------------------------------------------------------------

    def _answer(self, session: SessionId, call: wire.Call, now: float) -> wire.Answer:
        match call:
            case wire.Hello():
                return self._hello(call)
            case wire.Stats():
                return wire.StatsAnswer(self._statistics())
            case wire.Clear():
                return wire.Cleared(self._clear(call))
            case wire.Bye():
                return self._bye(session)
            case _:
                return self._session_answer(session, call, now)

    def _session_answer(self, session: SessionId, call: wire.Call, now: float) -> wire.Answer:
        known = self._sessions.get(session)
        if known is None or known.closed or self._node is None:
            raise CallRefusedError("session: unknown or closed, say hello again")
        manager = self._node.manager
        match call:
            case wire.Lookup():
                holder, hashes = Holder(session, call.request), wire.split_hashes(call.hashes)
                speed = EngineSpeed(call.prefill_tokens_per_s, call.copy_bytes_per_s)
                found = manager.lookup(holder, hashes, now, call.windows, speed)
                staged: dict[str, int] = dict(found.staged.items())
                return wire.Found(found.ready, staged, found.pending, found.until, found.why)
            case wire.Acquire():
                holder, hashes = Holder(session, call.request), wire.split_hashes(call.hashes)
                got = manager.acquire(holder, hashes, now, call.windows)
                staged = dict(got.staged.items())
                return wire.Acquired(got.blocks, list(got.slots), got.generations, staged)
            case wire.Reserve():
                return self._reserve(manager, Holder(session, call.request), call, now)
            case wire.Why():
                family = wire.split_family(call.family)
                reason = manager.why_not_root(
                    SequenceHash(call.key),
                    family,
                    known.namespace,
                    across_salts=self._config.explain_across_salts,
                )
                return wire.Because(reason)
            case wire.Fence():
                known.fence(call.processes)
                return wire.Done()
            case _:
                return self._carry_out(self._node, session, call, now)

    def _reserve(
        self, manager: Manager, holder: Holder, call: wire.Reserve, now: float
    ) -> wire.Reserved:
        if len(call.parent) not in (0, HASH_BYTES):
            raise CallRefusedError(f"parent: {len(call.parent)} bytes are not one hash")
        if call.family and call.parent:
            raise CallRefusedError("family: only the first block of a prompt has one")
        family = wire.split_family(call.family) if call.family else None
        hashes = wire.split_hashes(call.parent + call.hashes)
        parent = hashes.pop(0) if call.parent else None
        namespace = self._sessions[holder.session].namespace
        owner = manager.tenants.owner(namespace, call.tenant)
        slots = manager.reserve(holder, parent, hashes, call.hints, now, owner)
        if family and slots.throttled < len(hashes):  # else there was no room for the first one
            manager.note_family(family, namespace)
        return wire.Reserved(slots.indices, list(slots.slots), slots.throttled)

    def _carry_out(
        self, node: Node, session: SessionId, call: wire.Call, now: float
    ) -> wire.Answer:
        manager = node.manager
        match call:
            case wire.Lease():
                lessee = Holder(session, call.request)
                hashes = wire.split_hashes(call.hashes)
                return wire.Leased(manager.lease(lessee, hashes, call.seconds, now))
            case wire.Changes():
                got = manager.changes(call.cursor)
                rows = [(str(each.tier), each.stored, b"".join(each.keys)) for each in got.changes]
                return wire.Changed(got.cursor, got.lost, got.more, rows)
            case wire.Forget():
                return wire.Cleared(node.forget(SequenceHash(call.key)))
            case wire.Seal():
                manager.seal(Holder(session, call.request), [SlotId(s) for s in call.slots])
            case wire.Abort():
                manager.abort(Holder(session, call.request), [SlotId(s) for s in call.slots])
            case wire.Release():
                for request in call.requests:
                    manager.release(Holder(session, request))
            case _:
                raise CallRefusedError(f"{type(call).__name__} needs no session")
        return wire.Done()

    def _hello(self, call: wire.Hello) -> wire.Welcome:
        if call.protocol != wire.PROTOCOL_VERSION:
            raise ConfigError(
                f"protocol: the client speaks version {call.protocol}, this daemon "
                f"{wire.PROTOCOL_VERSION}",
                hint="run the same kvstrata version in both",
            )
        if call.namespace.block_tokens != call.layout.block_tokens:
            raise CallRefusedError("block_tokens: namespace and layout differ")
        model_key = call.namespace.model_key(self._secret)
        opened = _Session([], namespace_tag(model_key))
        opened.fence(call.processes)
        caller = opened.watches[0]
        try:
            node = self._node_for(call, caller)
        except BaseException:
            for watch in opened.watches:
                watch.close()
            raise
        replaced = self._sessions.get(SessionId(call.replaces))
        if replaced and replaced.watches[0].pid == caller.pid:
            self._bye(SessionId(call.replaces))
        session = SessionId(secrets.randbits(52) + 1)
        self._sessions[session] = opened
        node.manager.tenants.meet_namespace(opened.namespace, call.namespace)
        return wire.Welcome(
            session=session,
            pid=os.getpid(),
            model_key=model_key,
            arena=node.arena.address,
            family_key=family_key(self._secret),
            layout=node.layout,
            share_tenants=self._config.share_tenants,
        )

    def _node_for(self, call: wire.Hello, caller: ProcessWatch) -> Node:
        if caller.ended():
            raise CallRefusedError(f"processes: process {caller.pid} is not running")
        if self._node is None:
            held = choose_layout(self._config, call.layout) if call.bridges else call.layout
            self._node = Node(
                self._config, held, self.wake, self._secret, self._memory, self._mover.name
            )
        refuse_layout(call.layout, self._node.layout, bridges=call.bridges)
        return self._node

    def _bye(self, session: SessionId) -> wire.Done:
        known = self._sessions.get(session)
        if known and not known.closed and self._node:
            if self._node.manager.session_closed(session):
                known.closed = True  # its process lives: watch it on for its quarantined slots
            else:
                self._forget(session, known)
        return wire.Done()

    def _clear(self, call: wire.Clear) -> int:
        known = tier_names(self._config.tiers)
        unknown = [name for name in call.tiers if name not in known]
        if unknown:
            raise ConfigError(
                f"tiers: unknown tier {unknown[0]!r}", hint=f"this daemon has {', '.join(known)}"
            )
        wanted = [name for name in known if not call.tiers or name in call.tiers]
        if self._node is None:
            below = [name for name in wanted if name in self._config.lower]
            if below:
                tier = self._config.lower[below[0]]
                what = "blocks" if tier.kind.keyed else "slab"
                raise CallRefusedError(
                    f"tiers: no client has said which layout {below[0]} holds; connect one "
                    f"first, or delete the {what} in {tier.directory or tier.url!r} with the "
                    "daemon stopped"
                )
            return 0
        if not call.namespace and call.tenant is None:
            return self._node.clear(wanted)
        if call.tiers:
            raise ConfigError(
                "tiers: what a namespace or a tenant stored is forgotten in every tier",
                hint="leave the tiers out",
            )
        return self._node.clear_owned(call.namespace, call.tenant)

    def _statistics(self) -> dict[str, object]:
        return {
            "pid": os.getpid(),
            "address": self.address,
            "sessions": sum(not session.closed for session in self._sessions.values()),
            "malformed_messages": self._malformed,
            "late_calls": self._late_calls,
            "backend": {
                "name": self._mover.name,
                "setting": self._mover.setting,
                "reason": self._mover.reason,
                **(self._node.mover_statistics() if self._node else {}),
            },
            "host_memory": self._memory.statistics() if self._memory else None,
            "node": self._node.statistics() if self._node else None,
        }


def _disk_directory(config: NodeConfig) -> Path | None:
    """Return the first directory of a disk tier; None if there are only devices, or none."""
    places = (place for tier in config.lower.values() for place in tier.places)
    return next((Path(place).expanduser() for place in places if not is_device(place)), None)
