"""What makes two engines' KV the same: the namespace of an SGLang engine.

SGLang's page keys say which tokens (and which salt and adapter) a page is of, and nothing else. So
whatever else decides its bytes is in the namespace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvstrata.connectors.identity import (
    ModelIdentity,
    disputed,
    engine_namespace,
    model_name,
    weights_revision,
)
from kvstrata.layout import BlockLayout
from kvstrata.tokens import Namespace

__all__ = ["NUMERIC_ARGUMENTS", "model_file", "sglang_namespace"]

NUMERIC_ARGUMENTS: Final = (
    "context_length",  # some rope scalings choose their factors by it
    "decrypted_config_file",
    "dtype",
    "enable_quant_communications",
    "enable_w4a4_mxfp4_megamoe",
    "flashinfer_mxfp4_moe_precision",
    "forward_hooks",
    "json_model_override_args",
    "kt_weight_path",
    "kv_cache_dtype",
    "load_format",
    "model_impl",
    "model_loader_extra_config",
    "modelopt_checkpoint_restore_path",
    "modelopt_quant",
    "quantize_and_serve",
    "rl_quant_profile",
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
    first_layer: int | None = None,
) -> Namespace:
    """Return the namespace of the engine's KV.

    `arguments` are the server's; `config` is the model's configuration as transformers writes it,
    None if that cannot be told: then, as with overrides, the engine is alone with its kind.
    `revision` and `name` are the operator's. `first_layer` is the rank's, where ranks hold layers:
    which ones an operator may choose. Raises ConfigError if the weights cannot be named.
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
        "model_loader_extra_config": _overrides(arguments["model_loader_extra_config"]),
        "flashinfer_mxfp4_moe_precision": _unless(
            arguments["flashinfer_mxfp4_moe_precision"], "default"
        ),
        "kt_method": arguments["kt_method"] if arguments["kt_weight_path"] else None,
        "quantization_param_path": _file_digest(arguments["quantization_param_path"]),
        # The numbers come from the remote class, while `config` is the built-in one's.
        "remote_code": arguments["trust_remote_code"] and (config or {}).get("auto_map"),
        # Some of its kernels leave out what others compute.
        "attention": arguments["attention_backend"]
        if config is None or any(disputed(config))
        else None,
        "first_layer": None if first_layer is None else f"layer {first_layer}",
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


def _unless(value: Any, default: str) -> Any:
    return None if value == default else value


def _file_digest(path: Any) -> str | None:
    """Return a digest of a file's bytes; its name where it cannot be read."""
    if not path:
        return None
    try:
        return hashlib.sha256(Path(str(path)).read_bytes()).hexdigest()
    except OSError:
        return str(path)


def _overrides(text: Any) -> str | None:
    return None if str(text or "").strip() in {"", "{}"} else str(text)
