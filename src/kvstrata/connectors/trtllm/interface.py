"""TensorRT-LLM's connector interface: its base classes where it is installed, else their shape.

The interface has moved within TensorRT-LLM and grows from release to release. A release that is
not in the table, or base classes that ask for a method we do not have, are refused at start: a
connector that misunderstands its engine writes into pages of other requests.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Final

from kvstrata.core.errors import LayoutError

__all__ = [
    "INTERFACES",
    "Interface",
    "SchedulerBase",
    "WorkerBase",
    "check_interface",
    "engine_version",
]

INTERFACES: Final = {
    "1.2": "flat methods, one pool tensor (V1 manager)",
    "1.3": "as 1.2, in another module",
    "1.4": "also methods by layer group, KvCacheLayout (V2 manager), cancel_load, request_reset",
}
"""Releases, by their first two numbers, whose published interface this connector was written to.
None of them was run, and the interface grows within a release too: a method that one of them does
not call is not missed."""

_MODULES: Final = (
    "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector",
    "tensorrt_llm._torch.pyexecutor.kv_cache_connector",  # before it moved
)
_REQUEST_FIELDS: Final = frozenset({
    "request_id", "new_tokens", "new_block_ids", "computed_position", "num_scheduled_tokens",
})  # fmt: skip
"""What we read of the engine's `RequestData`; `cache_salt` and groups are newer and optional."""


class _Base:
    """What both base classes of the engine do."""

    supports_attention_dp: bool = False

    def __init__(self, llm_args: Any) -> None:
        self._llm_args = llm_args


class _StructuralScheduler(_Base):
    """Stands in for `KvCacheConnectorScheduler` where there is no TensorRT-LLM."""


class _StructuralWorker(_Base):
    """Stands in for `KvCacheConnectorWorker` where there is no TensorRT-LLM."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._metadata: Any = None

    def bind_connector_meta(self, metadata: Any) -> None:
        """Take the step's metadata."""
        self._metadata = metadata

    def get_connector_meta(self) -> Any:
        """Return the step's metadata."""
        return self._metadata

    def _clear_connector_meta(self) -> None:
        self._metadata = None


@dataclass(frozen=True, slots=True)
class Interface:
    """What was found of TensorRT-LLM when this package was imported."""

    scheduler: Any
    """Base class of the scheduler half."""
    worker: Any
    """Base class of the worker half."""
    version: str = ""
    """The release; empty where TensorRT-LLM is not installed."""
    problem: str = ""
    """Why the installed release cannot be used; empty if it can, or if there is none."""


def _find() -> Interface:
    if importlib.util.find_spec("tensorrt_llm") is None:
        return Interface(_StructuralScheduler, _StructuralWorker)
    version, problem = "of unknown version", "its connector interface was not found"
    try:
        version = str(importlib.import_module("tensorrt_llm").__version__)
        for name in _MODULES:
            try:
                module = importlib.import_module(name)
            except ModuleNotFoundError as error:
                if not name.startswith(str(error.name)):
                    raise  # the module is there, and something that it needs is not
                continue
            found = _odd_fields(module)
            bases = module.KvCacheConnectorScheduler, module.KvCacheConnectorWorker
            return Interface(*bases, version, found)
    except (ImportError, AttributeError, OSError) as error:
        problem = f"it cannot be imported: {error}"
    return Interface(_StructuralScheduler, _StructuralWorker, version, problem)


def _odd_fields(module: Any) -> str:
    fields = set(getattr(module.RequestData, "__dataclass_fields__", ()))
    missing = sorted(_REQUEST_FIELDS - fields)
    return f"its RequestData has no {', '.join(missing)}" if missing else ""


_FOUND: Final = _find()
SchedulerBase: Any = _FOUND.scheduler
"""`KvCacheConnectorScheduler`, or its shape."""
WorkerBase: Any = _FOUND.worker
"""`KvCacheConnectorWorker`, or its shape."""


def check_interface(half: type, found: Interface = _FOUND) -> None:
    """Raise LayoutError unless the installed TensorRT-LLM is one whose interface we know."""
    if not found.version:
        return
    release = ".".join(found.version.split(".")[:2])
    matrix = "; ".join(f"{known}: {what}" for known, what in INTERFACES.items())
    asked = sorted(getattr(half, "__abstractmethods__", ()))
    if asked:
        raise LayoutError(
            f"TensorRT-LLM {found.version} asks its connectors for {', '.join(asked)}, which "
            "kvstrata does not know",
            hint=f"known interfaces are {matrix}",
        )
    if found.problem or release not in INTERFACES:
        why = f": {found.problem}" if found.problem else ""
        raise LayoutError(
            f"TensorRT-LLM {found.version} is not a version that kvstrata knows{why}",
            hint=f"known interfaces, none of them run yet, are {matrix}",
        )


def engine_version() -> str:
    """Return the installed release, empty where there is none."""
    return _FOUND.version
