"""The TensorRT-LLM that we know: arguments, models, what makes two engines' KV the same.

Everything is refused that is not known to be right, at start, before the first block moves.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from kvstrata.connectors.identity import (
    model_name,
    numerics_digest,
    plain_config,
    weights_revision,
)
from kvstrata.connectors.trtllm.settings import ENVIRONMENT_PREFIX
from kvstrata.core.errors import ConfigError, LayoutError
from kvstrata.layout import BlockLayout
from kvstrata.tokens import Namespace

__all__ = ["KNOWN_ARCHITECTURES", "Model", "check_arguments", "engine_namespace", "read_model"]

log = logging.getLogger("kvstrata.trtllm")

KNOWN_ARCHITECTURES: Final = frozenset({
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
})  # fmt: skip
"""Models of text alone with full attention in every layer: their tokens say what their KV is."""

_ONE: Final = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "context_parallel_size",
    "max_beam_width",
)
_ABSENT: Final = {
    "enable_attention_dp": "each rank would need a daemon of its own",
    "speculative_config": "drafts are written to pages and taken back",
    "sparse_attention_config": "its index is kept beside the KV and would be missing",
    "cache_transceiver_config": "another connector moves the same pages",
}
_ABSENT_CACHE: Final = {
    "host_cache_size": "blocks that move between the engine's own tiers change their page",
    "disk_cache_size": "blocks that move between the engine's own tiers change their page",
    "max_attention_window": "a page behind the window is given away while its request runs",
    "sink_token_length": "its pages are not those of the tokens alone",
}
_NUMERICS: Final = (
    "dtype", "load_format", "quant_config", "attn_backend", "model_kwargs", "rope_scaling",
    "checkpoint_format", "max_seq_len", "moe_config", "allreduce_strategy", "enable_min_latency",
    "torch_compile_config",
)  # fmt: skip
_UNKNOWN_CACHE_TYPES: Final = frozenset({"nvfp4", "int4"})


@dataclass(frozen=True, slots=True)
class Model:
    """What is known of the model besides its KV."""

    name: str
    """As the engine was told."""
    config: Mapping[str, Any]
    """Its config.json."""
    folder: Path
    """Where that file is."""
    revision: str | None
    """What the engine was told to load, None for the newest."""

    @property
    def heads(self) -> int:
        """KV heads."""
        given = self.config.get("num_key_value_heads") or self.config.get("num_attention_heads")
        return int(given or 0)


def check_arguments(arguments: Any) -> int:
    """Return the engine's tokens per page; raises LayoutError or ConfigError for what we refuse."""
    for name in _ONE:
        size = getattr(arguments, name, 1)
        if size not in {None, 1}:
            raise LayoutError(
                f"{name} is {size}; this version serves engines of one rank and one beam",
                hint=f"set {name} to 1, or run without the connector",
            )
    for name, why in _ABSENT.items():
        if getattr(arguments, name, None):
            raise LayoutError(
                f"{name}: {why}", hint=f"run without {name}, or without the connector"
            )
    cache = getattr(arguments, "kv_cache_config", None)
    for name, why in _ABSENT_CACHE.items():
        if getattr(cache, name, None):
            raise LayoutError(
                f"kv_cache_config.{name}: {why}", hint=f"leave {name} out of kv_cache_config"
            )
    _check_reuse(cache)
    kind = str(getattr(cache, "dtype", "auto"))
    if kind.lower() in _UNKNOWN_CACHE_TYPES:
        raise LayoutError(
            f"kv_cache_config.dtype {kind}: its scales lie in a pool of their own",
            hint="use auto or fp8, or run without the connector",
        )
    page_tokens = getattr(cache, "tokens_per_block", 0)
    if not isinstance(page_tokens, int) or page_tokens < 1:
        raise LayoutError(
            f"kv_cache_config.tokens_per_block is {page_tokens!r}",
            hint="this TensorRT-LLM is unknown to kvstrata; run without the connector",
        )
    return page_tokens


def read_model(arguments: Any) -> Model:
    """Return the model that the engine runs; raises LayoutError for one that we do not serve."""
    name = str(arguments.model)
    revision = getattr(arguments, "revision", None)
    path = _config_path(name, revision)
    if path is None:
        raise ConfigError(
            f"model: no config.json of {name!r} was found on this machine",
            hint="give the engine the model's directory",
        )
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model: {str(path)!r} cannot be read: {error}", hint="give another directory"
        ) from error
    odd = sorted(set(config.get("architectures") or ["none"]) - KNOWN_ARCHITECTURES)
    if odd:
        raise LayoutError(
            f"the model is {odd[0]}, which kvstrata does not serve in TensorRT-LLM",
            hint=f"served are {', '.join(sorted(KNOWN_ARCHITECTURES))}",
        )
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise LayoutError(
            f"the model has a sliding window of {config['sliding_window']} tokens",
            hint="only full attention is served; run this model without the connector",
        )
    return Model(name, config, path.parent, revision)


def engine_namespace(
    arguments: Any, model: Model, layout: BlockLayout, *, revision: str, version: str
) -> Namespace:
    """Return the namespace of the engine's KV."""
    cache = arguments.kv_cache_config
    numerics = {
        "config": plain_config(dict(model.config)),
        "writer": layout.writer,  # the same numbers in another order are other bytes
        "tensorrt_llm": version,  # a release may correct how a model is computed
        "cache_dtype": str(getattr(cache, "dtype", "auto")),
        "arguments": {name: _plain(getattr(arguments, name, None)) for name in _NUMERICS},
    }
    return Namespace(
        model=model_name(model.name, given="", revision=revision),
        weights=revision or _revision(model),
        numerics=numerics_digest(numerics),
        kv_dtype=f"{getattr(cache, 'dtype', 'auto')}:{layout.dtype}",
        geometry=layout.geometry,
        block_tokens=layout.block_tokens,
    )


def _check_reuse(cache: Any) -> None:
    if not getattr(cache, "enable_block_reuse", True):
        raise ConfigError(
            "kv_cache_config.enable_block_reuse is off, so the engine would discard what is loaded",
            hint="set enable_block_reuse to true",
        )
    if getattr(cache, "enable_partial_reuse", False):
        log.warning(
            "kvstrata cannot load behind pages that the engine reuses in part: set "
            "kv_cache_config.enable_partial_reuse to false"
        )


def _revision(model: Model) -> str:
    setting = f"{ENVIRONMENT_PREFIX}WEIGHTS_REVISION"
    if Path(model.name).is_dir():
        return weights_revision(model.name, None, None, setting=setting)
    # A hub's cache names the folder of a snapshot by its commit.
    commit = SimpleNamespace(_commit_hash=model.folder.name)
    return weights_revision(model.name, model.revision, commit, setting=setting)


def _config_path(name: str, revision: str | None) -> Path | None:
    if Path(name).is_dir():
        path = Path(name) / "config.json"
        return path if path.is_file() else None
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # neither a directory nor a name that a hub could have
        return None
    return Path(found) if isinstance(found, str) else None


def _plain(value: Any) -> Any:
    """Return an argument as values that are the same in every run."""
    dump = getattr(value, "model_dump", None)
    return plain_config(dump(mode="json") if callable(dump) else value)
