"""The few calls of the CUDA runtime that page-locking and copies need, as protocols."""

from __future__ import annotations

from typing import Final, Protocol

__all__ = ["ALREADY_REGISTERED", "UNKNOWN", "CudaRuntime", "CudaStreams"]

ALREADY_REGISTERED: Final = 712
"""`cudaErrorHostMemoryAlreadyRegistered`."""

UNKNOWN: Final = 999
"""`cudaErrorUnknown`: also what a library beside CUDA could not do."""


class CudaRuntime(Protocol):
    """What is called; each returns the runtime's own error code, 0 for success."""

    def host_register(self, address: int, length_bytes: int) -> int:
        """Page-lock a range and let every context use it (`cudaHostRegisterPortable`)."""
        ...

    def host_unregister(self, address: int) -> int:
        """Give a range back, by the address that it was registered with."""
        ...

    def describe(self, code: int) -> str:
        """Return the name of an error code."""
        ...


class CudaStreams(Protocol):
    """Streams, events and copies of one device; whatever returns a code returns 0 for success."""

    def stream_create(self) -> int:
        """Return a new stream that does not wait for the default stream."""
        ...

    def stream_destroy(self, stream: int) -> None:
        """Give a stream back; what it was given is still done."""
        ...

    def event_create(self) -> int:
        """Return a new event without timing."""
        ...

    def event_destroy(self, event: int) -> None:
        """Give an event back; what waits for it still does."""
        ...

    def event_record(self, event: int, stream: int) -> int:
        """Let `event` happen once `stream` is done with what it was given so far."""
        ...

    def event_happened(self, event: int) -> bool:
        """Return whether the last record of `event` has happened; never waits."""
        ...

    def stream_wait(self, stream: int, event: int) -> int:
        """Let what `stream` is given from now on begin after the last record of `event`."""
        ...

    def copy(self, target: int, source: int, length_bytes: int, stream: int) -> int:
        """Give `stream` one copy (`cudaMemcpyAsync`); addresses of either side."""
        ...

    def describe(self, code: int) -> str:
        """Return the name of an error code."""
        ...
