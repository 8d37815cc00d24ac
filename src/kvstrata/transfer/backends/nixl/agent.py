"""One NIXL agent, with the rules that NIXL leaves to its user (docs/adr/0007-nixl.md).

* A new name for each life of a process; strict locking; a progress thread that sleeps.
* A request in flight is never released and its peer never removed: NIXL cannot cancel, and bytes
  go on arriving. Past its deadline it is *overdue* and stays alive, its memory held, until NIXL
  says that it ended.
* Bounds on descriptors, registrations and peers.

Concurrency: any thread; one lock guards the tables and is not held while bytes are being posted,
which for memory of the same machine takes as long as the copy. One thread drives each request.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final
from weakref import WeakSet

from kvstrata.core.errors import ConfigError, TransferError
from kvstrata.storage.base import MemoryRegion
from kvstrata.transfer.backends.nixl.binding import INSTALL_HINT, load_binding, nixl_errors
from kvstrata.transfer.backends.nixl.invitation import (
    Invitation,
    PeerMemory,
    decode_invitation,
    encode_invitation,
)
from kvstrata.transfer.backends.nixl.registrations import FileHold, MemoryHold, region_address
from kvstrata.transfer.backends.nixl.requests import (
    NixlStatistics,
    Request,
    Requests,
    RequestState,
    Rows,
)

__all__ = ["NixlAgent"]

log = logging.getLogger("kvstrata.nixl")

_PLUGINS: Final[Mapping[str, Mapping[str, str]]] = {
    "UCX": {},
    "POSIX": {"use_aio": "true"},  # its POSIX AIO queue is spoilt for good by one error
}
_PROGRESS_DELAY_US: Final = 5000  # only a fallback: sockets wake the thread
_DESCRIPTORS_MAX: Final = 16_384  # NIXL's pool of 65,536 does not recover from running dry
_CLOSE_PAUSE_S: Final = 0.001

_open: WeakSet[NixlAgent] = WeakSet()


@atexit.register
def _close_all() -> None:
    """End what nobody closed, while the interpreter still can."""
    for agent in list(_open):
        agent.close(timeout_s=0)


def _keep_until_exit(agent: NixlAgent) -> None:
    """Give this agent, and so its memory, a reference that nobody drops."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(agent))


