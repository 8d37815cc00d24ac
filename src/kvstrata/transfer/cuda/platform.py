"""A device and all that copies need of it, as one protocol: the real one, or one without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from kvstrata.transfer.cuda.choose import ProbeMemory
from kvstrata.transfer.cuda.movers import RunMover
from kvstrata.transfer.cuda.runtime import CudaRuntime, CudaStreams

__all__ = ["DevicePlatform"]


class DevicePlatform(Protocol):
    """Owner: the thread that runs the engine's model, except where it says otherwise."""

    streams: CudaStreams
    """Streams, events and copies."""
    runtime: CudaRuntime
    """Page-locks memory; from any thread that has called `enter_thread`."""
    device_type: str
    """Where the engine's tensors must be, as torch says it."""

    def enter_thread(self) -> None:
        """Let the calling thread use the device."""
        ...

    def engine_stream(self) -> int:
        """Return the stream to which the engine gives its work now."""
        ...

    def makers(self, spaces: Sequence[Any]) -> Mapping[str, Callable[[], RunMover]]:
        """Return each copier by name; `spaces` are the tensors that the reference may touch."""
        ...

    def probe_memory(self, device_bytes: int, host_bytes: int) -> ProbeMemory:
        """Return buffers for tries; ConfigError if there is no memory for them."""
        ...

    def host_tensor(self, memory: memoryview) -> Any:
        """Return mapped host memory as a one-dimensional uint8 tensor, sharing it."""
        ...

    def now(self) -> float:
        """Return seconds that only grow."""
        ...

    def pause(self) -> None:
        """Let a moment pass between two looks whether a copy ended."""
        ...
