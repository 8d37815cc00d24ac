"""From vLLM's cache configuration to our layout; whatever we do not know is refused here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import vllm

from kvstrata.core.errors import LayoutError
from kvstrata.layout import PagedCache

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["TESTED_VERSIONS", "paged_cache"]

TESTED_VERSIONS: Final = ("0.32",)
"""vLLM releases, by their first two numbers, that the engine tests run against."""

SPECULATION: Final = ("ngram",)
"""Ways of speculative decoding that keep no KV of drafts beside the model's own."""


def paged_cache(config: VllmConfig, kv_cache_config: KVCacheConfig) -> PagedCache:
    """Return the geometry of the engine's cache.

    Raises LayoutError for anything that this version does not know to be right.
    """
    _refuse_version()
    _refuse_parallel(config)
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups)
        raise LayoutError(
            f"the model has {len(groups)} KV cache groups ({kinds}), kvstrata serves one",
            hint="hybrid models are not supported yet; run this model without the connector",
        )
    spec: Any = groups[0].kv_cache_spec
    _refuse_spec(spec)
    return PagedCache(
        layers=len(groups[0].layer_names),
        heads=spec.num_kv_heads,
        page_tokens=spec.block_size,
        channels=spec.head_size + spec.head_size_v,
        dtype=str(spec.dtype).removeprefix("torch."),
        ranks=config.parallel_config.tensor_parallel_size,
        packing=_packing(config, spec),
    )


def _packing(config: VllmConfig, spec: Any) -> str:
    """Return how vLLM's CPU kernels pack a page here; it depends on the machine's instructions."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return ""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    dtype, cache_dtype = config.model_config.dtype, config.cache_config.cache_dtype
    return str(_get_attn_isa(dtype, spec.block_size, spec.head_size, cache_dtype))


def _refuse_version() -> None:
    version = ".".join(vllm.__version__.split(".")[:2])
    if version not in TESTED_VERSIONS:
        raise LayoutError(
            f"vLLM {vllm.__version__} is not a version that kvstrata was tested with",
            hint=f"tested are {', '.join(TESTED_VERSIONS)}; its KV layout may have changed",
        )


def _refuse_parallel(config: VllmConfig) -> None:
    parallel = config.parallel_config
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        size = getattr(parallel, name, 1)
        if size != 1:
            raise LayoutError(
                f"{name} is {size}; kvstrata serves engines whose workers split heads only",
                hint=f"set {name} to 1, use tensor_parallel_size, or run without the connector",
            )
    speculation = config.speculative_config
    if speculation is not None and speculation.method not in SPECULATION:
        raise LayoutError(
            f"speculative decoding by {speculation.method!r} is not supported yet",
            hint=f"use {', '.join(SPECULATION)}, whose drafts have no KV of their own, leave "
            "speculative_config out, or run without the connector",
        )


def _refuse_spec(spec: Any) -> None:
    kind = type(spec).__name__
    # A subclass (MLA, sink, sparse) stores other bytes: only this very class is known.
    odd = {
        "kind": kind != "FullAttentionSpec" and kind,
        "sliding_window": spec.__dict__.get("sliding_window"),
        "attention_chunk_size": spec.__dict__.get("attention_chunk_size"),
        "page_size_padded": spec.__dict__.get("page_size_padded"),
        "num_head_slots": spec.__dict__.get("num_head_slots"),
        "state_content_bytes": spec.__dict__.get("state_content_bytes"),
        "tokens_per_state": spec.__dict__.get("tokens_per_state", 1) != 1,
        "kv_quant_mode": int(spec.__dict__.get("kv_quant_mode", 0)),
    }
    found = {name: value for name, value in odd.items() if value}
    if found:
        raise LayoutError(
            f"the model's KV cache is {kind} with {found}, which kvstrata does not know",
            hint="only plain full attention is supported yet; run without the connector",
        )
