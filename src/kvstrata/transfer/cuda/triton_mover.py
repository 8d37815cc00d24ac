"""Runs, and whole rearrangements, moved by kernels that read or write page-locked memory.

For many short runs: the copy engine pays for each of them, a kernel does not. It takes
multiprocessors from the model, so it runs few programs.
"""

from __future__ import annotations

import contextlib
from importlib import import_module
from typing import Any, Final

import numpy as np

from kvstrata.core.errors import ConfigError
from kvstrata.transfer.cuda.rearrange import Rearrangement, RowGroup
from kvstrata.transfer.cuda.tables import RunTable, tile_table, unit_bytes

__all__ = ["TritonMover", "TritonRearranger"]

_STEP_BYTES: Final = 8192
_STEP_ELEMENTS_MAX: Final = 1024
_ROWS_MIN: Final = 2  # of a single row the compiler forgets how it is aligned
_ELEMENT_BYTES_MAX: Final = 8
_WARPS: Final = 8


class _Launcher:
    """What the kernels of one device have in common."""

    def __init__(self, name: str, device: str, programs: int) -> None:
        """Load triton and torch; ConfigError where they are missing or there are no programs."""
        if programs < 1:
            raise ConfigError(
                f"{programs} programs cannot move anything", hint="use at least one program"
            )
        try:
            self._torch: Any = import_module("torch")
            self._language: Any = import_module("triton.language")
            self.kernel: Any = getattr(import_module("kvstrata.transfer.cuda.kernel"), name)
        except ImportError as error:
            raise ConfigError(
                f"no Triton kernel: {error}", hint="pip install 'kvstrata[cuda]'"
            ) from error
        self._device = device
        self.programs = programs

    def element(self, element_bytes: int) -> Any:
        """Return Triton's integer of so many bytes."""
        return getattr(self._language, f"int{8 * element_bytes}")

    def on(self, stream: int) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which kernels are given to `stream`."""
        if self._device == "cpu":
            return contextlib.nullcontext()
        cuda = self._torch.cuda
        context: contextlib.AbstractContextManager[Any] = cuda.stream(cuda.ExternalStream(stream))
        return context

    def placed(self, rows: Any) -> Any:
        """Return the table on the device, which torch keeps until the stream is done with it."""
        table = self._torch.from_numpy(rows)
        if self._device == "cpu":
            return table
        return table.pin_memory().to(self._device, non_blocking=True)


class TritonMover:
    """A `RunMover` of one device; `device` "cpu" is Triton's interpreter. Not yet run on a GPU."""

    def __init__(
        self, *, device: str = "cuda", programs: int = 32, tile_bytes: int = 32 * 1024
    ) -> None:
        """Load triton and torch; ConfigError where they are missing or numbers are unusable."""
        if tile_bytes < 1 or tile_bytes % 16:
            raise ConfigError(
                f"tiles of {tile_bytes} bytes cannot move anything",
                hint="tiles are a multiple of 16 bytes",
            )
        self._launcher = _Launcher("move_tiles", device, programs)
        self._tile_bytes = tile_bytes

    def move(self, table: RunTable, stream: int) -> int:
        """See `RunMover`."""
        if not len(table):
            return 0
        unit, launcher = unit_bytes(table), self._launcher
        element_bytes = min(unit, _ELEMENT_BYTES_MAX)
        tiles = tile_table(table, self._tile_bytes)
        rows = np.stack((tiles.sources, tiles.targets, tiles.lengths))
        with launcher.on(stream):
            launcher.kernel[(min(launcher.programs, len(tiles)),)](
                launcher.placed(rows),
                len(tiles),
                ELEMENT=launcher.element(element_bytes),
                ELEMENT_BYTES=element_bytes,
                ALIGNED_BYTES=unit,
                STEP=min(_STEP_ELEMENTS_MAX, _STEP_BYTES // element_bytes),
                num_warps=_WARPS,
            )
        return 0


class TritonRearranger:
    """A `Rearranger` of one device, a launch a group. Not yet run on a GPU."""

    def __init__(self, *, device: str = "cuda", programs: int = 32) -> None:
        """As `TritonMover`."""
        self._launcher = _Launcher("move_rows", device, programs)

    def rearrange(self, moves: Rearrangement, stream: int) -> int:
        """Let `stream` move all groups; return 0. What the library raises goes on."""
        with self._launcher.on(stream):
            for group in moves.groups:
                if len(group.sources):
                    self._launch(group)
        return 0

    def _launch(self, group: RowGroup) -> None:
        launcher, element = self._launcher, min(group.unit_bytes, _ELEMENT_BYTES_MAX)
        aligned = group.unit_bytes // element
        width = group.width * aligned
        step = min(_STEP_ELEMENTS_MAX // _ROWS_MIN, 1 << (width - 1).bit_length())
        rows = max(_ROWS_MIN, min(_STEP_ELEMENTS_MAX // step, 1 << (group.rows - 1).bit_length()))
        work = len(group.sources) * -(-group.rows // rows)
        is_run = group.source_step == group.target_step == group.unit_bytes
        steps = (1, 1) if is_run else (group.source_step // element, group.target_step // element)
        launcher.kernel[(min(launcher.programs, work),)](
            launcher.placed(np.stack((group.sources, group.targets))),
            len(group.sources),
            group.rows,
            group.width,
            *group.counts[1:],
            *(stride // element for stride in group.source_strides),
            *(stride // element for stride in group.target_strides),
            ELEMENT=launcher.element(element),
            ELEMENT_BYTES=element,
            ALIGNED=aligned,
            SOURCE_STEP=steps[0],
            TARGET_STEP=steps[1],
            ROWS=rows,
            WIDTH=step,
            num_warps=_WARPS,
        )