class NixlAgent:
    """Registers memory and files, meets peers, posts requests and watches them to their end."""

    def __init__(
        self,
        plugins: Mapping[str, Mapping[str, str]] = _PLUGINS,
        *,
        progress_delay_us: int = _PROGRESS_DELAY_US,
        descriptors_max: int = _DESCRIPTORS_MAX,
    ) -> None:
        """Start an agent with these plug-ins and their parameters.

        Raises ConfigError if NIXL cannot be used or none of the plug-ins starts.
        """
        self._binding = binding = load_binding()
        self.name = f"kvstrata-{uuid.uuid4().hex}"
        config = binding.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = progress_delay_us
        config.syncMode = binding.NIXL_THREAD_SYNC_STRICT
        self._raw = binding.nixlAgent(self.name, config)
        self.plugins: dict[str, int] = {}
        self.missing: dict[str, str] = {}
        for plugin, parameters in plugins.items():
            try:
                self.plugins[plugin] = self._raw.createBackend(plugin, dict(parameters))
            except nixl_errors(binding) as error:
                self.missing[plugin] = str(error)
        if not self.plugins:
            raise ConfigError(
                f"nixl: no plug-in starts: {self.missing}",
                hint="run kvstrata doctor for the reasons; " + INSTALL_HINT,
            )
        self._requests = Requests(
            binding, self._raw, self.name, self.plugins, descriptors_max=descriptors_max
        )
        self._lock = self._requests.lock
        self._exported: list[MemoryHold] = []
        self._closed = False
        _open.add(self)

    # -- memory and peers ----------------------------------------------------------------------

    def hold(self, region: MemoryRegion) -> MemoryHold:
        """Register memory until `let_go`; a part of registered memory costs nothing more."""
        with self._lock:
            self._demand_open()
            return self._requests.registrations.hold(region)

    def hold_file(self, descriptor: int) -> FileHold:
        """Register a file until `let_go`, whatever its owner does with its own descriptor."""
        with self._lock:
            self._demand_open()
            return self._requests.registrations.hold_file(descriptor)

    def let_go(self, hold: MemoryHold | FileHold) -> None:
        """Undo one `hold` or `hold_file`."""
        with self._lock:
            self._requests.registrations.let_go(hold)

    def export(self, regions: Mapping[str, MemoryRegion], secret: bytes | None = None) -> bytes:
        """Return an invitation to reach these regions; they stay registered until `close`.

        Whoever holds it can read and write them. NIXL does not take that back.
        """
        if "UCX" not in self.plugins:
            raise TransferError("without its UCX plug-in NIXL reaches no peer", retryable=False)
        holds: list[MemoryHold] = []
        with self._lock:
            self._demand_open()
            try:
                for region in regions.values():
                    holds.append(self._requests.registrations.hold(region))  # noqa: PERF401
            except TransferError:
                for hold in holds:
                    self._requests.registrations.let_go(hold)
                raise
            self._exported += holds
            listed = self._binding.nixlRegDList(
                self._binding.DRAM_SEG,
                [(hold.address, hold.length, 0, "") for hold in dict.fromkeys(holds)],
            )
            metadata = self._raw.getLocalPartialMD(listed, True, [self.plugins["UCX"]])  # noqa: FBT003
        offered = [
            PeerMemory(self.name, label, region_address(region), len(region.view))
            for label, region in regions.items()
        ]
        return encode_invitation(Invitation(self.name, offered, metadata), secret)

    def connect(self, invitation: bytes, secret: bytes | None = None) -> dict[str, PeerMemory]:
        """Take up an invitation; return what it offers by label. The first transfer dials.

        Raises TransferError for bytes that are no invitation and for peers that NIXL refuses;
        nothing has changed then.
        """
        decoded = decode_invitation(invitation, secret)
        with self._lock:
            self._demand_open()
            self._requests.peers.connect(decoded)
        return {region.label: region for region in decoded.regions}

    def disconnect(self, peer: str) -> None:
        """Forget a peer when its last request has ended; give it no new ones."""
        with self._lock:
            self._requests.peers.disconnect(peer)

    # -- requests ------------------------------------------------------------------------------

    def room(self) -> int:
        """Return how many more descriptors may be posted now."""
        return self._requests.room()

    def post(
        self,
        rows: tuple[Rows, Rows],
        far: str,
        *,
        read: bool,
        timeout_s: float,
    ) -> Request:
        """Start to move bytes; see `Requests.post`."""
        self._demand_open()
        return self._requests.post(rows, far, read=read, timeout_s=timeout_s)

    def check(self, request: Request) -> RequestState:
        """Return how far a request is; the first look past its deadline makes it overdue."""
        return self._requests.check(request)

    def settle(self, requests: Sequence[Request], timeout_s: float) -> None:
        """Return when these requests have ended, or after `timeout_s`."""
        end = time.monotonic() + timeout_s
        running = list(requests)
        while running := [each for each in running if self.check(each) is RequestState.RUNNING]:
            if time.monotonic() >= end:
                return
            time.sleep(_CLOSE_PAUSE_S)

    def statistics(self) -> NixlStatistics:
        """Return a copy of the counters."""
        return replace(self._requests.statistics(), missing=dict(self.missing))

    def close(self, timeout_s: float = 2.0) -> int:
        """Wait a while for requests to end, then stop; return how many did not end.

        If there are any, the agent and all that they may still write to are kept until the
        process ends. Closing twice is harmless.
        """
        with self._lock:
            if self._closed:
                return len(self._requests.live)
            self._closed = True
        self.settle(list(self._requests.live), timeout_s)
        with self._lock:
            self._requests.peers.clear()
            if self._requests.live:
                _open.discard(self)
                _keep_until_exit(self)
                log.warning(
                    "%d NIXL requests did not end; their memory is kept", len(self._requests.live)
                )
                return len(self._requests.live)
            kept = list(self._exported)
            for hold in kept:
                self._requests.registrations.let_go(hold)
            self._exported.clear()
            # Peers may be reaching this memory now, and NIXL does not look whether it is still
            # registered: the agent and its threads must be gone before the memory may be.
            self._raw = None
            self._requests.forget_agent()
        _open.discard(self)
        return 0

    def _demand_open(self) -> None:
        if self._closed:
            raise TransferError("the NIXL agent is closed", retryable=False)
