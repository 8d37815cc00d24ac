"""What makes two models' KV the same, and how we notice that a model is no longer what it was."""

from __future__ import annotations

from hashlib import sha256
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import torch
import transformers
from blake3 import blake3

from kvstrata.connectors.identity import (
    ModelIdentity,
    disputed,
    engine_namespace,
    numerics_digest,
    plain_config,
    weights_revision,
)
from kvstrata.connectors.transformers.eligibility import foreign_hooks
from kvstrata.connectors.transformers.weightfiles import refuse_other_weights
from kvstrata.layout import BlockLayout
from kvstrata.tokens import Namespace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ModelWatch", "model_namespace"]

_PLAIN_ATTENTION: Final = frozenset({"eager", "sdpa"})
"""Implementations of attention that are one function, up to rounding, for plain models."""
_SAMPLES: Final = 256
"""Elements of each weight that are looked at before each use."""


def model_namespace(
    model: PreTrainedModel, layout: BlockLayout, *, revision: str, name: str
) -> Namespace:
    """Return the namespace of the model's KV.

    The weights are named by a digest of every byte of them as they are in memory, buffers
    included; a given `revision` replaces that by samples, for models too large to read at start.
    With a `name` the namespace is the one of every engine of that name and revision, which the
    model's files tell unless it is given; raises ConfigError if they cannot, or if what lies in
    memory is not what they say.
    """
    if name:
        refuse_other_weights(model, samples_only=bool(revision))
        return engine_namespace(_identity(model, name, revision), layout)
    if revision:
        weights = f"{revision}:{_sample_digest(_samples(model)).hex()}"
    else:
        weights = f"memory:{_memory_digest(model)}"
    return Namespace(
        model=type(model).__name__,
        weights=weights,
        numerics=numerics_digest(_numerics(model)),
        kv_dtype=layout.dtype,
        geometry=layout.geometry,
        block_tokens=layout.block_tokens,
    )


def _identity(model: PreTrainedModel, name: str, revision: str) -> ModelIdentity:
    """Return what vLLM and SGLang say of the same model, and what may differ here."""
    config_object, config = model.config, model.config.to_dict()
    attention = str(config_object._attn_implementation)  # noqa: SLF001
    odd = any(disputed(config))
    experts = any("experts" in key for key in config)
    files = str(config_object._name_or_path)  # noqa: SLF001
    return ModelIdentity(
        engine="transformers",
        model=name,
        weights=revision or weights_revision(files, None, config_object, setting="for_model"),
        config=config,
        dtype=str(model.dtype).removeprefix("torch."),
        own={
            "attention": attention if odd or attention not in _PLAIN_ATTENTION else None,
            "experts": getattr(config_object, "_experts_implementation", None) if experts else None,
        },
    )


class ModelWatch:
    """Notices changes of a model that would make it compute other numbers than those kept.

    It compares configuration, hooks, the place and version of each weight, and 256 samples of
    each: a weight may be changed behind its version counter (`weight.data += delta`). What it
    cannot see is such a change of elements that are not among the samples.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Remember the model as it is now."""
        self._model = model
        self._places = _places(model)
        self._samples = _samples(model)
        self._digest = _sample_digest(self._samples)
        self._numerics = numerics_digest(_numerics(model))
        self._hooks = foreign_hooks(model)

    def changed(self) -> str:
        """Return what has changed, empty if nothing has."""
        if self._model.training:
            return "training mode"
        if foreign_hooks(self._model) != self._hooks:
            return "hooks"
        # The samples are views: they are right only while the weights lie where they lay.
        if _places(self._model) != self._places or _sample_digest(self._samples) != self._digest:
            return "weights"
        if numerics_digest(_numerics(self._model)) != self._numerics:
            return "configuration"
        return ""


def _numerics(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    return {
        "config": plain_config(config.to_dict()),
        "dtype": str(model.dtype),
        # Not all of them compute the same function: some leave out a soft cap or a sink.
        "attention": str(config._attn_implementation),  # noqa: SLF001
        "experts": str(getattr(config, "_experts_implementation", None)),
        "device": model.device.type,
        # A release may correct how a model is computed.
        "transformers": transformers.__version__,
    }


def _tensors(model: PreTrainedModel) -> list[torch.Tensor]:
    return [each.detach() for each in chain(model.parameters(), model.buffers())]


def _places(model: PreTrainedModel) -> list[tuple[Any, ...]]:
    return [
        (each.data_ptr(), each._version, each.dtype, each.shape)  # noqa: SLF001
        for each in chain(model.parameters(), model.buffers())
    ]


def _samples(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return evenly spaced elements of each weight, as views of it where it is contiguous."""
    flat = [each.reshape(-1) for each in _tensors(model) if each.numel()]
    return [each[:: max(1, len(each) // _SAMPLES)] for each in flat]


def _sample_digest(samples: list[torch.Tensor]) -> bytes:
    digest = sha256()
    kinds: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for each in samples:
        kinds.setdefault((each.dtype, each.device), []).append(each)
    for alike in kinds.values():  # one copy from the device for all of them
        digest.update(_bytes(torch.cat(alike)))
    return digest.digest()


def _memory_digest(model: PreTrainedModel) -> str:
    digest = blake3(max_threads=blake3.AUTO)
    named = chain(model.named_parameters(), model.named_buffers())
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().reshape(-1).cpu().contiguous()
    return memoryview(flat.view(torch.uint8).numpy())
