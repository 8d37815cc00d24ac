"""Whether the weights in memory are those of the model's files.

A name that several engines share says which files they have loaded. A model that was changed since
(an adapter merged, a token added, trained on) has other numbers under that name.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

from kvstrata.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["refuse_other_weights"]

log = logging.getLogger("kvstrata.transformers")

_SAMPLES: Final = 256


def refuse_other_weights(model: PreTrainedModel, *, samples_only: bool) -> None:
    """Raise ConfigError if a weight differs from the one of its name in the model's files.

    They are compared as loaded, in the model's element type: whole, or with `samples_only` evenly
    spaced elements of each, for models too large to read at start. A weight that transformers has
    renamed or joined cannot be compared; raises ConfigError if none can.
    """
    kept = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    compared = 0
    folder = _folder(model)
    for path in sorted(folder.glob("*.safetensors")) if folder else []:
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                if name in kept:
                    _refuse_other(name, kept[name], file.get_tensor(name), samples_only)
                    compared += 1
    if not compared:
        raise ConfigError(
            "model_name: no weight could be compared with the model's files",
            hint="load it from safetensors in a directory or in the hub's cache, or leave "
            "model_name out",
        )
    if compared < len(kept):
        log.warning(
            "kvstrata compared %d of %d weights with the model's files; for the others it believes "
            "the name", compared, len(kept),
        )  # fmt: skip


def _folder(model: PreTrainedModel) -> Path | None:
    """Return where the model's files lie: its directory, or its commit's in the hub's cache."""
    config = model.config
    name = str(config._name_or_path)  # noqa: SLF001
    if Path(name).is_dir():
        return Path(name)
    commit = getattr(config, "_commit_hash", None)
    try:
        found = try_to_load_from_cache(name, "config.json", revision=commit) if commit else None
    except ValueError:  # no name of the hub's
        return None
    return Path(found).parent if isinstance(found, str) else None


def _refuse_other(
    name: str,
    kept: torch.Tensor,
    filed: torch.Tensor,
    samples_only: bool,  # noqa: FBT001
) -> None:
    same = kept.shape == filed.shape
    if same and kept.numel():
        step = max(1, kept.numel() // _SAMPLES) if samples_only else 1
        ours, theirs = (each.reshape(-1)[::step].cpu() for each in (kept, filed))
        same = torch.equal(ours, theirs.to(ours.dtype))
    if not same:
        raise ConfigError(
            f"model_name: {name} is not what the model's files say",
            hint="leave model_name out for a model that was changed since it was loaded",
        )
