"""Loads within the step that uses them; the scheduler half's part of `loading: layerwise`.

vLLM takes the pages of such a load for computed as soon as it has allocated them: it puts them, and
those that the step computes behind them, into its prefix cache before anything has arrived. So

* no other request may find them in the same call of its scheduler: it is told to ask again;
* if the load fails they are taken out of the prefix cache before the next call. vLLM leaves them
  there, to be computed again by their request, which may be aborted or preempted before it does;
* and what the step has saved for that request is not kept.

This holds where one step's report comes before the next step is scheduled; other ways to run are
refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvstrata.connectors.vllm.metadata import StepReport
from kvstrata.connectors.vllm.settings import ConnectorSettings
from kvstrata.core.errors import ConfigError
from kvstrata.layout import GroupedCache

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

__all__ = ["SameStepLoads", "refuse_layerwise"]


class SameStepLoads:
    """Owner: the engine core's thread."""

    def __init__(self, page_tokens: int, *, wanted: bool) -> None:
        """Unless `wanted`, every load is asynchronous."""
        self._page_tokens = page_tokens
        self._wanted = wanted
        self._proven = False  # the engine's pass asks for every layer
        self._promised: set[bytes] = set()  # vLLM's names of the first page of each load
        self.manager: Any = None
        """vLLM's KV cache manager, once it is bound."""

    def proved(self, report: StepReport) -> None:
        """Learn whether the worker's pass asks for every layer."""
        self._proven |= report.asks_layers

    def limit(self, request: Request, local_tokens: int, tokens: int) -> int:
        """Return how many of the `tokens` behind `local_tokens` the step can load, 0 if it cannot.

        One token is left to compute, as vLLM wants of such a load.
        """
        # With an adapter or a medium more than tokens decides; those loads wait for the worker.
        special = request.lora_request or request.mm_features
        if not self._wanted or not self._proven or self.manager is None or special:
            return 0
        last: int = (request.num_tokens - 1) // self._page_tokens * self._page_tokens
        return min(tokens, max(0, last - local_tokens))

    def shares(self, request: Request, local_tokens: int) -> bool:
        """Return whether vLLM's own hit for `request` has pages that this step is yet to load."""
        found = request.block_hashes[: local_tokens // self._page_tokens] if self._promised else []
        return not self._promised.isdisjoint(found)

    def promise(self, request: Request, tokens: range) -> None:
        """The step will fill the pages of `tokens`; vLLM finds them from now on."""
        self._promised.add(request.block_hashes[tokens.start // self._page_tokens])

    def scheduled(self) -> None:
        """The step's requests are chosen: whoever comes next comes behind its report."""
        self._promised.clear()

    def failed(self, request: Request, good_tokens: int, name: str, report: StepReport) -> None:
        """Take out of vLLM's cache, and of the saved, what was computed on pages that are not good.

        `good_tokens` of the request's first tokens are right.
        """
        (table,) = self.manager.get_block_ids(request.request_id)
        self.manager.evict_blocks(set(table[good_tokens // self._page_tokens :]))
        report.unsaved += [job for job in report.saved if job.name == name]
        report.saved = [job for job in report.saved if job.name != name]


def refuse_layerwise(
    settings: ConnectorSettings,
    config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    cache: GroupedCache,
    *,
    alone: bool,
) -> None:
    """Raise ConfigError if a layer-wise setting is used with an engine that was not proven.

    `alone` says that no other connector runs beside us.
    """
    wanted = {"loading": settings.loading, "saving": settings.saving}
    named = [name for name, value in wanted.items() if value == "layerwise"]
    if not named:
        return
    parallel = config.parallel_config
    kinds = {type(group.kv_cache_spec).__name__ for group in kv_cache_config.kv_cache_groups}
    odd = {
        "several cache groups or a sliding window": not cache.is_whole,
        "a cache other than full attention": kinds != {"FullAttentionSpec"},
        "several workers": parallel.world_size != 1,
        "data parallelism": parallel.data_parallel_size != 1,
        "micro-batches": parallel.use_ubatching,
        "another connector beside it": not alone,
        "speculative decoding": config.speculative_config is not None,
        "asynchronous scheduling": config.max_concurrent_batches != 1,
        "vLLM's second model runner": config.use_v2_model_runner,
        # A failed load is computed on what lies in its pages. Its own answer is dropped, but
        # activations that are scaled over the whole batch would carry it into others.
        "quantised weights": settings.loading == "layerwise"
        and config.model_config.quantization is not None,
    }
    found = [reason for reason, true in odd.items() if true]
    if found:
        raise ConfigError(
            f"{named[0]}: layerwise is not proven with {found[0]}",
            hint=f"leave {' and '.join(named)} out: blocks are then moved between steps",
        )
