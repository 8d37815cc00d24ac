"""What makes two engines' KV the same: the namespace of an SGLang engine.

SGLang's page keys say which tokens (and which salt and adapter) a page is of, and nothing else. So
whatever else decides its bytes is in the namespace.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from kvstrata.core.errors import ConfigError
from kvstrata.layout import BlockLayout
from kvstrata.tokens import Namespace

__all__ = ["NUMERIC_ARGUMENTS", "engine_namespace", "weights_revision"]

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

_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".gguf")
_SAMPLE_BYTES: Final = 1 << 16
_COMMIT: Final = re.compile("[0-9a-f]{40}")


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
    text = json.dumps(numerics, sort_keys=True, default=str)
    # The tokens per vector are known; which of two orders they are in is not in the geometry.
    axes = " ".join(each.name for each in layout.dimensions)
    return Namespace(
        model=f"sglang:{arguments['served_model_name'] or model}",
        weights=revision or weights_revision(model, arguments["revision"]),
        numerics=sha256(text.encode()).hexdigest(),
        kv_dtype=f"{arguments['kv_cache_dtype']}:{layout.dtype}:{axes}:{_family(order)}",
        geometry=layout.geometry,
        block_tokens=layout.block_tokens,
    )


def weights_revision(model: str, revision: str | None) -> str:
    """Return a name for exactly these weights.

    A model directory is named by a digest over its files: names, sizes, times of change and
    samples of their bytes. A hub model is named by its commit. Raises ConfigError where neither
    can be told.
    """
    folder = Path(model)
    if folder.is_dir():
        return _directory_digest(folder)
    if revision and _COMMIT.fullmatch(revision):  # a branch or tag may move
        return f"commit:{revision}"
    raise ConfigError(
        f"weights_revision: cannot tell which revision of {model!r} is loaded",
        hint="start SGLang with --revision COMMIT, or set weights_revision in the extra config",
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


def _directory_digest(folder: Path) -> str:
    digest = sha256()
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
    if not files:
        raise ConfigError(
            f"weights_revision: {folder.name!r} has no weight files to tell its revision from",
            hint="set weights_revision in the extra config",
        )
    for path in files:
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        with path.open("rb") as file:
            for offset in (0, status.st_size // 2, max(0, status.st_size - _SAMPLE_BYTES)):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return f"files:{digest.hexdigest()}"
