"""Whether the weights in memory are those of the model's files.

A name that several engines share says which files they have loaded. A model that was changed since
(an adapter merged, a token added, trained on) has other numbers under that name.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from safetensors import safe_open

from kvstrata.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["refuse_other_weights"]

log = logging.getLogger("kvstrata.transformers")

_SAMPLES: Final = 256


def refuse_other_weights(model: PreTrainedModel) -> None:
    """Raise ConfigError if a weight differs from the one of its name in the model's files.

    Evenly spaced elements of each are compared, as loaded: in the model's element type. A weight
    that transformers has renamed or joined, and a model without files here, cannot be compared.
    """
    kept = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    compared = 0
    folder = Path(str(model.config._name_or_path))  # noqa: SLF001
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                if name in kept:
                    _refuse_other(name, kept[name], file.get_tensor(name))
                    compared += 1
    if compared < len(kept):
        log.warning(
            "kvstrata compared %d of %d weights with the model's files; for the others it believes "
            "the name", compared, len(kept),
        )  # fmt: skip


def _refuse_other(name: str, kept: torch.Tensor, filed: torch.Tensor) -> None:
    same = kept.shape == filed.shape
    if same and kept.numel():
        step = max(1, kept.numel() // _SAMPLES)
        ours, theirs = (each.reshape(-1)[::step].cpu() for each in (kept, filed))
        same = torch.equal(ours, theirs.to(ours.dtype))
    if not same:
        raise ConfigError(
            f"model_name: {name} is not what the model's files say",
            hint="leave model_name out for a model that was changed since it was loaded",
        )
