"""What names a model's weights and its configuration: for any connector, with no engine in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from kvstrata.core.errors import ConfigError

__all__ = ["numerics_digest", "plain_config", "weights_revision"]

_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".gguf")
_SAMPLE_BYTES: Final = 1 << 16
_COMMIT: Final = re.compile("[0-9a-f]{40}")


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
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
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
