"""Runs moved by torch alone: the reference, and the way where nothing else may be used."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from kvstrata.core.errors import ConfigError
from kvstrata.transfer.cuda.tables import RunTable

__all__ = ["TorchMover"]


class TorchMover:
    """A `RunMover` between tensors that it was given; one `copy_` a run.

    Copies to and from page-locked memory are not waited for. Not yet run on a GPU.
    """

    def __init__(self, spaces: Sequence[Any]) -> None:
        """`spaces` are one-dimensional contiguous uint8 tensors, on the device or the host.

        ConfigError without torch.
        """
        try:
            self._torch: Any = import_module("torch")
        except ImportError as error:
            raise ConfigError(
                f"no torch: {error}", hint="install the engine's torch, or set another copier"
            ) from error
        self._spaces = sorted(spaces, key=lambda each: int(each.data_ptr()))
        self._starts = [int(each.data_ptr()) for each in self._spaces]

    def move(self, table: RunTable, stream: int) -> int:
        """See `RunMover`; ValueError for a run outside of the tensors, before anything moves."""
        pairs = [
            (self._slice(target, length), self._slice(source, length))
            for source, target, length in zip(
                table.sources.tolist(), table.targets.tolist(), table.lengths.tolist(), strict=True
            )
        ]
        with self._on(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return 0

    def _slice(self, address: int, length: int) -> Any:
        at = bisect_right(self._starts, address) - 1
        start = address - self._starts[at] if at >= 0 else 0
        if at < 0 or start + length > len(self._spaces[at]):
            raise ValueError(f"{length} bytes at {address:#x} are in no tensor of this copier")
        return self._spaces[at][start : start + length]

    def _on(self, stream: int) -> contextlib.AbstractContextManager[Any]:
        if all(each.device.type == "cpu" for each in self._spaces):
            return contextlib.nullcontext()
        cuda = self._torch.cuda
        context: contextlib.AbstractContextManager[Any] = cuda.stream(cuda.ExternalStream(stream))
        return context
