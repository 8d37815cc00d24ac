"""Loads within the step that uses them; the scheduler half for `loading: layerwise`.

vLLM takes the pages of such a load for computed as soon as it has allocated them: it puts them, and
those that the step computes behind them, into its prefix cache before anything has arrived. So

* no other request may find them in the same call of its scheduler: it is told to ask again;
* if the load fails they are taken out of the prefix cache before the next call. vLLM leaves them
  there, to be computed again by their request, which may be aborted or preempted before it does,
  or is gone already: vLLM takes aborts between a pass and its report;
* and what the step has saved for that request is not kept.

This holds where one step's report comes before the next step is scheduled; other ways to run are
refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvstrata.connectors.vllm.metadata import StepPlan, StepReport
from kvstrata.connectors.vllm.metrics import split_by_tier
from kvstrata.connectors.vllm.releases import is_newest
from kvstrata.connectors.vllm.scheduler import SchedulerHalf
from kvstrata.connectors.vllm.settings import ConnectorSettings
from kvstrata.core.errors import ConfigError
from kvstrata.layout import BlockLayout, GroupedCache
from kvstrata.runtime.session import Session

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

__all__ = ["SameStepScheduler", "refuse_layerwise"]


class SameStepScheduler(SchedulerHalf):
    """Owner: the engine core's thread."""

    def __init__(
        self,
        session: Session,
        cache: GroupedCache,
        layout: BlockLayout,
        *,
        enabled: bool,
        tenant: str = "",
    ) -> None:
        """Serve an engine as SchedulerHalf does; loads may be within the step that uses them."""
        super().__init__(session, cache, layout, enabled=enabled, tenant=tenant)
        self._proven = False  # the engine's pass asks for every layer
        self._within: set[str] = set()  # requests whose last match is loaded within the step
        self._tables: dict[str, list[int]] = {}  # all pages of each such load's request
        self._promised: set[bytes] = set()  # vLLM's names of the first page of each load
        self.manager: Any = None
        """vLLM's KV cache manager, once it is bound."""

    def matched_tokens(self, request: Request, local_tokens: int) -> int | None:
        """Return how many tokens behind `local_tokens` can be loaded, None to be asked again."""
        self._within.discard(request.request_id)
        if self._shares(request, local_tokens):
            return None
        tokens = super().matched_tokens(request, local_tokens)
        within = self._limit(request, local_tokens, tokens) if tokens else 0
        if not within:
            return tokens
        self._within.add(request.request_id)
        return within

    def loads_in_step(self, request: Request) -> bool:
        """Return whether what was matched last for a request is loaded in the step that uses it."""
        return request.request_id in self._within

    def allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        """Plan the load of the `external_tokens` that vLLM made room for."""
        super().allocated(request, blocks, external_tokens)
        if external_tokens and request.request_id in self._within:
            self._loads[-1] = replace(self._loads[-1], same_step=True)
            first = self._requests[request.request_id].local_tokens // self._page_tokens
            self._promised.add(request.block_hashes[first])  # vLLM finds it from now on
            (self._tables[request.request_id],) = blocks.get_block_ids()

    def build_plan(self, output: SchedulerOutput) -> StepPlan:
        """Return the step's plan; whoever is scheduled next comes behind its report."""
        self._promised.clear()
        return super().build_plan(output)

    def take_report(self, report: StepReport, *, tainted: bool = False) -> None:
        """Tell the daemon what the worker did, without what a failed load has spoiled."""
        self._proven |= report.asks_layers
        for request_id, good_pages in report.loaded.items():
            self._settle(request_id, good_pages, report)
        super().take_report(report, tainted=tainted)

    def finished(self, request: Request) -> dict[str, Any] | None:
        """Forget a request; return where its tokens came from, for vLLM to pass to the caller."""
        tracked = self._requests.get(request.request_id)
        told = super().finished(request)
        within = self.loads_in_step(request)
        self._within.discard(request.request_id)
        if told and tracked and tracked.loading and within:
            # Its first step was its last, so the load was good; the report of it comes later.
            tokens_from = told["kvstrata"]["tokens_from"]
            for tier, tokens in split_by_tier(tracked.load_tokens, tracked.staged).items():
                tokens_from[tier] = tokens_from.get(tier, 0) + tokens
        return told

    # -- private -------------------------------------------------------------------------------

    def _limit(self, request: Request, local_tokens: int, tokens: int) -> int:
        """Return how many of the `tokens` behind `local_tokens` the step can load, 0 if it cannot.

        One token is left to compute, as vLLM wants of such a load.
        """
        welcome = self.session.welcome
        bridged = welcome is None or welcome.layout != self.session.layout
        # Whether an adapter's weights are those that the blocks were named by, the worker says.
        if not self._proven or self.manager is None or bridged or request.lora_request:
            return 0
        last: int = (request.num_tokens - 1) // self._page_tokens * self._page_tokens
        return min(tokens, max(0, last - local_tokens))

    def _shares(self, request: Request, local_tokens: int) -> bool:
        """Return whether vLLM's own hit for `request` has pages that this step is yet to load."""
        found = request.block_hashes[: local_tokens // self._page_tokens] if self._promised else []
        return not self._promised.isdisjoint(found)

    def _settle(self, request_id: str, good_pages: int, report: StepReport) -> None:
        """Keep nothing, here or in vLLM's cache, that was computed on a load that failed."""
        table, tracked = self._tables.pop(request_id, None), self._requests.get(request_id)
        if table is None or tracked is None or good_pages >= tracked.promised_pages:
            return
        good = tracked.local_tokens + good_pages * self._page_tokens
        # As it was planned: vLLM no longer has the table of a request that was aborted meanwhile.
        self.manager.evict_blocks(set(table[good // self._page_tokens :]))
        report.unsaved += [job for job in report.saved if job.name == tracked.name]
        report.saved = [job for job in report.saved if job.name != tracked.name]
        tracked.saved_blocks = min(tracked.saved_blocks, good // self._block_tokens)


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
        "this release of vLLM": not is_newest(),
        "a device that is not the CPU": config.device_config.device_type != "cpu",
        "several cache groups or a sliding window": not cache.is_whole,
        "a cache other than full attention": kinds != {"FullAttentionSpec"},
        "images": config.model_config.is_multimodal_model,
        "a quantised cache": str(config.cache_config.cache_dtype).startswith("fp8"),
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
