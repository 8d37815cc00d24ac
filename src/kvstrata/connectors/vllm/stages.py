"""Engines whose workers split the layers (pipeline parallel): which worker holds which of them.

A block has all of the model's layers in their order, so each stage writes its own run of it, and
the bytes are the same however the layers are split. vLLM tells the scheduler half the layers of the
first stage only; the rest follows from vLLM's own rule, and each worker checks that it has its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from kvstrata.core.errors import LayoutError
from kvstrata.layout import GroupedCache

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["check_stage", "refuse_beside", "staged_cache"]

_HINT: Final = (
    "set pipeline_parallel_size to 1, use tensor_parallel_size, or run without the connector"
)


def staged_cache(config: VllmConfig, first: GroupedCache) -> GroupedCache:
    """Return the cache of all stages; `first` is that of any one of them.

    Raises LayoutError for whatever was not proven with stages.
    """
    size = config.parallel_config.pipeline_parallel_size
    if size == 1:
        return first
    _refuse_odd(config, first)
    from vllm.distributed.utils import get_pp_indices

    layers = config.model_config.get_total_num_hidden_layers()
    stages = tuple(range(*get_pp_indices(layers, stage, size)) for stage in range(size))
    (group,) = first.groups
    whole = replace(group, cache=replace(group.cache, layers=layers), places=tuple(range(layers)))
    return GroupedCache((whole,), stages)


def check_stage(cache: GroupedCache, stage: int, names: Iterable[str]) -> range:
    """Return which of the model's layers this stage holds.

    Raises LayoutError unless the names, such as `model.layers.3.self_attn.attn`, are theirs.
    """
    held = cache.held_by(stage)
    if not cache.stages:
        return held
    numbers = sorted([int(number) for number in re.findall(r"\d+", name)] for name in names)
    if numbers != [[layer] for layer in held]:
        raise LayoutError(
            f"stage {stage} of {len(cache.stages)} holds other layers than {list(held)}",
            hint="this engine is unknown to kvstrata; run without the connector",
        )
    return held


def refuse_beside(cache: GroupedCache, *, alone: bool) -> None:
    """Raise LayoutError for pipeline stages where another connector runs beside us."""
    if cache.stages and not alone:
        raise LayoutError(
            f"pipeline_parallel_size is {len(cache.stages)}, with another connector; that was not "
            "tested",
            hint=_HINT,
        )


def _refuse_odd(config: VllmConfig, first: GroupedCache) -> None:
    odd = {
        "several cache groups or a window": not first.is_whole,
        "latents (MLA)": first.groups[0].cache.packing.startswith("latent"),
        "LoRA": config.lora_config is not None,
        "media": config.model_config.is_multimodal_model,
        "speculative decoding": config.speculative_config is not None,
    }
    found = [name for name, value in odd.items() if value]
    if found:
        size = config.parallel_config.pipeline_parallel_size
        raise LayoutError(
            f"pipeline_parallel_size is {size}, with {', '.join(found)}; that was not tested",
            hint=_HINT,
        )
