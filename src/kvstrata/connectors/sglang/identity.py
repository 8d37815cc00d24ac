"""What makes two engines' KV the same: the namespace of an SGLang engine.

SGLang's page keys say which tokens (and which salt and adapter) a page is of, and nothing else. So
whatever else decides its bytes is in the namespace.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvstrata.connectors.identity import (
    ModelIdentity,
    engine_namespace,
    model_name,
    weights_revision,
)
from kvstrata.layout import BlockLayout
from kvstrata.tokens import Namespace

__all__ = ["NUMERIC_ARGUMENTS", "model_file", "sglang_namespace"]

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

_TOLD_ELSEWHERE: Final = frozenset({"context_length", "dtype", "kv_cache_dtype", "load_format"})
_SETTING: Final = "the extra config (or start SGLang with --revision)"
_REAL_WEIGHTS: Final = frozenset({"auto", "safetensors", "pt"})
"""Load formats that read the numbers of the files as they are."""


def sglang_namespace(
    arguments: Mapping[str, Any],
    layout: BlockLayout,
    config: Mapping[str, Any] | None,
    *,
    revision: str,
    name: str,
) -> Namespace:
    """Return the namespace of the engine's KV.

    `arguments` are the server's; `config` is the model's configuration as transformers writes it,
    None if that cannot be told: then, as with overrides, the engine is alone with its kind.
    `revision` and `name` are the operator's. Raises ConfigError if the weights cannot be named.
    """
    model, load_format = str(arguments["model_path"]), str(arguments["load_format"])
    own = {each: arguments[each] for each in NUMERIC_ARGUMENTS if each not in _TOLD_ELSEWHERE}
    own |= {
        # SGLang merges them into the configuration in a way of its own.
        "json_model_override_args": _overrides(arguments["json_model_override_args"]),
        "load_format": None if load_format in _REAL_WEIGHTS else load_format,
        # Dummy weights are drawn from the seed; real ones do not depend on it.
        "seed": arguments["random_seed"] if load_format == "dummy" else None,
        "config": "as in its file" if config is None else None,
    }
    kv_dtype = str(arguments["kv_cache_dtype"])
    dtype = layout.dtype if kv_dtype == "auto" else str(arguments["dtype"])
    identity = ModelIdentity(
        engine="sglang",
        model=model_name(model, given=name, revision=revision),
        weights=revision or weights_revision(model, arguments["revision"], None, setting=_SETTING),
        config=model_file(model) if config is None else config,
        dtype=dtype,
        kv_dtype=kv_dtype,
        tokens_max=arguments["context_length"],
        own=own,
    )
    return engine_namespace(identity, layout)


def model_file(model: str) -> dict[str, Any]:
    """Return what the model's directory says of its geometry and rope; nothing for a hub model.

    A hub model's configuration is as fixed as its weights, by the commit that names both.
    """
    path = Path(model) / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _overrides(text: Any) -> str | None:
    return None if str(text or "").strip() in {"", "{}"} else str(text)
