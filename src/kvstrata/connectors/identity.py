"""What names a model's weights and configuration: one namespace for every engine that agrees.

Nothing of an engine's way to keep its numbers is in it. Whatever may change them is, and where it
is not known whether a setting does, it counts as one that does (docs/adr/0014).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from kvstrata.core.errors import ConfigError
from kvstrata.layout import BlockLayout, model_geometry
from kvstrata.tokens import Namespace

__all__ = [
    "FIXED_ROPES",
    "WEIGHT_SUFFIXES",
    "ModelIdentity",
    "disputed",
    "effective_config",
    "engine_namespace",
    "model_name",
    "numerics_digest",
    "plain_config",
    "rope_types",
    "weights_revision",
]

WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".gguf")
"""How names of files with weights end."""
_SAMPLE_BYTES: Final = 1 << 16
_COMMIT: Final = re.compile("[0-9a-f]{40}")
_UNSET: Final = frozenset({"None", "", "auto", "False"})
"""Settings, as text, that leave a choice to the engine, which the other fields then tell."""
FIXED_ROPES: Final = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
"""Types of rope whose angles do not depend on how long texts may be or are."""
_AGREED_ROPE: Final = frozenset({
    "beta_fast", "beta_slow", "factor", "high_freq_factor", "low_freq_factor",
    "original_max_position_embeddings", "rope_theta", "rope_type", "truncate", "type",
})  # fmt: skip
"""Parameters of rope that every engine obeys in the same way."""
_DISPUTED: Final = ("attention_chunk", "logit_cap", "sink", "sliding_window", "soft_cap", "softcap")
"""Parts of the names of settings that some engines or kernels leave out."""
_SHARED_MODELS: Final = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Types of model that every engine computes by the same plain function."""
_NOT_NUMERIC: Final = frozenset({
    "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id", "output_attentions",
    "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "torch_dtype",
    "transformers_version", "use_cache",
})  # fmt: skip
"""Fields of a configuration that decide no key or value: the element type is named apart."""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What decides the numbers of an engine's KV besides tokens, salt and geometry."""

    engine: str
    """Which engine it is; in the namespace only where something of its own is too."""
    model: str
    """The model's name (`model_name`)."""
    weights: str
    """Revision of the weights (`weights_revision`), or what the operator says it is."""
    config: Mapping[str, Any]
    """The effective configuration as transformers writes it, overrides included."""
    dtype: str
    """Element type in which the model is computed."""
    kv_dtype: str = "auto"
    """How the engine was told to keep KV; `auto` for as computed."""
    tokens_max: int | None = None
    """Longest text that the engine takes; counts only where rope depends on it."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """Settings of this engine that change numbers, or may; those left to the engine do not."""


def numerics_digest(numerics: Mapping[str, Any]) -> str:
    """Return a digest of whatever decides the numbers besides the weights."""
    text = json.dumps(numerics, sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()


def plain_config(value: Any) -> Any:
    """Return a configuration without what changes from run to run."""
    if isinstance(value, dict):
        return {
            str(key): plain_config(each)
            for key, each in value.items()
            if not str(key).startswith("_")
        }
    if isinstance(value, list | tuple):
        return [plain_config(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def weights_revision(model: str, revision: str | None, hf_config: Any, *, setting: str) -> str:
    """Return a name for exactly these weights.

    A model directory is named by a digest over its files: names, sizes, times of change and
    samples of their bytes, so that an edited or replaced file is another revision. A hub model is
    named by its commit. Raises ConfigError where neither can be told; `setting` is where the
    operator can tell it.
    """
    folder = Path(model)
    if folder.is_dir():
        return _directory_digest(folder, setting)
    for commit in (getattr(hf_config, "_commit_hash", None), revision):
        if commit and _COMMIT.fullmatch(commit):  # a branch or tag may move
            return f"commit:{commit}"
    raise ConfigError(
        f"weights_revision: cannot tell which revision of {model!r} is loaded",
        hint=f"set weights_revision in {setting}, for example to the commit",
    )


def _directory_digest(folder: Path, setting: str) -> str:
    digest = sha256()
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    if not files:
        raise ConfigError(
            f"weights_revision: {folder.name!r} has no weight files to tell its revision from",
            hint=f"set weights_revision in {setting}",
        )
    for path in files:
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        with path.open("rb") as file:
            for offset in (0, status.st_size // 2, max(0, status.st_size - _SAMPLE_BYTES)):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return f"files:{digest.hexdigest()}"


# -- the namespace ---------------------------------------------------------------------------------


def engine_namespace(identity: ModelIdentity, layout: BlockLayout) -> Namespace:
    """Return the namespace of blocks of `layout` that such an engine computes.

    Engines that agree in what decides the numbers get the same one, whatever their axes, ranks,
    page size and packing are. An engine with a setting that the others do not have is alone with
    the engines of its kind that have it too; so is one whose model has something that engines are
    known to compute, or may compute, each in a way of its own.
    """
    own = {name: value for name, value in identity.own.items() if str(value) not in _UNSET}
    if words := sorted(set(disputed(identity.config))):
        own["disputed"] = words
    if set(_ropes_in(identity.config)) - FIXED_ROPES:
        own["tokens_max"] = identity.tokens_max  # some choose their factors by it
    numerics = {"config": effective_config(identity.config), "dtype": identity.dtype}
    if own:
        numerics |= {"engine": identity.engine, "own": plain_config(own)}
    auto = identity.kv_dtype in _UNSET
    kv_dtype = layout.dtype if auto else f"{identity.engine}:{identity.kv_dtype}:{layout.dtype}"
    return Namespace(
        model=identity.model,
        weights=identity.weights,
        numerics=numerics_digest(numerics),
        kv_dtype=kv_dtype,
        geometry=model_geometry(layout),
        block_tokens=layout.block_tokens,
    )


def disputed(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what of a configuration engines do not, or may not, obey in the same way."""
    kind = str(config.get("model_type"))
    if kind not in _SHARED_MODELS:
        yield f"model_type {kind}"
    yield from _disputed_below(config)


