"""A CUDA runtime without a GPU: keeps what is registered and refuses misuse as the real one."""

from __future__ import annotations

from kvstrata.transfer.cuda.runtime import ALREADY_REGISTERED

__all__ = ["FakeCudaRuntime"]

_NAMES = {1: "cudaErrorInvalidValue", 2: "cudaErrorMemoryAllocation", 712: "AlreadyRegistered"}
_NOT_REGISTERED = 713


class FakeCudaRuntime:
    """Ranges of one process; refuses beyond `lockable_bytes` as a memlock limit would."""

    def __init__(self, lockable_bytes: int) -> None:
        """Start with nothing registered."""
        self.lockable_bytes = lockable_bytes
        self.registered: dict[int, int] = {}
        self.stuck: set[int] = set()
        """Addresses that cannot be given back."""

    def host_register(self, address: int, length_bytes: int) -> int:
        """Register unless empty, overlapping or over the limit."""
        if length_bytes < 1:
            return 1
        if any(
            address < start + length and start < address + length_bytes
            for start, length in self.registered.items()
        ):
            return ALREADY_REGISTERED
        if sum(self.registered.values()) + length_bytes > self.lockable_bytes:
            return 2
        self.registered[address] = length_bytes
        return 0

    def host_unregister(self, address: int) -> int:
        """Forget a range that starts exactly at `address`."""
        if address in self.stuck or address not in self.registered:
            return _NOT_REGISTERED
        del self.registered[address]
        return 0

    def describe(self, code: int) -> str:
        """Return the name of an error code."""
        return _NAMES.get(code, f"error {code}")
