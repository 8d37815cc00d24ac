"""How runs are given to a stream: one by one, or all in one call to the copy engine.

Each is a `RunMover`. Importable without a GPU; the batch needs cuda-bindings once it is made.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

from kvstrata.core.errors import ConfigError
from kvstrata.transfer.cuda.runtime import CudaStreams
from kvstrata.transfer.cuda.tables import RunTable

__all__ = ["BatchMover", "EachRunMover", "RunMover"]


class RunMover(Protocol):
    """Gives runs to a stream; nothing waits. Owner: the engine's model runner thread."""

    def move(self, table: RunTable, stream: int) -> int:
        """Let `stream` move merged runs, in any order; return CUDA's code, 0 for success.

        After a refusal some of the runs may be under way.
        """
        ...


class EachRunMover:
    """One `cudaMemcpyAsync` a run."""

    def __init__(self, streams: CudaStreams) -> None:
        """Remember whom to call."""
        self._copy = streams.copy

    def move(self, table: RunTable, stream: int) -> int:
        """See `RunMover`."""
        rows = zip(
            table.targets.tolist(), table.sources.tolist(), table.lengths.tolist(), strict=True
        )
        for target, source, length in rows:
            if code := self._copy(target, source, length, stream):
                return code
        return 0


class BatchMover:
    """One `cudaMemcpyBatchAsync` for all runs, through cuda-bindings (CUDA 12.8 or later).

    Sources are read in stream order: the default of the call would let them be read before the
    engine wrote them. Not yet run on a GPU.
    """

    def __init__(self, bindings: Any = None) -> None:
        """Use `bindings`, else `cuda.bindings.runtime`; ConfigError where that is missing."""
        self._bindings = bindings or _load()
        self._attributes = self._bindings.cudaMemcpyAttributes()
        order = self._bindings.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
        self._attributes.srcAccessOrder = order
        flags = self._bindings.cudaMemcpyFlags.cudaMemcpyFlagPreferOverlapWithCompute
        self._attributes.flags = int(flags)

    def move(self, table: RunTable, stream: int) -> int:
        """See `RunMover`."""
        if not len(table):
            return 0
        answer = self._bindings.cudaMemcpyBatchAsync(
            table.targets.tolist(),
            table.sources.tolist(),
            table.lengths.tolist(),
            len(table),
            [self._attributes],
            [0],
            1,
            stream,
        )
        return int(answer[0])


def _load() -> Any:
    try:
        bindings = import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise ConfigError(
            f"no batched copies: {error}", hint="pip install 'kvstrata[cuda]'"
        ) from error
    if not hasattr(bindings, "cudaMemcpyBatchAsync"):
        raise ConfigError(
            "this cuda-bindings has no cudaMemcpyBatchAsync",
            hint="install cuda-bindings 12.8 or later",
        )
    return bindings
