"""Runs moved by a kernel that reads or writes page-locked host memory itself.

For many short runs: the copy engine pays for each of them, a kernel does not. It takes
multiprocessors from the model, so it runs few programs.
"""

from __future__ import annotations

import contextlib
from importlib import import_module
from typing import Any, Final

import numpy as np

from kvstrata.core.errors import ConfigError
from kvstrata.transfer.cuda.tables import RunTable, tile_table, unit_bytes

__all__ = ["TritonMover"]

_STEP_BYTES: Final = 8192
_STEP_ELEMENTS_MAX: Final = 1024
_ELEMENT_BYTES_MAX: Final = 8
_WARPS: Final = 8


class TritonMover:
    """A `RunMover` of one device; `device` "cpu" is Triton's interpreter. Not yet run on a GPU."""

    def __init__(
        self, *, device: str = "cuda", programs: int = 32, tile_bytes: int = 32 * 1024
    ) -> None:
        """Load triton and torch; ConfigError where they are missing or numbers are unusable."""
        if programs < 1 or tile_bytes < 1 or tile_bytes % 16:
            raise ConfigError(
                f"{programs} programs and tiles of {tile_bytes} bytes cannot move anything",
                hint="at least one program; tiles are a multiple of 16 bytes",
            )
        try:
            self._torch: Any = import_module("torch")
            self._language: Any = import_module("triton.language")
            self._kernel: Any = import_module("kvstrata.transfer.cuda.kernel").move_tiles
        except ImportError as error:
            raise ConfigError(
                f"no Triton kernel: {error}", hint="pip install 'kvstrata[cuda]'"
            ) from error
        self._device = device
        self._programs = programs
        self._tile_bytes = tile_bytes

    def move(self, table: RunTable, stream: int) -> int:
        """See `RunMover`."""
        if not len(table):
            return 0
        unit = unit_bytes(table)
        element_bytes = min(unit, _ELEMENT_BYTES_MAX)
        tiles = tile_table(table, self._tile_bytes)
        rows = np.stack((tiles.sources, tiles.targets, tiles.lengths))
        with self._on(stream):
            self._kernel[(min(self._programs, len(tiles)),)](
                self._placed(rows),
                len(tiles),
                ELEMENT=getattr(self._language, f"int{8 * element_bytes}"),
                ELEMENT_BYTES=element_bytes,
                ALIGNED_BYTES=unit,
                STEP=min(_STEP_ELEMENTS_MAX, _STEP_BYTES // element_bytes),
                num_warps=_WARPS,
            )
        return 0

    def _on(self, stream: int) -> contextlib.AbstractContextManager[Any]:
        if self._device == "cpu":
            return contextlib.nullcontext()
        cuda = self._torch.cuda
        context: contextlib.AbstractContextManager[Any] = cuda.stream(cuda.ExternalStream(stream))
        return context

    def _placed(self, rows: Any) -> Any:
        """Return the table on the device, which torch keeps until the stream is done with it."""
        table = self._torch.from_numpy(rows)
        if self._device == "cpu":
            return table
        return table.pin_memory().to(self._device, non_blocking=True)
