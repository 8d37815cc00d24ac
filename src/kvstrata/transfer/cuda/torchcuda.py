"""The GPU of this process, as torch has set it up. Not yet run on a GPU."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstrata.core.errors import ConfigError
from kvstrata.transfer.cuda.choose import ProbeMemory
from kvstrata.transfer.cuda.libcudart import LibCudart
from kvstrata.transfer.cuda.movers import BatchMover, EachRunMover, RunMover
from kvstrata.transfer.cuda.runtime import CudaRuntime, CudaStreams
from kvstrata.transfer.cuda.torch_mover import TorchMover
from kvstrata.transfer.cuda.triton_mover import TritonMover

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TorchCuda", "driver_absent", "load_cudart"]

_NO_GPU = "on a machine without a GPU run the engine's CPU platform"


def driver_absent() -> str:
    """Return why no CUDA driver can be loaded here, empty if one can; loads nothing else."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"no CUDA driver: {error}"
    return ""


def load_cudart() -> LibCudart:
    """Return the runtime that torch has loaded, else the one beside torch; else ConfigError."""
    try:
        return LibCudart()
    except ConfigError:
        beside = Path(import_module("torch").__file__ or "").parents[1] / "nvidia"
        for found in sorted(beside.glob("**/libcudart.so.*")):
            return LibCudart(str(found))
        raise


class TorchCuda:
    """`DevicePlatform` of torch's current device."""

    device_type: str = "cuda"

    def __init__(self) -> None:
        """Look; ConfigError without torch, without a GPU, or without the runtime library."""
        if absent := driver_absent():
            raise ConfigError(absent, hint=f"install NVIDIA's driver; {_NO_GPU}")
        try:
            self._torch: Any = import_module("torch")
        except ImportError as error:
            raise ConfigError(f"no torch: {error}", hint="install the engine's torch") from error
        if not self._torch.cuda.is_available():
            raise ConfigError(
                "no GPU: torch sees none",
                hint=f"see that nvidia-smi works and that torch was built for CUDA; {_NO_GPU}",
            )
        self._device = int(self._torch.cuda.current_device())
        library = load_cudart()
        self.streams: CudaStreams = library
        self.runtime: CudaRuntime = library

    def enter_thread(self) -> None:
        """See `DevicePlatform`."""
        self._torch.cuda.set_device(self._device)

    def engine_stream(self) -> int:
        """See `DevicePlatform`."""
        return int(self._torch.cuda.current_stream().cuda_stream)

    def makers(self, spaces: Sequence[Any]) -> Mapping[str, Callable[[], RunMover]]:
        """See `DevicePlatform`."""
        return {
            "batch": BatchMover,
            "runs": lambda: EachRunMover(self.streams),
            "triton": TritonMover,
            "torch": lambda: TorchMover(spaces),
        }

    def probe_memory(self, device_bytes: int, host_bytes: int) -> ProbeMemory:
        """See `DevicePlatform`."""
        try:
            return _Buffers(self._torch, device_bytes, host_bytes)
        except RuntimeError as error:  # torch's own errors of memory are such
            raise ConfigError(
                f"no room to try copiers: {error}",
                hint="leave some MiB of the device free, or set device_copier to one of them",
            ) from error

    def host_tensor(self, memory: memoryview) -> Any:
        """See `DevicePlatform`."""
        return self._torch.frombuffer(memory, dtype=self._torch.uint8)

    def now(self) -> float:
        """See `DevicePlatform`."""
        return time.perf_counter()

    def pause(self) -> None:
        """See `DevicePlatform`."""
        time.sleep(0)


_kept: list[_Buffers] = []  # a copy that never ended may still use them


class _Buffers:
    """`ProbeMemory` of torch."""

    def __init__(self, torch: Any, device_bytes: int, host_bytes: int) -> None:
        self._torch = torch
        self._device = torch.empty(device_bytes, dtype=torch.uint8, device="cuda")
        self._host = torch.empty(host_bytes, dtype=torch.uint8, pin_memory=True)
        self.tensors: Sequence[Any] = [self._device, self._host]
        self.device_address = int(self._device.data_ptr())
        self.host_address = int(self._host.data_ptr())

    def write(self, direction: str, source: NDArray[np.uint8], poison: int) -> None:
        sides = (self._device, self._host)
        read, written = sides if direction == "to_host" else sides[::-1]
        read.copy_(self._torch.from_numpy(source))
        written.fill_(poison)
        self._torch.cuda.synchronize()

    def read(self, direction: str) -> NDArray[np.uint8]:
        written = self._host if direction == "to_host" else self._device
        found: NDArray[np.uint8] = written.cpu().numpy().copy()
        return found

    def keep(self) -> None:
        _kept.append(self)
