"""Requests from their posting to their end, whatever NIXL does in between.

A request that NIXL does not answer in time is *overdue*: it gets no new neighbours, and it stays
alive with all its memory held until NIXL says that it ended. NIXL cannot cancel; a handle that is
released early lets its bytes land in whatever the memory has become (docs/adr/0007-nixl.md).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final, TypeAlias

import numpy as np

from kvstrata.core.errors import TransferError
from kvstrata.transfer.backends.nixl.binding import nixl_errors
from kvstrata.transfer.backends.nixl.peers import Peers
from kvstrata.transfer.backends.nixl.registrations import Registrations

__all__ = [
    "FILE",
    "FILE_PLUGINS",
    "MEMORY",
    "NixlStatistics",
    "Request",
    "RequestState",
    "Requests",
    "Rows",
]

MEMORY: Final = "memory"
"""The far side of a request is memory of this process."""
FILE: Final = "file"
"""The far side of a request is a file."""
FILE_PLUGINS: Final = frozenset({"POSIX", "GDS", "GDS_MT"})
"""The plug-ins that move between memory and files; the others move between memories."""

Rows: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]
"""N x 3: address or offset, length, device (0, or a file's descriptor)."""


class RequestState(Enum):
    """How far a request is."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    LOST = "lost"


@dataclass(slots=True, eq=False)
class Request:
    """One posted list of moves; ends once, and only then may its memory be used otherwise."""

    handle: int
    """NIXL's name of it."""
    far: str
    """`MEMORY`, `FILE` or the name of a peer."""
    descriptors: int
    """How many moves it holds."""
    deadline: float
    """When it becomes overdue, on the monotonic clock."""
    state: RequestState = RequestState.RUNNING
    """How far it is."""
    overdue: bool = False
    """Whether it is, or was when it ended, past its deadline."""
    reason: str = ""
    """Why it failed."""


@dataclass(slots=True)
class NixlStatistics:
    """Counters of one agent."""

    requests: int = 0
    """Posted since the start."""
    live: int = 0
    """Posted and not ended, overdue ones included."""
    descriptors: int = 0
    """Moves in them."""
    overdue: int = 0
    """Requests past their deadline that have not ended; their memory is held."""
    overdue_total: int = 0
    """Requests that were ever past their deadline."""
    failed: int = 0
    """Requests that ended with an error, lost peers included."""
    peers_lost: int = 0
    """How often a peer was found to be gone."""
    peers: int = 0
    """Peers in the table."""
    registrations: int = 0
    """Registered memory regions."""
    missing: dict[str, str] = field(default_factory=dict)
    """Plug-ins that were asked for and could not be started, and why."""


class Requests:
    """The live requests of one agent, under the agent's lock."""

    def __init__(
        self,
        binding: Any,
        raw: Any,
        name: str,
        plugins: Mapping[str, int],
        *,
        descriptors_max: int,
    ) -> None:
        """Post to the agent `raw`, called `name`, through the backend handles in `plugins`."""
        self._binding, self._raw, self._name = binding, raw, name
        self._errors = nixl_errors(binding)
        self._descriptors_max = descriptors_max
        self._handles = {
            far: [
                handle
                for each, handle in plugins.items()
                if (each in FILE_PLUGINS) == (far == FILE)
            ][:1]
            for far in (FILE, MEMORY)
        }
        self.lock = threading.Lock()
        self.registrations = Registrations(
            binding, raw, list(plugins.values()), self._handles[FILE]
        )
        self.peers = Peers(binding, raw, name)
        self.live: set[Request] = set()
        self._counts = NixlStatistics()

    def room(self) -> int:
        """Return how many more descriptors may be posted now."""
        return self._descriptors_max - self._counts.descriptors

    def post(
        self,
        rows: tuple[Rows, Rows],
        far: str,
        *,
        read: bool,
        timeout_s: float,
    ) -> Request:
        """Start to move bytes between local memory and `far`; may take as long as the copy.

        `rows` are the local and the far side. The caller keeps both held until the request has
        ended. Raises TransferError if it was not posted.
        """
        local, remote = rows
        count = len(local)
        with self.lock:
            if count > self.room():
                raise TransferError(
                    f"{self._counts.descriptors} descriptors are in flight, {count} more are "
                    f"above {self._descriptors_max}",
                    retryable=True,
                )
            peer = None if far in {MEMORY, FILE} else self.peers.demand(far)
            handle = self._create(local, remote, far, read=read)
            deadline = time.monotonic() + timeout_s
            request = Request(handle, far, count, deadline)
            self.live.add(request)
            self._counts.requests += 1
            self._counts.live += 1
            self._counts.descriptors += count
            if peer is not None:
                peer.live += 1
        self._ask(request, self._raw.postXferReq)
        return request

    def check(self, request: Request) -> RequestState:
        """Return how far a request is; the first look past its deadline makes it overdue."""
        if request.state is RequestState.RUNNING:
            self._ask(request, self._raw.getXferStatus)
        return request.state

    def forget_agent(self) -> None:
        """Drop every reference to the agent, so that it ends now; nothing may be alive."""
        assert not self.live, "NIXL's agent must outlive its requests"
        self._raw = None
        self.peers.forget_agent()
        self.registrations.forget_agent()

    def statistics(self) -> NixlStatistics:
        """Return a copy of the counters."""
        with self.lock:
            return replace(
                self._counts, peers=len(self.peers), registrations=len(self.registrations)
            )

    def _create(self, local: Rows, remote: Rows, far: str, *, read: bool) -> int:
        binding = self._binding
        kind = binding.FILE_SEG if far == FILE else binding.DRAM_SEG
        try:
            made: int = self._raw.createXferReq(
                binding.NIXL_READ if read else binding.NIXL_WRITE,
                binding.nixlXferDList(binding.DRAM_SEG, local),
                binding.nixlXferDList(kind, remote),
                self._name if far in {MEMORY, FILE} else far,
                "",
                self._handles[FILE if far == FILE else MEMORY],
            )
        except self._errors as error:
            raise TransferError(f"NIXL makes no such request: {error}", retryable=False) from error
        return made

    def _ask(self, request: Request, question: Any) -> None:
        """Post or check; note what came of it."""
        binding = self._binding
        try:
            status = question(request.handle)
        except binding.nixlRemoteDisconnectError as error:
            self._end(request, RequestState.LOST, f"peer {request.far} is gone: {error}")
        except binding.nixlNotFoundError as error:
            # No end: NIXL has lost sight of it, and its bytes may go on arriving.
            self._note_overdue(request, f"NIXL lost sight of it: {error}")
        except self._errors as error:
            state = RequestState.FAILED if request.far in {MEMORY, FILE} else RequestState.LOST
            self._end(request, state, f"NIXL failed: {error}")
        else:
            if status == binding.NIXL_SUCCESS:
                self._end(request, RequestState.DONE, "")
            elif time.monotonic() > request.deadline:
                self._note_overdue(request, "no answer within its time")

    def _note_overdue(self, request: Request, reason: str) -> None:
        with self.lock:
            if request.overdue:
                return
            request.overdue, request.reason = True, reason
            self._counts.overdue += 1
            self._counts.overdue_total += 1
            peer = self.peers.get(request.far)
            if peer is not None:
                peer.overdue += 1

    def _end(self, request: Request, state: RequestState, reason: str) -> None:
        with self.lock:
            self._raw.releaseXferReq(request.handle)
            request.state = state
            request.reason = reason or request.reason
            self.live.discard(request)
            self._counts.live -= 1
            self._counts.descriptors -= request.descriptors
            self._counts.overdue -= request.overdue
            self._counts.failed += state is not RequestState.DONE
            peer = self.peers.get(request.far)
            if peer is None:
                return
            peer.live -= 1
            peer.overdue -= request.overdue
            if state is RequestState.LOST and not peer.lost:
                peer.lost = True
                self._counts.peers_lost += 1
            self.peers.settle(request.far)
