"""From vLLM's cache configuration to our layout; whatever we do not know is refused here."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import vllm

from kvstrata.connectors.versions import refuse_untested
from kvstrata.connectors.vllm.releases import is_newest, refuse_untried
from kvstrata.connectors.vllm.stages import staged_cache
from kvstrata.core.errors import LayoutError
from kvstrata.layout import GroupedCache, LayerGroup, PagedCache

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

__all__ = ["FP8_TENSORS", "engine_cache"]

FP8_TENSORS: Final = "uint8"
"""Element type of the tensors in which vLLM keeps 8-bit floats."""
_FP8_KINDS: Final = {
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}
_HINTS: Final = {
    "MambaSpec": "of states only gated delta nets' (Qwen3-Next) are supported, in vLLM's mode "
    "`align` (with prefix caching), in one worker, without drafts",
    "MLAAttentionSpec": "of MLA only plain latents of 16-bit floats, in one worker, are supported",
    "ChunkedLocalAttentionSpec": "chunked attention is not tested",
}
_KINDS: Final = frozenset({"FullAttentionSpec", "SlidingWindowSpec", "MLAAttentionSpec"})
_LATENT_DTYPES: Final = frozenset({None, "auto", "bfloat16", "float16"})
_FP8_PER_TENSOR: Final = 1  # vLLM's KVQuantMode: constant scales, which come with the weights
_STATES: Final = "GDN_ATTN"  # of the kinds that vLLM runs on a CPU, the one that was tested

SPECULATION: Final = ("ngram",)
"""Ways of speculative decoding that keep no KV of drafts beside the model's own."""


def engine_cache(config: VllmConfig, kv_cache_config: KVCacheConfig) -> GroupedCache:
    """Return the geometry of the engine's cache.

    Raises LayoutError for anything that this version does not know to be right.
    """
    refuse_untested("vllm", vllm.__version__)
    refuse_untried(config)
    _refuse_parallel(config)
    groups = kv_cache_config.kv_cache_groups
    names = sorted((name for group in groups for name in group.layer_names), key=_layer_order)
    places = {name: place for place, name in enumerate(names)}
    own = GroupedCache(tuple(_group(config, group, places) for group in groups))
    return staged_cache(config, own)


def _layer_order(name: str) -> tuple[list[int], str]:
    """Sort `model.layers.10...` behind `model.layers.9...`."""
    return [int(number) for number in re.findall(r"\d+", name)], name


def _group(config: VllmConfig, group: KVCacheGroupSpec, places: dict[str, int]) -> LayerGroup:
    spec: Any = group.kv_cache_spec
    cache_dtype = str(config.cache_config.cache_dtype)
    _refuse_group(group)
    layers = tuple(places[name] for name in group.layer_names)
    if type(spec).__name__ == "MambaSpec":
        return _states(config, spec, layers)
    _refuse_spec(spec, cache_dtype)
    if _is_latent(spec):
        _refuse_latent(config, spec)
    cache = PagedCache(
        layers=len(group.layer_names),
        heads=spec.num_kv_heads,
        page_tokens=spec.block_size,
        channels=spec.head_size + spec.head_size_v,
        dtype=_dtype(spec, cache_dtype),
        ranks=config.parallel_config.tensor_parallel_size,
        packing=_packing(config, spec),
    )
    window = spec.sliding_window if type(spec).__name__ == "SlidingWindowSpec" else 0
    return LayerGroup(cache, layers, window)


def _states(config: VllmConfig, spec: Any, layers: tuple[int, ...]) -> LayerGroup:
    """Return a group of states; their shapes and types are in the name of their packing."""
    from vllm.platforms import current_platform

    page_tokens, page_bytes = spec.block_size, spec.page_size_bytes
    ranks = config.parallel_config.tensor_parallel_size
    odd = {
        # In other modes a page is computed on in place, and nobody says when it is at a boundary.
        "mamba_cache_mode": spec.mamba_cache_mode != "align" and spec.mamba_cache_mode,
        "mamba_type": spec.mamba_type.name != _STATES and spec.mamba_type.name,
        "num_speculative_blocks": spec.num_speculative_blocks,
        "num_prefill_checkpoint_blocks": spec.num_prefill_checkpoint_blocks,
        "tp_replicated": spec.tp_replicated,
        "page_size_bytes": page_bytes % page_tokens and page_bytes,
        "speculative_config": config.speculative_config is not None,
        "tensor_parallel_size": ranks != 1 and ranks,
        "an untried vLLM": "" if is_newest() else vllm.__version__,
    }
    found = {name: value for name, value in odd.items() if value}
    if found:
        raise LayoutError(
            f"the model's KV cache is MambaSpec with {found}, which kvstrata does not know",
            hint=_HINTS["MambaSpec"] + "; run this model without the connector",
        )
    kind = (spec.mamba_type.name, spec.shapes, spec.dtypes, spec.num_heads)
    cache = PagedCache(
        layers=len(layers),
        heads=1,
        page_tokens=page_tokens,
        channels=page_bytes // page_tokens,
        dtype="uint8",
        packing=f"state-{current_platform.device_type}-{kind!r}",
    )
    return LayerGroup(cache, layers, 0, spec.state_content_size_bytes)


def _dtype(spec: Any, cache_dtype: str) -> str:
    """Return what the cache's elements are; vLLM's tensors of 8-bit floats only say `uint8`."""
    return _FP8_KINDS.get(cache_dtype, str(spec.dtype).removeprefix("torch."))


