"""What is in a tier's block, and the namespace that must say all of it.

vLLM names its blocks by a hash over tokens, `cache_salt`, adapter and media, chained from the root.
That hash says nothing of model, weights, element types or the order of bytes: the namespace does.
What neither says rightly (an adapter by its name, an image by a name that a client may choose) is
refused.
"""

from __future__ import annotations

import json
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import vllm

from kvstrata.connectors.vllm.geometry import engine_cache
from kvstrata.connectors.vllm.identity import vllm_namespace
from kvstrata.connectors.vllm.releases import is_newest
from kvstrata.connectors.vllm.settings import ConnectorSettings
from kvstrata.core.errors import ConfigError, LayoutError
from kvstrata.core.ids import LineageDigest
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.tokens import Namespace

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.kv_offload.base import OffloadingSpec

__all__ = ["digest_of", "refuse_unknown", "row_layout", "row_namespace"]

_HASHES: Final = ("sha256", "sha256_cbor")
"""Hashes of vLLM's of which nobody can make two prompts that share one."""
_REMEDY: Final = "use KvstrataConnector in place of vLLM's OffloadingConnector, or another tier"


def digest_of(key: bytes) -> LineageDigest:
    """Return vLLM's name of a block, its group included, as a digest of fixed length."""
    return LineageDigest(sha256(key).digest())


def refuse_unknown(config: VllmConfig, spec: OffloadingSpec) -> None:
    """Raise ConfigError where vLLM's hash of a block does not say what its numbers depend on."""
    model = config.model_config
    algorithm = str(config.cache_config.prefix_caching_hash_algo)
    odd = {
        "LoRA, of which vLLM's hash has the name and path only": config.lora_config is not None,
        "a model of images or sound, which a client may name": model.is_multimodal_model,
        "enable_prompt_embeds, of which vLLM's hash does not say where they stand for tokens": (
            model.enable_prompt_embeds
        ),
        "a pooling model, whose parameters the hash leaves out": model.runner_type == "pooling",
        "enable_sleep_mode, which may change the weights": model.enable_sleep_mode,
        "weight_transfer_config, which changes the weights": config.weight_transfer_config,
        f"vLLM {vllm.__version__}, with which it was not tried": not is_newest(),
        f"prefix_caching_hash_algo {algorithm}": algorithm not in _HASHES,
        "latent attention (MLA), which is not tried yet": model.use_mla,
        "more than one worker, which is not tried yet": spec.config.parallel.world_size != 1,
        "canonical_layout, which is not tried yet": spec.config.canonical_layout,
    }
    found = [name for name, value in odd.items() if value]
    if found:
        raise ConfigError(
            f"KvstrataTier does not serve an engine with {'; '.join(found)}", hint=_REMEDY
        )


def row_layout(
    config: VllmConfig, kv_cache_config: KVCacheConfig, spec: OffloadingSpec, row_bytes: int
) -> BlockLayout:
    """Return the layout of one row of vLLM's CPU tier: bytes whose order its writer's name says.

    Raises LayoutError for an engine, a cache or a platform that this version does not know.
    """
    from vllm.platforms import current_platform

    cache = engine_cache(config, kv_cache_config)
    if not cache.is_whole:
        raise LayoutError(
            "KvstrataTier does not serve models with several cache groups or windows", hint=_REMEDY
        )
    if not current_platform.is_cpu():
        raise LayoutError(
            f"KvstrataTier is not tried on {current_platform.device_name}: the order of a page's "
            "bytes depends on the attention backend there",
            hint=_REMEDY,
        )
    tokens = spec.tokens_per_block[0] * spec.blocks_per_chunk
    order: dict[str, Any] = {
        "vllm": vllm.__version__,
        "cache": cache.block_layout(spec.tokens_per_block[0]).describe(),
        "groups": [
            [group.tokens_per_block, group.group_id, *group.layer_names]
            for group in spec.config.groups
        ],
        "blocks_per_chunk": spec.blocks_per_chunk,
        "tokens_per_hash": spec.tokens_per_hash,
        "worker_bytes": spec.config.worker_kv_bytes_per_block,
        "replicated": spec.config.replicated_layout,
        "kv_cache_layout": spec.config.kv_cache_layout,
        "backend": str(config.attention_config.backend),
        "hash": str(config.cache_config.prefix_caching_hash_algo),
    }
    named = sha256(json.dumps(order, sort_keys=True).encode()).hexdigest()[:24]
    return BlockLayout((Dimension("byte", row_bytes),), "uint8", tokens, f"vllm-tier-{named}")


def row_namespace(
    config: VllmConfig, layout: BlockLayout, settings: ConnectorSettings
) -> Namespace:
    """Return the namespace of an engine's rows; raises ConfigError as `vllm_namespace`."""
    return vllm_namespace(
        config, layout, revision=settings.weights_revision, name=settings.model_name
    )
