"""What makes two engines' KV the same: the namespace of a vLLM engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvstrata.connectors.identity import numerics_digest, plain_config, weights_revision
from kvstrata.layout import BlockLayout
from kvstrata.tokens import Namespace

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["engine_namespace"]

_SETTING: Final = "kv_connector_extra_config"


def engine_namespace(config: VllmConfig, layout: BlockLayout, revision: str) -> Namespace:
    """Return the namespace of the engine's KV.

    Whatever the model's effective configuration says (rope scaling and overrides included) is
    part of it: an engine that computes other numbers must never find these blocks.
    """
    model = config.model_config
    numerics = {
        "hf_config": plain_config(model.hf_config.to_dict()),
        "dtype": str(model.dtype),
        "writer": layout.writer,  # the same numbers packed otherwise are other bytes
        "quantization": str(model.quantization),
        # Some rope scalings choose their factors by it (long rope in vLLM does).
        "max_model_len": model.max_model_len,
        "load_format": str(config.load_config.load_format),
        # Dummy weights are drawn from the seed; real ones do not depend on it.
        "seed": model.seed if str(config.load_config.load_format) == "dummy" else None,
    }
    return Namespace(
        model=str(model.served_model_name or model.model),
        weights=revision
        or weights_revision(model.model, model.revision, model.hf_config, setting=_SETTING),
        numerics=numerics_digest(numerics),
        kv_dtype=f"{config.cache_config.cache_dtype}:{layout.dtype}",
        geometry=layout.geometry,
        block_tokens=layout.block_tokens,
    )