def _packing(config: VllmConfig, spec: Any) -> str:
    """Return how vLLM's CPU kernels pack a page here; it depends on the machine's instructions."""
    from vllm.platforms import current_platform

    if _is_latent(spec):  # named, so that nobody takes one vector for K and V and re-arranges it
        import torch

        attention = config.attention_config
        chosen = attention.backend_per_kind.get("mla_attention", attention.backend)
        backend = chosen.name if chosen else "auto"
        if current_platform.is_cpu():
            # As vLLM chooses. Its kernel for CPUs without AMX attends over no prefix: vLLM turns
            # prefix caching off, and this connector is idle.
            amx = backend != "CPU_MLA" and torch.cpu._is_amx_tile_supported()  # noqa: SLF001
            backend = "AMX_MLA" if amx else "CPU_MLA"
        return f"latent-{backend.lower()}"  # backends may keep a latent in ways of their own
    if not current_platform.is_cpu():
        return ""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    dtype, cache_dtype = config.model_config.dtype, config.cache_config.cache_dtype
    return str(_get_attn_isa(dtype, spec.block_size, spec.head_size, cache_dtype))


def _is_latent(spec: Any) -> bool:
    """Return whether its pages have one vector a token (MLA), from which K and V are computed."""
    return type(spec).__name__ == "MLAAttentionSpec"


def _refuse_parallel(config: VllmConfig) -> None:
    parallel = config.parallel_config
    for name in (
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        size = getattr(parallel, name, 1)
        if size != 1:
            raise LayoutError(
                f"{name} is {size}; kvstrata serves engines whose workers split heads or layers",
                hint=f"set {name} to 1, use tensor_parallel_size, or run without the connector",
            )
    speculation = config.speculative_config
    if speculation is not None and speculation.method not in SPECULATION:
        raise LayoutError(
            f"speculative decoding by {speculation.method!r} is not supported yet",
            hint=f"use {', '.join(SPECULATION)}, whose drafts have no KV of their own, leave "
            "speculative_config out, or run without the connector",
        )


def _refuse_group(group: KVCacheGroupSpec) -> None:
    odd = {
        "is_eagle_group": group.is_eagle_group,
        "host_resident": group.host_resident,
        "enable_kv_transfer": not group.enable_kv_transfer,
    }
    found = [name for name, value in odd.items() if value]
    if found:
        raise LayoutError(
            f"a KV cache group of the model has another {found[0]} than kvstrata knows",
            hint="run this model without the connector",
        )


def _refuse_spec(spec: Any, cache_dtype: str) -> None:
    kind = type(spec).__name__
    quantised = int(spec.__dict__.get("kv_quant_mode", 0))
    # Per-tensor scales are numbers of the weights, which the namespace names. vLLM 0.32 measures
    # none while it runs; other modes keep scales in the page, or a scale for each token.
    known = quantised == (_FP8_PER_TENSOR if cache_dtype in _FP8_KINDS else 0)
    # Another subclass (sink, sparse) stores other bytes: only these very classes are known. Where
    # vLLM runs without its hybrid cache manager, full attention may have a window: it keeps all.
    odd = {
        "kind": kind not in _KINDS and kind,
        "extra_retained_tokens": spec.__dict__.get("extra_retained_tokens"),
        "non_causal": spec.__dict__.get("non_causal"),
        "attention_chunk_size": spec.__dict__.get("attention_chunk_size"),
        "page_size_padded": spec.__dict__.get("page_size_padded"),
        "num_head_slots": spec.__dict__.get("num_head_slots"),
        "state_content_bytes": spec.__dict__.get("state_content_bytes"),
        "tokens_per_state": spec.__dict__.get("tokens_per_state", 1) != 1,
        "kv_cache_dtype": not known and cache_dtype,
    }
    found = {name: value for name, value in odd.items() if value}
    if found:
        raise LayoutError(
            f"the model's KV cache is {kind} with {found}, which kvstrata does not know",
            hint=_HINTS.get(kind, "only full attention and sliding windows are supported")
            + "; run this model without the connector",
        )


def _refuse_latent(config: VllmConfig, spec: Any) -> None:
    """Take plain latents alone: sparse models and 8-bit latents keep other things in the page."""
    cache_dtype = str(config.cache_config.cache_dtype)
    odd = {
        "num_kv_heads": spec.num_kv_heads != 1 and spec.num_kv_heads,
        "head_size_v": spec.head_size_v,
        "model_version": spec.model_version,
        "alignment": spec.alignment,
        "is_index_group_leader": spec.is_index_group_leader,
        "non_causal_multi_token_decode": spec.non_causal_multi_token_decode,
        "cache_role": spec.cache_role != "sparse" and str(spec.cache_role),
        "dtype": str(spec.dtype) not in {"torch.bfloat16", "torch.float16"} and str(spec.dtype),
        "cache_dtype_str": spec.cache_dtype_str not in _LATENT_DTYPES and spec.cache_dtype_str,
        "kv_cache_dtype": cache_dtype not in _LATENT_DTYPES and cache_dtype,
        # Every worker has all of a latent, so their parts are no parts of one block.
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size != 1
        and config.parallel_config.tensor_parallel_size,
    }
    found = {name: value for name, value in odd.items() if value}
    if found:
        raise LayoutError(
            f"the model's KV cache is MLAAttentionSpec with {found}, which kvstrata does not know",
            hint=_HINTS["MLAAttentionSpec"] + "; run this model without the connector",
        )
