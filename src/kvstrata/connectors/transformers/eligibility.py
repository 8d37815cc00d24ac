"""Which models are served, and which calls of `generate`; the rest goes by without the cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
import transformers
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvstrata.connectors.identity import FIXED_ROPES, rope_types
from kvstrata.connectors.versions import refuse_untested
from kvstrata.core.errors import LayoutError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

__all__ = ["CACHE_WORDS", "cache_word", "foreign_hooks", "refuse_model", "unserved"]

CACHE_WORDS: Final = ("cache", "past_key_values")
"""What models call the argument that their cache comes in: the first from transformers 5.24 on,
where the second is deprecated."""

_OWN_WORDS: Final = ("assistant_model", "custom_generate", "inputs_embeds", *CACHE_WORDS)
"""Arguments of `generate` that are a cache, a loop or an input of the caller's own."""

_OTHER_WAYS: Final = (
    "assistant_early_exit", "cache_implementation", "output_attentions", "output_hidden_states",
    "prefill_chunk_size", "prompt_lookup_num_tokens", "token_healing", "use_mtp",
)  # fmt: skip
"""Settings of generation under which the prompt is not simply computed from its first token."""


def refuse_model(model: PreTrainedModel) -> None:
    """Raise LayoutError unless the model's KV is known to depend on tokens and weights only."""
    refuse_untested("transformers", transformers.__version__)
    _refuse_wrapper(model)
    plain = "use transformers without this cache"
    objections = [(holds, reason, plain) for holds, reason in _kind_objections(model)]
    for holds, reason, hint in objections + _state_objections(model):
        if holds:
            raise LayoutError(f"{type(model).__name__}: {reason}", hint=hint)


def cache_word(model: PreTrainedModel) -> str:
    """Return what this model calls the argument that its cache comes in."""
    parameters = inspect.signature(model.forward).parameters
    return next((word for word in CACHE_WORDS if word in parameters), CACHE_WORDS[-1])


def foreign_hooks(model: PreTrainedModel) -> list[Any]:
    """Return the hooks in the model that may change its numbers: not transformers' and not ours."""
    return [
        hook
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)  # noqa: SLF001
        for hook in hooks.values()
        if not getattr(hook, "__module__", "").startswith(("transformers.", "kvstrata."))
    ]


def unserved(model: PreTrainedModel, ids: Any, options: Mapping[str, Any]) -> str:
    """Return why this call of `generate` goes by without the cache, empty if it does not."""
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or not ids.numel():  # noqa: PLR2004
        return "input_ids"
    given = [name for name in _OWN_WORDS if options.get(name) is not None]
    if given:
        return given[0]
    config, _ = model._prepare_generation_config(  # noqa: SLF001  # how generate itself does it
        options.get("generation_config"),
        **{name: value for name, value in options.items() if name != "generation_config"},
    )
    if str(config.get_generation_mode().value) not in {"greedy_search", "sample"}:
        return str(config.get_generation_mode().value)
    if (config.num_return_sequences or 1) != 1:
        return "num_return_sequences"
    if config.use_cache is False:
        return "use_cache"
    given = [name for name in _OTHER_WAYS if getattr(config, name, None)]
    return given[0] if given else _padding(config, ids, options.get("attention_mask"))


def _padding(config: GenerationConfig, ids: torch.Tensor, mask: Any) -> str:
    if mask is None:  # generate masks the pad tokens itself then
        pad = config.pad_token_id
        return "padding" if pad is not None and bool((ids == pad).any()) else ""
    whole = isinstance(mask, torch.Tensor) and mask.shape == ids.shape and bool((mask == 1).all())
    return "" if whole else "padding"


def _refuse_wrapper(model: PreTrainedModel) -> None:
    if not isinstance(model, transformers.PreTrainedModel):
        raise LayoutError(
            f"{type(model).__name__} is not a model of transformers itself",
            hint="give the model, not what wraps it",
        )


def _kind_objections(model: PreTrainedModel) -> list[tuple[bool, str]]:
    """Return what there may be against this kind of model, and whether there is."""
    config = model.config
    text = config.get_text_config(decoder=True)
    kinds = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer}
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    odd = sorted(set(rope_types(getattr(config, "rope_parameters", None))) - FIXED_ROPES)
    return [
        (not model.can_generate() or config.is_encoder_decoder, "not a decoder that generates"),
        (text is not config, "takes more than text"),
        (getattr(model, "hf_quantizer", None) is not None, "its weights are quantised"),
        (getattr(model, "_is_stateful", False), "keeps a state besides keys and values"),
        (
            getattr(config, "kv_lora_rank", None) is not None,
            "multi-head latent attention is not supported yet",
        ),
        (bool(kinds), f"its cache has layers of {names}, not of full attention only"),
        (bool(odd), f"rope type {odd[:1]}: its keys depend on the length of the text"),
    ]


def _state_objections(model: PreTrainedModel) -> list[tuple[bool, str, str]]:
    """Return what there may be against the state that the model is in, and what to do."""
    adapted = getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config")
    weights = list(model.parameters())
    return [
        (adapted, "adapters are loaded", "merge them (merge_and_unload) before for_model"),
        (
            any(each.is_meta for each in weights),
            "some of its weights are not in memory",
            "load it without offloading",
        ),
        (
            any(each.is_inference() for each in weights),
            "its weights do not tell when they change",
            "load it outside of inference_mode",
        ),
        (
            bool(foreign_hooks(model)),
            "it has forward hooks, which may change its numbers",
            "remove them before for_model",
        ),
        (model.training, "it is in training mode", "call model.eval() before for_model"),
    ]
