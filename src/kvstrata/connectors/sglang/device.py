"""The device pools and engines that the linker knows; the rest is refused at start."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch

from kvstrata.connectors.sglang.devicepages import DevicePages
from kvstrata.connectors.sglang.hostpages import Bytes, PoolGeometry
from kvstrata.core.errors import LayoutError

__all__ = ["check_linkable", "device_geometry", "device_pages"]

_REMEDY: Final = "use the HiCache storage backend, or run without kvstrata"
_ALONE: Final = ("pp_size", "dp_size", "attn_cp_size", "dcp_size")
"""SGLang's linker does not ask pipeline stages what all can load; the others were not tested."""
_PAGE_TOKENS_MIN: Final = 16
"""SGLang's scheduler waits for the question: 2,000 pages of whatever size cost it 2 to 11 ms."""
_POOL: Final = "MHATokenToKVPool"
"""The very class: a subclass stores other bytes."""


def check_linkable(arguments: Any, params: Any, components: Iterable[Any]) -> None:
    """Raise LayoutError for an engine of which the linker was not tested.

    `arguments` are the server's, `params` what SGLang builds its tree from, `components` the kinds
    of state that the tree keeps.
    """
    odd: dict[str, Any] = {
        name: size for name in _ALONE if (size := getattr(arguments, name, 1)) not in {1, None}
    }
    kinds = sorted(each.name for each in components)
    if kinds != ["FULL"]:
        odd["components"] = kinds
    if (mode := getattr(arguments, "disaggregation_mode", "null")) not in {"null", None}:
        odd["disaggregation_mode"] = mode
    if algorithm := getattr(arguments, "dllm_algorithm", None):  # what follows changes a block's KV
        odd["dllm_algorithm"] = algorithm
    for name in ("mtp_draft_device_pools", "sidecar_draft_device_pools", "is_eagle"):
        if getattr(params, name, None):
            odd[name] = "set"
    if odd:
        raise LayoutError(f"kvstrata's linker does not serve an engine with {odd}", hint=_REMEDY)
    if params.page_size < _PAGE_TOKENS_MIN:
        raise LayoutError(
            f"page_size is {params.page_size}: so many pages in a prompt that looking for them "
            "would hold up SGLang's scheduler",
            hint=f"set --page-size to {_PAGE_TOKENS_MIN} or more, or {_REMEDY}",
        )


def device_geometry(pool: Any, page_tokens: int) -> PoolGeometry:
    """Return what decides the bytes of the pool's pages; LayoutError for a pool we do not know."""
    name = type(pool).__name__
    if name != _POOL:
        raise LayoutError(f"kvstrata's linker does not know the device pool {name}", hint=_REMEDY)
    found = {
        "kv_cache_layout": pool.kv_cache_layout if pool.kv_cache_layout != "nhd" else "",
        "scales": pool.k_scale_buffer is not None
        or getattr(pool, "native_k_scale_buffer", None) is not None,
        "v_head_dim": pool.v_head_dim != pool.head_dim,
        "start_layer": pool.start_layer != 0,
        "device": str(pool.device) if torch.device(pool.device).type != "cpu" else "",
    }
    found = {name: value for name, value in found.items() if value}
    if found:
        raise LayoutError(
            f"the device pool has {found}, which kvstrata's linker does not know", hint=_REMEDY
        )
    return PoolGeometry(
        order="layer_first",
        layers=int(pool.layer_num),
        pages=int(pool.k_buffer[0].shape[0]) // page_tokens,
        page_tokens=page_tokens,
        heads=int(pool.head_num),
        channels=int(pool.head_dim),
        dtype=str(pool.store_dtype).removeprefix("torch."),
    )


def device_pages(pool: Any, geometry: PoolGeometry) -> DevicePages:
    """Return the pool's buffers as pages; LayoutError unless they are exactly as expected."""
    keys = [_pages(each, geometry) for each in pool.k_buffer]
    values = [_pages(each, geometry) for each in pool.v_buffer]
    if len(keys) != geometry.layers:
        raise LayoutError(
            f"the device pool has {len(keys)} buffers for {geometry.layers} layers", hint=_REMEDY
        )
    return DevicePages(keys, values)


def _pages(buffer: torch.Tensor, geometry: PoolGeometry) -> Bytes:
    """Return one buffer as `(pages, bytes)`, sharing its memory."""
    dtype = str(buffer.dtype).removeprefix("torch.")
    vector = (geometry.heads, geometry.channels)
    if tuple(buffer.shape[1:]) != vector or not buffer.is_contiguous() or dtype != geometry.dtype:
        raise LayoutError(
            f"a buffer of the device pool is {dtype} {tuple(buffer.shape)}, not contiguous "
            f"{geometry.dtype} [tokens, {geometry.heads}, {geometry.channels}]",
            hint=_REMEDY,
        )
    whole = buffer[: geometry.pages * geometry.page_tokens]
    flat: Bytes = whole.view(-1).view(torch.uint8).numpy()
    return flat.reshape(geometry.pages, -1)
