"""Who in vLLM calls us: things that a connector is not given and sometimes has to look at."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["calling_connector", "calling_offloader", "calling_runner", "pages_are_free"]


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


def calling_offloader() -> Any | None:
    """Return vLLM's offloading connector that makes us one of its tiers, None outside of it.

    vLLM tells a tier the model's name and element type only; what decides its numbers is in the
    configuration of the connector.
    """
    return _caller(lambda one: hasattr(one, "_vllm_config") and hasattr(one, "_kv_cache_config"))


def pages_are_free(kv_cache_manager: Any | None) -> bool:
    """Return whether no request has a page; only then a reset of vLLM's has emptied its cache.

    vLLM resets its connector even where it could not forget its own blocks.
    """
    if kv_cache_manager is None:
        return False
    managers = kv_cache_manager.coordinator.single_type_managers
    pools = {id(each.block_pool): each.block_pool for each in managers}.values()
    # The null page is never free.
    return all(pool.num_gpu_blocks - pool.get_num_free_blocks() == 1 for pool in pools)


def _caller(wanted: Callable[[Any], bool]) -> Any | None:
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if caller is not None and wanted(caller):
            return caller
        frame = frame.f_back
    return None
