"""Who in vLLM calls us: things that a connector is not given and sometimes has to look at."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["calling_connector", "calling_runner"]


def calling_runner() -> Any | None:
    """Return the model runner among our callers, None if none of them looks like one.

    vLLM hands its worker half the caches and nothing else. Its adapters and weights are the
    runner's, and the runner is who calls `register_kv_caches`, whatever stands in between.
    """
    return _caller(lambda one: hasattr(one, "execute_model") and hasattr(one, "get_model"))


def calling_connector(own: Any) -> Any | None:
    """Return the connector that makes `own` as one of several, None if vLLM itself makes it.

    Such a connector (vLLM's MultiConnector) hands its children copies of its configuration.
    """
    return _caller(lambda one: one is not own and hasattr(one, "get_num_new_matched_tokens"))


def _caller(wanted: Callable[[Any], bool]) -> Any | None:
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if caller is not None and wanted(caller):
            return caller
        frame = frame.f_back
    return None
