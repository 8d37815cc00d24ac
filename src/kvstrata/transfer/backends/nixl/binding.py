"""Finds and loads NIXL's compiled binding, quietly, and says why where it cannot.

The binding is used directly, not the Python class on top of it. That class fixes the progress
delay at zero (a core burnt while idle), logs to stdout, and releases a handle that is still in
flight when it is garbage-collected (docs/adr/0007-nixl.md).
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import os
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from kvstrata.core.errors import ConfigError

__all__ = ["INSTALL_HINT", "VERSION_MIN", "load_binding", "nixl_errors", "nixl_version"]

VERSION_MIN: Final = (1, 5, 1)
"""Oldest release that the wrapper was tried with; older ones report short writes as done."""

INSTALL_HINT: Final = (
    "pip install --no-deps 'nixl-cu12>=1.5.1' (68 MB; it works without a GPU and without torch)"
)
"""What to do where NIXL is absent; its declared dependencies would bring torch for CUDA."""

_WHEELS: Final = {"nixl_cu12": "nixl-cu12", "nixl_cu13": "nixl-cu13", "nixl_rocm": "nixl-rocm"}

# Read by NIXL and UCX from the environment when they start. What the operator set stays. Both
# tell each failed transfer, which the wrapper reports itself.
_QUIET: Final = {"NIXL_LOG_LEVEL": "ERROR", "UCX_LOG_LEVEL": "error"}

_NAMES: Final = ("nixlAgent", "nixlAgentConfig", "nixlXferDList", "nixlRegDList", "DRAM_SEG",
                 "FILE_SEG", "NIXL_READ", "NIXL_WRITE", "NIXL_IN_PROG", "NIXL_SUCCESS",
                 "NIXL_THREAD_SYNC_STRICT", "nixlRemoteDisconnectError",
                 "nixlNotFoundError")  # fmt: skip


def _find() -> str | None:
    return next((name for name in _WHEELS if importlib.util.find_spec(name) is not None), None)


def nixl_version() -> str | None:
    """Return the installed version, None if NIXL is not installed. Loads nothing."""
    name = _find()
    try:
        return version(_WHEELS[name]) if name else None
    except PackageNotFoundError:
        return "unknown"


def load_binding() -> Any:
    """Return NIXL's binding module.

    Raises ConfigError if NIXL is absent, too old, cannot be loaded or is not what we know.
    """
    name = _find()
    found = nixl_version()
    if name is None or found is None:
        raise ConfigError("nixl: not installed", hint=INSTALL_HINT)
    _check_version(found)
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    raise_exceptions = logging.raiseExceptions
    try:
        binding = importlib.import_module(f"{name}._bindings")
    except Exception as error:  # a missing library, another Python's wheel, another CPU
        raise ConfigError(f"nixl: {found} cannot be loaded: {error}", hint=INSTALL_HINT) from error
    finally:
        logging.raiseExceptions = raise_exceptions  # NIXL switches it off for the whole process
        _keep_off_stdout()
    _exit_without_unloading()
    missing = [each for each in _NAMES if not hasattr(binding, each)]
    if missing:
        raise ConfigError(
            f"nixl: {found} has no {', '.join(missing)}",
            hint="use the version that kvstrata was tested with: " + INSTALL_HINT,
        )
    return binding


@cache
def _exit_without_unloading() -> None:
    """End the process, with whatever status it has, before the system unloads libraries.

    NIXL brings a copy of libnl; beside the system's own, which any RDMA library loads, unloading
    both is a crash at the end of every process. NIXL's threads must not lose libraries either.
    """
    libc = ctypes.CDLL(None)
    libc.on_exit(libc["_exit"], None)


def nixl_errors(binding: Any) -> tuple[type[Exception], ...]:
    """Return what NIXL raises; its errors share no base class."""
    own = [getattr(binding, name) for name in dir(binding) if name.endswith("Error")]
    return (*own, RuntimeError)


def _check_version(found: str) -> None:
    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdecimal())
    if len(numbers) == len(VERSION_MIN) and numbers < VERSION_MIN:
        wanted = ".".join(map(str, VERSION_MIN))
        raise ConfigError(
            f"nixl: {found} is older than {wanted}, which is the first that reports a short write",
            hint=INSTALL_HINT,
        )


def _keep_off_stdout() -> None:
    """Its logger writes to stdout, where a command's data goes."""
    logger = logging.getLogger("nixl")
    for handler in list(logger.handlers):
        if getattr(handler, "stream", None) in {sys.stdout, sys.__stdout__}:
            logger.removeHandler(handler)
    logger.propagate = True
    logger.setLevel(max(logger.level, logging.WARNING))
