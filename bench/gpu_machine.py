"""What `gpu.py` measures on: a GPU, or the CPU in its place, which shows only that all runs."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import torch

from kvstrata.core.errors import ConfigError
from kvstrata.transfer.cuda.copier import RunCopier
from kvstrata.transfer.cuda.libcudart import LibCudart
from kvstrata.transfer.cuda.movers import BatchMover, EachRunMover, RunMover
from kvstrata.transfer.cuda.pagelock import PageLock
from kvstrata.transfer.cuda.triton_mover import TritonMover

DIRECTIONS = ("to_host", "to_device")


class HostStreams:
    """`CudaStreams` of the CPU: whatever a stream is given is done at once."""

    def __init__(self) -> None:
        """Start with no streams."""
        self._made = 0

    def stream_create(self) -> int:
        """See `CudaStreams`."""
        self._made += 1
        return self._made

    def stream_destroy(self, stream: int) -> None:
        """See `CudaStreams`."""

    event_create = stream_create
    event_destroy = stream_destroy

    def event_record(self, event: int, stream: int) -> int:  # noqa: ARG002
        """See `CudaStreams`."""
        return 0

    def event_happened(self, event: int) -> bool:  # noqa: ARG002
        """See `CudaStreams`."""
        return True

    def stream_wait(self, stream: int, event: int) -> int:  # noqa: ARG002
        """See `CudaStreams`."""
        return 0

    def copy(self, target: int, source: int, length_bytes: int, stream: int) -> int:  # noqa: ARG002
        """See `CudaStreams`."""
        ctypes.memmove(target, source, length_bytes)
        return 0

    def describe(self, code: int) -> str:
        """See `CudaStreams`."""
        return f"error {code}"


class Machine:
    """The device, its streams, its movers, and page-locked memory."""

    def __init__(self, *, dry: bool, limit_s: float, without: Iterable[str] = ()) -> None:
        """Look at the machine; raises ConfigError without a GPU unless `dry`."""
        if not dry and not torch.cuda.is_available():
            raise ConfigError(
                "no GPU: torch sees none", hint="--dry-run shows on the CPU that all parts run"
            )
        self.dry = dry
        self.device = "cpu" if dry else "cuda"
        self.name = "dry" if dry else torch.cuda.get_device_name()
        self.streams: Any = HostStreams() if dry else _cudart()
        self.arena_kind = "bare" if dry else "page-locked"
        self._ends = time.monotonic() + limit_s
        self._locks: list[tuple[PageLock, mmap.mmap]] = []
        self.absent: dict[str, str] = {}
        self.movers: dict[str, RunMover] = {"runs": EachRunMover(self.streams)}
        for name, make in (("batch", self._batch), ("triton", self._triton)):
            if name in without:
                self.absent[name] = "left out, as asked"
                continue
            try:
                self.movers[name] = make()
            except ConfigError as error:
                self.absent[name] = str(error)
        self.engine = 0 if dry else torch.cuda.Stream()
        self.engine_stream = 0 if dry else self.engine.cuda_stream

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self._ends

    def facts(self) -> dict[str, Any]:
        """Return what names this machine."""
        driver = None
        if not self.dry and (program := shutil.which("nvidia-smi")):
            asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
            done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
            driver = done.stdout.split("\n")[0] or None
        return {
            "device": self.name, "driver": driver, "cuda": torch.version.cuda,
            "torch": torch.__version__, "arena": self.arena_kind, "absent_movers": self.absent,
        }  # fmt: skip

    def copier(self, mover: str) -> RunCopier:
        """Return a new copier, with a stream of its own."""
        return RunCopier(self.streams, tickets_max=4, mover=self.movers[mover])

    def empty(self, *shape: int) -> torch.Tensor:
        """Return device memory, uint8."""
        return torch.empty(shape, dtype=torch.uint8, device=self.device)

    def arena(self, *shape: int) -> torch.Tensor:
        """Return host memory, uint8, as the host tier has it: mapped, then page-locked."""
        size = 1
        for each in shape:
            size *= each
        mapped = mmap.mmap(-1, size)
        memory = torch.frombuffer(mapped, dtype=torch.uint8)
        memory.fill_(1)
        if not self.dry:
            lock = PageLock(self.streams, memory.data_ptr(), size)
            try:
                lock.open()
            except ConfigError as error:
                self.arena_kind = f"torch's, since: {error}"
                return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            self._locks.append((lock, mapped))
        return memory.view(shape)

    def free_arenas(self) -> None:
        """Unlock what `arena` gave; the caller has dropped it."""
        self.sync()
        for lock, _ in self._locks:
            assert not lock.close(), "pages stay locked"
        self._locks.clear()
        if not self.dry:
            torch.cuda.empty_cache()

    def sync(self) -> None:
        """Wait for all of the device."""
        if not self.dry:
            torch.cuda.synchronize()

    def on_engine(self) -> Any:
        """Return a context in which torch works on the engine's stream."""
        return torch.cuda.stream(self.engine if not self.dry else None)

    def _batch(self) -> RunMover:
        if not self.dry:
            return BatchMover()
        from kvstrata.testing.cuda import FakeCudaBindings

        return BatchMover(FakeCudaBindings(self.streams, Random(0)))

    def _triton(self) -> RunMover:
        return TritonMover(device=self.device, programs=4 if self.dry else 32)


def _cudart() -> LibCudart:
    """Return the runtime that torch has loaded, else the one beside torch."""
    try:
        return LibCudart()
    except ConfigError:
        beside = Path(torch.__file__).parents[1] / "nvidia"
        for found in sorted(beside.glob("**/libcudart.so.*")):
            return LibCudart(str(found))
        raise
