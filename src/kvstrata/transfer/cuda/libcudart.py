"""The installed CUDA runtime library through ctypes: no package, no compiler.

Not yet run on a GPU. Copies of the engine's process use its current device and context.
"""

from __future__ import annotations

import ctypes
from typing import Final

from kvstrata.core.errors import ConfigError, TransferError

__all__ = ["LibCudart"]

_PORTABLE: Final = 1  # cudaHostRegisterPortable
_NON_BLOCKING: Final = 1  # cudaStreamNonBlocking
_NO_TIMING: Final = 2  # cudaEventDisableTiming
_ANY_DIRECTION: Final = 4  # cudaMemcpyDefault: found out by the addresses
_NOT_READY: Final = 600
_NAMES: Final = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")


class LibCudart:
    """`CudaRuntime` and `CudaStreams` of this process's current device."""

    def __init__(self, library: str | None = None) -> None:
        """Load `library`, else what the system finds; ConfigError if there is none."""
        self._call = _load(library)
        self._call.cudaGetErrorName.restype = ctypes.c_char_p

    def host_register(self, address: int, length_bytes: int) -> int:
        """See `CudaRuntime`."""
        place, length = ctypes.c_void_p(address), ctypes.c_size_t(length_bytes)
        return int(self._call.cudaHostRegister(place, length, ctypes.c_uint(_PORTABLE)))

    def host_unregister(self, address: int) -> int:
        """See `CudaRuntime`."""
        return int(self._call.cudaHostUnregister(ctypes.c_void_p(address)))

    def stream_create(self) -> int:
        """See `CudaStreams`; TransferError if refused."""
        made = ctypes.c_void_p()
        self._check(self._call.cudaStreamCreateWithFlags(ctypes.byref(made), _NON_BLOCKING))
        return made.value or 0

    def stream_destroy(self, stream: int) -> None:
        """See `CudaStreams`; TransferError if refused."""
        self._check(self._call.cudaStreamDestroy(ctypes.c_void_p(stream)))

    def event_create(self) -> int:
        """See `CudaStreams`; TransferError if refused."""
        made = ctypes.c_void_p()
        self._check(self._call.cudaEventCreateWithFlags(ctypes.byref(made), _NO_TIMING))
        return made.value or 0

    def event_destroy(self, event: int) -> None:
        """See `CudaStreams`; TransferError if refused."""
        self._check(self._call.cudaEventDestroy(ctypes.c_void_p(event)))

    def event_record(self, event: int, stream: int) -> int:
        """See `CudaStreams`."""
        return int(self._call.cudaEventRecord(ctypes.c_void_p(event), ctypes.c_void_p(stream)))

    def event_happened(self, event: int) -> bool:
        """See `CudaStreams`; TransferError if the device failed."""
        code = int(self._call.cudaEventQuery(ctypes.c_void_p(event)))
        if code == _NOT_READY:
            return False
        self._check(code)
        return True

    def stream_wait(self, stream: int, event: int) -> int:
        """See `CudaStreams`."""
        waiting, awaited = ctypes.c_void_p(stream), ctypes.c_void_p(event)
        return int(self._call.cudaStreamWaitEvent(waiting, awaited, ctypes.c_uint(0)))

    def copy(self, target: int, source: int, length_bytes: int, stream: int) -> int:
        """See `CudaStreams`."""
        return int(
            self._call.cudaMemcpyAsync(
                ctypes.c_void_p(target),
                ctypes.c_void_p(source),
                ctypes.c_size_t(length_bytes),
                _ANY_DIRECTION,
                ctypes.c_void_p(stream),
            )
        )

    def describe(self, code: int) -> str:
        """Return the name of an error code."""
        name = self._call.cudaGetErrorName(code)
        return name.decode() if name else f"error {code}"

    def _check(self, code: int) -> None:
        if code:
            raise TransferError(f"CUDA: {self.describe(code)}", retryable=False)


def _load(library: str | None) -> ctypes.CDLL:
    for name in (library,) if library else _NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise ConfigError(
        f"no CUDA runtime library ({library or ', '.join(_NAMES)}) can be loaded",
        hint="install nvidia-cuda-runtime, or import torch with CUDA first; on a machine without "
        "a GPU run the engine's CPU platform",
    )
