"""The class that vLLM loads: one instance in the scheduler, one in the worker.

vLLM calls the methods in the order written down in its `kv_connector/v1/base.py`; what each half
does with them is in `scheduler.py` and `worker.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from kvstrata.connectors.vllm.adapters import LoadedAdapters
from kvstrata.connectors.vllm.deviceworker import worker_half
from kvstrata.connectors.vllm.geometry import engine_cache
from kvstrata.connectors.vllm.identity import vllm_namespace
from kvstrata.connectors.vllm.layerworker import LayerwiseWorker
from kvstrata.connectors.vllm.metadata import StepPlan, StepReport, WorkerProcess
from kvstrata.connectors.vllm.metrics import ConnectorMetrics, ConnectorStats
from kvstrata.connectors.vllm.releases import hit_sources, tier_events
from kvstrata.connectors.vllm.runner import calling_connector, calling_runner, pages_are_free
from kvstrata.connectors.vllm.samestep import SameStepScheduler, refuse_layerwise
from kvstrata.connectors.vllm.scheduler import SchedulerHalf
from kvstrata.connectors.vllm.settings import read_settings
from kvstrata.connectors.vllm.stages import refuse_beside
from kvstrata.connectors.vllm.weights import WeightsWatch
from kvstrata.connectors.vllm.worker import WorkerHalf
from kvstrata.core.errors import ConfigError
from kvstrata.runtime.session import Session

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

__all__ = ["KvstrataConnector"]

log = logging.getLogger("kvstrata.vllm")


class KvstrataConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]  # vLLM is untyped
    """Serves a vLLM engine from KV blocks kept in kvstrata's tiers.

    Raises ConfigError at start for settings, layouts and engines that it does not know.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        """Check everything that can be checked; the scheduler half reaches its daemon."""
        super().__init__(vllm_config, role, kv_cache_config)
        self._parent = calling_connector(self)
        self._refuse_twin()
        settings = read_settings(self._kv_transfer_config.kv_connector_extra_config)
        cache = engine_cache(vllm_config, kv_cache_config)
        layout = cache.block_layout(settings.block_tokens_for(cache.page_tokens))
        refuse_beside(cache, alone=self._parent is None)
        refuse_layerwise(settings, vllm_config, kv_cache_config, cache, alone=self._parent is None)
        self._scheduler: SchedulerHalf | None = None
        self._same_step: SameStepScheduler | None = None  # the scheduler half, if it is one
        self._worker: WorkerHalf | None = None
        self._layers: LayerwiseWorker | None = None  # the worker half, if it is one
        if role == KVConnectorRole.WORKER:
            if settings.layerwise:
                self._layers = LayerwiseWorker(cache, layout, settings)
            kind = str(vllm_config.device_config.device_type)
            self._worker = self._layers or worker_half(
                cache, layout, settings, kind, alone=self._parent is None
            )
            return
        self._recompute_failed_loads()
        namespace = vllm_namespace(
            vllm_config, layout, revision=settings.weights_revision, name=settings.model_name
        )
        session = Session(
            settings.where, layout, namespace, settings.session_limits, bridges=cache.can_bridge
        )
        session.open()
        same_step = settings.loading == "layerwise"
        self._scheduler = (SameStepScheduler if same_step else SchedulerHalf)(
            session,
            cache,
            layout,
            enabled=bool(vllm_config.cache_config.enable_prefix_caching),
            tenant=settings.tenant,
        )
        published = vllm_config.kv_events_config
        if published and published.enable_kv_cache_events:
            self._scheduler.events = tier_events(
                vllm_config, kv_cache_config, cache, layout, self._scheduler.stats, session
            )
        if isinstance(self._scheduler, SameStepScheduler):
            self._same_step = self._scheduler
        if not vllm_config.cache_config.enable_prefix_caching:
            log.warning(
                "kvstrata is idle: vLLM runs without prefix caching, so it cannot use kept blocks"
            )

    def _refuse_twin(self) -> None:
        """Two of us would answer under the same key, at which vLLM's MultiConnector ends."""
        siblings = getattr(self._parent, "sub_connectors", [])
        if any(isinstance(each, KvstrataConnector) for each in siblings):
            raise ConfigError(
                "connectors: KvstrataConnector stands there twice",
                hint="name it once; one daemon serves as many tiers as you like",
            )

    def _recompute_failed_loads(self) -> None:
        """A cache may never fail a request: vLLM's default policy would."""
        asked = self if self._parent is None else self._parent
        transfer = asked._kv_transfer_config  # noqa: SLF001 - a child has a copy that nobody reads
        if transfer.kv_load_failure_policy != "recompute":
            transfer.kv_load_failure_policy = "recompute"
            log.info("kvstrata set kv_load_failure_policy to recompute")

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Ask for the layout that `layout.paged` describes, pages of a block apart or together.

        Raises ConfigError for settings that are wrong.
        """
        asked = vllm_config.kv_transfer_config
        settings = read_settings(asked.kv_connector_extra_config if asked else {})
        return "BLHNC" if settings.outermost == "blocks" else "LBHNC"

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Return whether hooks run between layers, which a graph of the whole pass would skip."""
        return "layerwise" in {extra_config.get("loading"), extra_config.get("saving")}

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a cache that loses blocks costs time, never an answer."""
        return False

    @property
    def daemon_pid(self) -> int:
        """The daemon's process, 0 while there is none (scheduler half)."""
        return self._scheduler.session.daemon_pid if self._scheduler else 0

    @property
    def daemon_address(self) -> str:
        """Where the daemon listens, empty while there is none (scheduler half)."""
        return self._scheduler.session.daemon_address if self._scheduler else ""

    # -- scheduler half ------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Take vLLM's cache manager, which can forget what a failed load has spoiled."""
        super().bind_kv_cache_manager(kv_cache_manager)
        if self._same_step:
            self._same_step.manager = kv_cache_manager

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return (tokens to load or None to be asked again, loaded between steps)."""
        assert self._scheduler is not None
        tokens = self._scheduler.matched_tokens(request, num_computed_tokens)
        within = self._same_step is not None and self._same_step.loads_in_step(request)
        return tokens, bool(tokens) and not within

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Plan the load into the blocks that vLLM has allocated."""
        assert self._scheduler is not None
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def get_external_cache_hit_sources(
        self, request: Request, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        """Split the loaded tokens by tier for vLLM's own metrics."""
        assert self._scheduler is not None
        return hit_sources(num_external_tokens, self._scheduler.staged_tokens(request))

    def take_events(self) -> Iterable[KVCacheEvent]:
        """Return events of blocks in our tiers, for vLLM to publish with its own."""
        if self._scheduler is None or self._scheduler.events is None:
            return ()
        return self._scheduler.events.take(self._scheduler.session)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Return the step's plan for the worker half."""
        assert self._scheduler is not None
        return self._scheduler.build_plan(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take the worker half's report."""
        assert self._scheduler is not None
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, StepReport):
            failed = connector_output.invalid_block_ids or set()
            # Another connector beside us may load while a step computes, and fail.
            self._scheduler.take_report(report, tainted=bool(failed - report.failed_pages))

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Let go of a request; its device blocks are free at once."""
        del block_ids
        assert self._scheduler is not None
        return False, self._scheduler.finished(request)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Let go of a request, as `request_finished`, whatever its groups."""
        del block_ids
        return self.request_finished(request, [])

    def reset_cache(self) -> bool | None:
        """Forget every kept block; None from the worker half, which has none.

        vLLM calls it even where it could not forget its own, because a request has some of them.
        """
        clean = pages_are_free(self._kv_cache_manager)
        return self._scheduler.clear(clean=clean) if self._scheduler else None

    # -- statistics: from the scheduler half, to wherever vLLM logs them and serves /metrics -------

    def get_kv_connector_stats(self) -> ConnectorStats | None:
        """Return what was counted since the last call; the worker half tells its own by report."""
        return self._scheduler.stats.take() if self._scheduler else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ConnectorStats:
        """Return counts that come from another process as what they were."""
        return ConnectorStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> ConnectorMetrics:
        """Register the metrics in the process that serves them."""
        return ConnectorMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # -- worker half ---------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Check and take the engine's caches; raises LayoutError for unknown ones."""
        assert self._worker is not None
        names = [group.layer_names for group in self._kv_cache_config.kv_cache_groups]
        self._worker.register(
            kv_caches, names, get_tensor_model_parallel_rank(), get_pp_group().rank_in_group
        )
        runner = calling_runner()
        self._worker.adapters = LoadedAdapters(runner)
        self._worker.weights = WeightsWatch(runner.get_model() if runner else None)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Carry out the step's loads, or begin those that the forward pass waits for by layer."""
        del forward_context, kwargs
        assert self._worker is not None
        self._worker.load(self._plan())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait for one layer of the step's own loads, if there are any (`loading: layerwise`)."""
        if self._layers:
            self._layers.wait_for(layer_name)

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Begin to save what the step has computed of one layer (`saving: layerwise`)."""
        del kv_layer, attn_metadata, kwargs
        if self._layers:
            self._layers.computed(self._plan(), layer_name)

    def wait_for_save(self) -> None:
        """Carry out the step's saves, before vLLM may give the pages to someone else."""
        assert self._worker is not None
        self._worker.save(self._plan())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return the requests whose load ended in this step; save, if that is not done yet."""
        del finished_req_ids
        assert self._worker is not None
        # With speculative decoding vLLM calls `wait_for_save` after it has taken the step's report:
        # what a request's last steps have saved would wait there for the next request.
        self._worker.save(self._plan())
        return None, self._worker.take_loaded() or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Return the requests whose load ended, and those of them that must compute everything."""
        assert self._worker is not None
        _, loaded = self.get_finished(finished_req_ids)
        return KVConnectorTransferResults(
            finished_recving=loaded or set(), failed_recving=self._worker.take_failed_requests()
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the pages that must be computed after all."""
        assert self._worker is not None
        return self._worker.take_failed_pages()

    def build_connector_worker_meta(self) -> StepReport | None:
        """Return the step's report for the scheduler half."""
        assert self._worker is not None
        return self._worker.take_report()

    def get_handshake_metadata(self) -> WorkerProcess:
        """Tell the scheduler half which process this worker is."""
        return WorkerProcess(os.getpid())

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """Take the workers' processes (scheduler half); nothing is saved before."""
        assert self._scheduler is not None
        # One of several connectors may be handed what another one's workers have told.
        pids = [each.pid for each in metadata.values() if isinstance(each, WorkerProcess)]
        if pids:
            self._scheduler.fence(pids)

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """Take the processes of the workers of all pipeline stages (scheduler half)."""
        self.set_xfer_handshake_metadata(dict(enumerate(metadata.values())))

    def shutdown(self) -> None:
        """Say goodbye to the daemon; a private one ends."""
        if self._scheduler:
            self._scheduler.session.close()
        if self._worker:
            self._worker.close()

    def _plan(self) -> StepPlan:
        plan = self._get_connector_metadata()
        assert isinstance(plan, StepPlan)
        return plan


# MultiConnector looks its children up by name when it puts statistics together in another process.
with contextlib.suppress(ValueError):  # somebody has registered it before
    KVConnectorFactory.register_connector(
        KvstrataConnector.__name__, "kvstrata.connectors.vllm", KvstrataConnector.__name__
    )
