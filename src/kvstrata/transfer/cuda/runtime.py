"""The few calls of the CUDA runtime that page-locking needs, as a protocol."""

from __future__ import annotations

from typing import Final, Protocol

__all__ = ["ALREADY_REGISTERED", "CudaRuntime"]

ALREADY_REGISTERED: Final = 712
"""`cudaErrorHostMemoryAlreadyRegistered`."""


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
