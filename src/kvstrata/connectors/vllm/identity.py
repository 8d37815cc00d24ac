"""What makes two engines' KV the same: the namespace of a vLLM engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from kvstrata.connectors.identity import (
    ModelIdentity,
    engine_namespace,
    model_name,
    weights_revision,
)
from kvstrata.layout import BlockLayout
from kvstrata.tokens import Namespace

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["vllm_namespace"]

_SETTING: Final = "kv_connector_extra_config"
_REAL_WEIGHTS: Final = frozenset({"auto", "hf", "safetensors", "pt"})
"""Load formats that read the numbers of the files as they are."""


def vllm_namespace(
    config: VllmConfig, layout: BlockLayout, *, revision: str, name: str
) -> Namespace:
    """Return the namespace of the engine's KV.

    `revision` and `name` are the operator's, empty to derive them. Whatever the model's effective
    configuration says (rope scaling and overrides included) is part of it: an engine that computes
    other numbers must never find these blocks.
    """
    model = config.model_config
    load_format = str(config.load_config.load_format)
    identity = ModelIdentity(
        engine="vllm",
        model=model_name(model.model, given=name, revision=revision),
        weights=revision
        or weights_revision(model.model, model.revision, model.hf_config, setting=_SETTING),
        config=model.hf_config.to_dict(),
        dtype=str(model.dtype).removeprefix("torch."),
        kv_dtype=str(config.cache_config.cache_dtype),
        tokens_max=model.max_model_len,
        own={
            "quantization": model.quantization,
            "quantization_config": getattr(model, "quantization_config", None) or None,
            "model_class_overrides": getattr(model, "model_class_overrides", None) or None,
            "vision": _vision(model.multimodal_config),
            "load_format": None if load_format in _REAL_WEIGHTS else load_format,
            # Dummy weights are drawn from the seed; real ones do not depend on it.
            "seed": model.seed if load_format == "dummy" else None,
        },
    )
    return engine_namespace(identity, layout)


def _vision(config: Any) -> list[str] | None:
    """Return how the engine is told to prune videos and to attend in its encoder, if it is."""
    names = ("video_pruning_rate", "video_pruning_method", "mm_encoder_attn_dtype")
    told = {name: getattr(config, name, None) for name in names}
    if not told["video_pruning_rate"] and told["mm_encoder_attn_dtype"] is None:
        return None
    return [f"{name}={value}" for name, value in told.items()]