def effective_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's configuration without what does not decide its keys and values."""
    return {
        name: value
        for name, value in plain_config(dict(config)).items()
        if name not in _NOT_NUMERIC and value is not None
    }


def model_name(model: str, *, given: str, revision: str) -> str:
    """Return the name of a model for its namespace.

    `given` if the operator names it. Else a directory's own name where a digest of its files is in
    the namespace too; its whole path where the operator has named the `revision`, which says
    nothing without it; and the name of a hub model.
    """
    folder = Path(model)
    if given or not folder.is_dir():
        return given or model
    return str(folder.resolve()) if revision else folder.resolve().name


def _disputed_below(config: Any) -> Iterator[str]:
    for name, value in config.items() if isinstance(config, Mapping) else ():
        if name in {"rope_parameters", "rope_scaling"}:
            yield from _disputed_rope(value)
        elif isinstance(value, Mapping):
            yield from _disputed_below(value)
        elif value and any(word in str(name) for word in _DISPUTED):
            yield str(name)


def _disputed_rope(rope: Any) -> Iterator[str]:
    for name, value in rope.items() if isinstance(rope, Mapping) else ():
        if isinstance(value, Mapping):  # one for each kind of layer
            yield from _disputed_rope(value)
        elif name not in _AGREED_ROPE and value is not None:
            yield f"rope {name}"


def _ropes_in(config: Any) -> Iterator[str]:
    """Yield the types of rope in a configuration, wherever in it they are."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            if name in {"rope_parameters", "rope_scaling"}:
                yield from rope_types(value)
            else:
                yield from _ropes_in(value)


def rope_types(rope: Any) -> Iterator[str]:
    """Yield each type in parameters of rope, which may have some for each kind of layer."""
    if isinstance(rope, Mapping):
        nested = [each for each in rope.values() if isinstance(each, Mapping)]
        for each in nested:  # one for each kind of layer
            yield from rope_types(each)
        if not nested:
            yield str(rope.get("rope_type", rope.get("type", "default")))
