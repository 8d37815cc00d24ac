"""What makes two engines' KV the same: the namespace of a vLLM engine."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvstrata.core.errors import ConfigError
from kvstrata.layout import BlockLayout
from kvstrata.tokens import Namespace

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["engine_namespace", "weights_revision"]

_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".gguf")
_SAMPLE_BYTES: Final = 1 << 16
_COMMIT: Final = re.compile("[0-9a-f]{40}")


def engine_namespace(config: VllmConfig, layout: BlockLayout, revision: str) -> Namespace:
    """Return the namespace of the engine's KV.

    Whatever the model's effective configuration says (rope scaling and overrides included) is
    part of it: an engine that computes other numbers must never find these blocks.
    """
    model = config.model_config
    numerics = {
        "hf_config": _plain(model.hf_config.to_dict()),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        # Some rope scalings choose their factors by it (long rope in vLLM does).
        "max_model_len": model.max_model_len,
        "load_format": str(config.load_config.load_format),
        # Dummy weights are drawn from the seed; real ones do not depend on it.
        "seed": model.seed if str(config.load_config.load_format) == "dummy" else None,
    }
    text = json.dumps(numerics, sort_keys=True, default=str)
    return Namespace(
        model=str(model.served_model_name or model.model),
        weights=revision or weights_revision(model.model, model.revision, model.hf_config),
        numerics=sha256(text.encode()).hexdigest(),
        kv_dtype=f"{config.cache_config.cache_dtype}:{layout.dtype}",
        geometry=layout.geometry,
        block_tokens=layout.block_tokens,
    )


def weights_revision(model: str, revision: str | None, hf_config: Any) -> str:
    """Return a name for exactly these weights.

    A model directory is named by a digest over its files: names, sizes, times of change and
    samples of their bytes, so that an edited or replaced file is another revision. A hub model is
    named by its commit. Raises ConfigError where neither can be told.
    """
    folder = Path(model)
    if folder.is_dir():
        return _directory_digest(folder)
    for commit in (getattr(hf_config, "_commit_hash", None), revision):
        if commit and _COMMIT.fullmatch(commit):  # a branch or tag may move
            return f"commit:{commit}"
    raise ConfigError(
        f"weights_revision: cannot tell which revision of {model!r} is loaded",
        hint="set weights_revision in kv_connector_extra_config, for example to the commit",
    )


def _directory_digest(folder: Path) -> str:
    digest = sha256()
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
    if not files:
        raise ConfigError(
            f"weights_revision: {folder.name!r} has no weight files to tell its revision from",
            hint="set weights_revision in kv_connector_extra_config",
        )
    for path in files:
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        with path.open("rb") as file:
            for offset in (0, status.st_size // 2, max(0, status.st_size - _SAMPLE_BYTES)):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return f"files:{digest.hexdigest()}"


def _plain(value: Any) -> Any:
    """Return a configuration without what changes from run to run."""
    if isinstance(value, dict):
        return {
            str(key): _plain(each) for key, each in value.items() if not str(key).startswith("_")
        }
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
