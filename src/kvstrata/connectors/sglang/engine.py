"""The SGLang that we know: versions, host pools, options; the rest is refused at attach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import sglang
import torch

from kvstrata.connectors.sglang.hostpages import HostPages, PoolGeometry
from kvstrata.connectors.sglang.identity import NUMERIC_ARGUMENTS
from kvstrata.connectors.versions import TESTED_VERSIONS, refuse_untested
from kvstrata.core.errors import LayoutError
from kvstrata.layout import Shard

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

__all__ = [
    "check_model",
    "check_pool_name",
    "check_version",
    "host_pages",
    "model_config",
    "pool_geometry",
    "server_arguments",
    "shard_of",
]

_POOLS: Final = {
    "MHATokenToKVPoolHost": "heads",  # K and V of each head
    "MLATokenToKVPoolHost": "latent",  # one vector of a token, the same on every rank
}
"""Host pools that we know, by the very class: a subclass stores other bytes."""

_SERVED: Final = {
    "attn_cp_size": "attention context parallelism",
    "dcp_size": "decode context parallelism",
}
_REFUSED: Final = {
    "enable_lora": "LoRA adapters are loaded and renamed while the engine runs",
    "lora_paths": "LoRA adapters are loaded and renamed while the engine runs",
    "speculative_algorithm": "speculative decoding is not supported yet",
}
"""Server arguments that must not be set, and why."""


def check_version() -> None:
    """Raise LayoutError for a release that was not tested."""
    refuse_untested("sglang", sglang.__version__)


def check_model(arguments: Mapping[str, Any]) -> None:
    """Raise LayoutError for a model that takes more than text, which was not tested.

    Numbers of 62 bits stand for an image's tokens, and page keys are made of 32 bits a token.
    """
    from sglang.srt.configs.model_config import is_multimodal_model
    from sglang.srt.utils.hf_transformers_utils import get_config

    config = get_config(
        arguments["model_path"],
        trust_remote_code=bool(arguments["trust_remote_code"]),
        revision=arguments["revision"],
    )
    towers = [
        name
        for name in ("vision_config", "audio_config")
        if getattr(config, name, None) is not None
    ]
    if towers or is_multimodal_model(config.architectures or []):
        raise LayoutError(
            "the model takes images or audio, of which pages were not tested to be told apart",
            hint="run it without this storage backend",
        )


def server_arguments() -> Mapping[str, Any]:
    """Return the engine's arguments that concern us; raises LayoutError for refused ones."""
    from sglang.srt.runtime_context import get_server_args

    arguments = get_server_args()
    names = (
        *NUMERIC_ARGUMENTS,
        *("model_path", "revision", "served_model_name", "random_seed", "trust_remote_code"),
        *("attention_backend", "kt_method"),
    )
    known = {name: _argument(arguments, name) for name in (*names, *_REFUSED)}
    for name, why in _REFUSED.items():
        if known[name]:
            raise LayoutError(
                f"{name}: {why}", hint=f"run without {name}, or without this storage backend"
            )
    return known


def model_config(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the model's configuration as transformers writes it, without SGLang's overrides.

    SGLang's own object has fields of its own in it. None where transformers does not know it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            arguments["model_path"], revision=arguments["revision"], local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError):
        return None
    found: dict[str, Any] = config.to_dict()
    return found


def shard_of(config: HiCacheStorageConfig) -> tuple[Shard, bool]:
    """Return the part of the KV that this rank holds, and whether every rank holds the same.

    Raises LayoutError for ways of splitting that we do not know.
    """
    for name, what in _SERVED.items():
        size = getattr(config, name)
        if size != 1:
            raise LayoutError(
                f"{name} is {size}; kvstrata does not serve {what}",
                hint="set it to 1, or run without this storage backend",
            )
    if config.should_split_heads or config.tp_lcm_size:
        raise LayoutError(
            "tp_lcm_size: kvstrata does not split heads between unequal engines",
            hint="leave tp_lcm_size out of the extra config",
        )
    # TP ranks of a replicated cache hold the same blocks: one shard, one writer.
    replicated = bool(config.is_mla_model)
    rank, size = (0, 1) if replicated else (config.tp_rank, config.tp_size)
    return Shard(rank, size, config.pp_rank, config.pp_size), replicated and config.tp_size > 1


def check_pool_name(name: str) -> None:
    """Raise LayoutError for a pool beside the KV's: a hit without it would be a wrong one."""
    if str(name) != "kv":
        raise LayoutError(
            f"the engine keeps a {name} pool beside its KV, which kvstrata does not store yet",
            hint="hybrid, sparse and draft models run without this storage backend",
        )


def pool_geometry(pool: Any) -> PoolGeometry:
    """Return what decides the bytes of the pool's pages; LayoutError for a pool we do not know."""
    kind = _POOLS.get(type(pool).__name__)
    odd = {
        "class": type(pool).__name__ if kind is None else "",
        "dcp_size": getattr(pool, "dcp_size", 1) != 1,
        "storage_format_tag": getattr(pool, "storage_format_tag", None),
        "stores_page_envelope": getattr(pool, "stores_page_envelope", False),
        "draft layers": getattr(pool, "target_layer_num", None) not in {None, pool.layer_num},
        "packed fp8": getattr(pool, "dsa_kv_cache_store_fp8", False),
        "layer shards": getattr(pool, "_layer_shard_enabled", False),
        "head groups": getattr(pool, "head_group_num", 1) != 1,
        "v_head_dim": kind == "heads" and pool.v_head_dim != pool.head_dim,
        "device": not isinstance(pool.kv_buffer, torch.Tensor)
        or pool.kv_buffer.device.type != "cpu",
    }
    found = {name: value for name, value in odd.items() if value}
    if found:
        raise LayoutError(
            f"the host pool has {found}, which kvstrata does not know",
            hint="plain attention and MLA are served; run others without this storage backend",
        )
    return PoolGeometry(
        order=str(pool.layout),
        layers=int(pool.layer_num),
        pages=int(pool.page_num),
        page_tokens=int(pool.page_size),
        heads=int(pool.head_num) if kind == "heads" else None,
        channels=int(pool.head_dim if kind == "heads" else pool.kv_cache_dim),
        dtype=str(pool.dtype).removeprefix("torch."),
    )


def host_pages(pool: Any, geometry: PoolGeometry) -> HostPages:
    """Return the pool's buffer as pages; LayoutError unless it is exactly as expected."""
    buffer = pool.kv_buffer
    dtype = str(buffer.dtype).removeprefix("torch.")
    expected = geometry.shape
    if tuple(buffer.shape) != expected or not buffer.is_contiguous() or dtype != geometry.dtype:
        raise LayoutError(
            f"the host pool is {dtype} {tuple(buffer.shape)}, not contiguous {geometry.dtype} "
            f"{expected}",
            hint="this SGLang's host pool is unknown to kvstrata; run without this backend",
        )
    flat: np.ndarray[Any, np.dtype[np.uint8]] = buffer.view(-1).view(torch.uint8).numpy()
    return HostPages(geometry, flat, buffer.element_size())


def _argument(arguments: Any, name: str) -> Any:
    try:
        return getattr(arguments, name)
    except AttributeError as error:
        raise LayoutError(
            f"SGLang has no server argument {name!r}, of which the numbers depend",
            hint=f"use a tested version: {', '.join(TESTED_VERSIONS['sglang'].releases)}",
        ) from error
