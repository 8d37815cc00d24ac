"""A device without a GPU: memory of this process stands for the device's.

Streams advance in any order, as `FakeCudaStreams`; time passes only with what they do, so that
what is fast is decided by the test. Copiers can be made to fail in each way that one may.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstrata.core.errors import ConfigError
from kvstrata.testing.cuda import FakeCudaBindings, FakeCudaRuntime, FakeCudaStreams
from kvstrata.transfer.cuda.choose import ProbeMemory
from kvstrata.transfer.cuda.movers import BatchMover, EachRunMover, RunMover
from kvstrata.transfer.cuda.runtime import CudaRuntime, CudaStreams
from kvstrata.transfer.cuda.tables import RunTable, tile_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CopierFault", "FakeDevicePlatform", "FaultyMover", "ProcessMemory"]

_STEP_S = 1e-6
_ADDRESSES = 1 << 47


class ProcessMemory:
    """The bytes of this process by their address; only what was allowed is reached."""

    def __init__(self) -> None:
        """Allow nothing."""
        self._ranges: list[tuple[int, int]] = []

    def allow(self, address: int, length_bytes: int) -> None:
        """Let copies reach a range, which the caller keeps alive."""
        self._ranges.append((address, address + length_bytes))

    def forbid(self, address: int) -> None:
        """Let nothing reach the ranges that begin at `address` any more."""
        self._ranges = [each for each in self._ranges if each[0] != address]

    def __len__(self) -> int:
        """Return the end of all addresses."""
        return _ADDRESSES

    def __getitem__(self, address: int) -> int:
        """Return a byte."""
        return self._byte(address).value

    def __setitem__(self, address: int, value: int) -> None:
        """Write a byte."""
        self._byte(address).value = value

    def _byte(self, address: int) -> ctypes.c_ubyte:
        assert any(start <= address < end for start, end in self._ranges), (
            f"a copy reached {address:#x}, which is nobody's"
        )
        return ctypes.c_ubyte.from_address(address)


class CopierFault(StrEnum):
    """What is wrong with a copier."""

    ABSENT = "absent"
    """Its library is not there."""
    RAISES = "raises"
    """Its library raises."""
    REFUSES = "refuses"
    """The device refuses its copies."""
    WRONG_BYTE = "wrong byte"
    """It leaves out the last byte of a run."""
    BEYOND = "beyond"
    """It writes one byte behind a run."""
    ENDLESS = "endless"
    """Its copies never end."""


class FaultyMover:
    """A mover that is wrong in one way."""

    def __init__(self, mover: RunMover, streams: FakeCudaStreams, fault: CopierFault) -> None:
        """Change what `mover` is given."""
        self._mover, self._streams, self._fault = mover, streams, fault

    def move(self, table: RunTable, stream: int) -> int:
        """See `RunMover`."""
        if self._fault is CopierFault.RAISES:
            raise RuntimeError("the library has lost its device")
        if self._fault is CopierFault.REFUSES:
            return 1
        if self._fault is CopierFault.ENDLESS:
            self._streams.stall(stream)
            return 0
        lengths = table.lengths.copy()
        lengths[-1] += 1 if self._fault is CopierFault.BEYOND else -1
        return self._mover.move(RunTable(table.sources, table.targets, lengths), stream)


class _SlowMover:
    """Costs time when it is called, and for each run."""

    def __init__(self, mover: RunMover, platform: FakeDevicePlatform, name: str) -> None:
        self._mover, self._platform, self._name = mover, platform, name

    def move(self, table: RunTable, stream: int) -> int:
        call_s, run_s = self._platform.costs_s.get(self._name, (0.0, 0.0))
        self._platform.time_s += call_s + run_s * len(table)
        return self._mover.move(table, stream)


class _TileMover:
    """Stands for a kernel: tiles in any order, whatever runs they are of."""

    def __init__(self, streams: FakeCudaStreams, random: Random) -> None:
        self._each, self._random = EachRunMover(streams), random

    def move(self, table: RunTable, stream: int) -> int:
        tiles = tile_table(table, 16)
        order = list(range(len(tiles)))
        self._random.shuffle(order)
        return self._each.move(tiles[np.array(order)], stream)


class FakeDevicePlatform:
    """`DevicePlatform` of this process's memory."""

    device_type: str = "cpu"

    def __init__(self, random: Random, *, lockable_bytes: int = 1 << 40) -> None:
        """Start with nothing; `random` decides who goes first."""
        self.memory = ProcessMemory()
        self.fake_streams = FakeCudaStreams(self.memory, random)
        self.fake_runtime = FakeCudaRuntime(lockable_bytes)
        self.streams: CudaStreams = self.fake_streams
        self.runtime: CudaRuntime = self.fake_runtime
        self.time_s = 0.0
        """The clock."""
        self.costs_s: dict[str, tuple[float, float]] = {}
        """Copier -> seconds of one call, and of each run in it."""
        self.faults: dict[str, CopierFault] = {}
        """Copier -> what is wrong with it."""
        self.kept: list[Any] = []
        """Buffers that may still be written to."""
        self.engine = self.streams.stream_create()
        self._random = random

    def enter_thread(self) -> None:
        """See `DevicePlatform`."""

    def engine_stream(self) -> int:
        """See `DevicePlatform`."""
        return self.engine

    def makers(self, spaces: Sequence[Any]) -> Mapping[str, Callable[[], RunMover]]:
        """See `DevicePlatform`; copies reach `spaces`, tensors or arrays, from now on.

        The reference moves run by run, with torch or without.
        """
        for space in spaces:
            if isinstance(space, np.ndarray):
                self.memory.allow(space.ctypes.data, space.nbytes)
            else:
                self.memory.allow(int(space.data_ptr()), int(space.nbytes))
        plain: dict[str, Callable[[], RunMover]] = {
            "batch": lambda: BatchMover(FakeCudaBindings(self.fake_streams, self._random)),
            "runs": lambda: EachRunMover(self.streams),
            "triton": lambda: _TileMover(self.fake_streams, self._random),
            "torch": lambda: EachRunMover(self.streams),
        }
        return {name: self._made(name, make) for name, make in plain.items()}

    def probe_memory(self, device_bytes: int, host_bytes: int) -> ProbeMemory:
        """See `DevicePlatform`."""
        return _Buffers(self, device_bytes, host_bytes)

    def host_tensor(self, memory: memoryview) -> Any:
        """See `DevicePlatform`: an array, which has an address as a tensor has."""
        return np.frombuffer(memory, np.uint8)

    def now(self) -> float:
        """See `DevicePlatform`."""
        return self.time_s

    def pause(self) -> None:
        """Let one thing happen on one stream."""
        self.fake_streams.advance()
        self.time_s += _STEP_S

    def drain(self) -> None:
        """Let everything happen that can."""
        while self.fake_streams.advance():
            pass

    def _made(self, name: str, make: Callable[[], RunMover]) -> Callable[[], RunMover]:
        def made() -> RunMover:
            fault = self.faults.get(name)
            if fault is CopierFault.ABSENT:
                raise ConfigError(f"no library of {name}", hint=f"install {name}")
            mover = FaultyMover(make(), self.fake_streams, fault) if fault else make()
            return _SlowMover(mover, self, name)

        return made


class _Buffers:
    """`ProbeMemory` of this process."""

    def __init__(self, platform: FakeDevicePlatform, device_bytes: int, host_bytes: int) -> None:
        self._platform = platform
        self._device, self._host = np.zeros(device_bytes, np.uint8), np.zeros(host_bytes, np.uint8)
        self.tensors: Sequence[Any] = [self._device, self._host]
        self.device_address = self._device.ctypes.data
        self.host_address = self._host.ctypes.data
        platform.memory.allow(self.device_address, device_bytes)
        platform.memory.allow(self.host_address, host_bytes)

    def write(self, direction: str, source: NDArray[np.uint8], poison: int) -> None:
        sides = (self._device, self._host)
        read, written = sides if direction == "to_host" else sides[::-1]
        read[:] = source
        written[:] = poison

    def read(self, direction: str) -> NDArray[np.uint8]:
        return (self._host if direction == "to_host" else self._device).copy()

    def keep(self) -> None:
        self._platform.kept.append(self)
