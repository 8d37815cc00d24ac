"""What makes two engines' KV the same: the namespace of an SGLang engine.

SGLang's page keys say which tokens (and which salt and adapter) a page is of, and nothing else. So
whatever else decides its bytes is in the namespace.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvstrata.connectors.identity import numerics_digest, weights_revision
from kvstrata.layout import BlockLayout
from kvstrata.tokens import Namespace

__all__ = ["NUMERIC_ARGUMENTS", "engine_namespace"]

NUMERIC_ARGUMENTS: Final = (
    "context_length",  # some rope scalings choose their factors by it
    "dtype",
    "json_model_override_args",
    "kv_cache_dtype",
    "load_format",
    "model_impl",
    "modelopt_quant",
    "quantization",
    "quantization_param_path",
)
"""Server arguments that change the numbers in a page."""

_SETTING: Final = "the extra config (or start SGLang with --revision)"


def engine_namespace(
    arguments: Mapping[str, Any],
    layout: BlockLayout,
    order: str,
    revision: str,
) -> Namespace:
    """Return the namespace of the engine's KV.

    `arguments` are the server's, `order` is that of the host pool: two engines with different
    orders keep different bytes for one page. Raises ConfigError if the weights cannot be named.
    """
    model = str(arguments["model_path"])
    dummy = str(arguments["load_format"]) == "dummy"
    numerics = {
        **{name: str(arguments[name]) for name in NUMERIC_ARGUMENTS},
        "config": _model_config(model),
        # Dummy weights are drawn from the seed; real ones do not depend on it.
        "seed": arguments["random_seed"] if dummy else None,
    }
    # The tokens per vector are known; which of two orders they are in is not in the geometry.
    axes = " ".join(each.name for each in layout.dimensions)
    return Namespace(
        model=f"sglang:{arguments['served_model_name'] or model}",
        weights=revision or weights_revision(model, arguments["revision"], None, setting=_SETTING),
        numerics=numerics_digest(numerics),
        kv_dtype=f"{arguments['kv_cache_dtype']}:{layout.dtype}:{axes}:{_family(order)}",
        geometry=layout.geometry,
        block_tokens=layout.block_tokens,
    )


def _family(order: str) -> str:
    """Return one name for orders that give the same bytes of a page."""
    return "page-first" if order == "page_first" else "layer-first"


def _model_config(model: str) -> Any:
    """Return what the model's directory says of its geometry and rope; None for a hub model.

    A hub model's configuration is as fixed as its weights, by the commit that names both.
    """
    path = Path(model) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
