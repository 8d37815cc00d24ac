"""The class that SGLang loads with `--unified-cache-external-linker-backend dynamic`.

SGLang owns the device and nothing below: no host pool lies between its pages and our tiers. A
request is told of a page only if it lies in the host tier, verified, and is held there until it was
copied; any doubt before the copy is a miss. SGLang has a word for a load that fails later on (it
aborts the requests), so a slot that changed under a copy is never served.

All methods but the threads of `layerwise` run on SGLang's scheduler thread. With tensor parallelism
every rank has a linker, and SGLang makes the same calls in the same order on each: what one rank
answers to `load` and `offload` all must.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    LayerWiseLoadCounter,
    UnifiedCacheLinker,
)

from kvstrata.connectors.sglang.canary import fly_canary
from kvstrata.connectors.sglang.device import check_linkable, device_geometry, device_pages
from kvstrata.connectors.sglang.engine import (
    check_model,
    check_version,
    model_config,
    server_arguments,
)
from kvstrata.connectors.sglang.hostpages import Bytes, page_numbers
from kvstrata.connectors.sglang.identity import sglang_namespace
from kvstrata.connectors.sglang.kept import KeptPages
from kvstrata.connectors.sglang.keys import page_digests
from kvstrata.connectors.sglang.layerwise import LayerLoads, NodeSave, NodeSaves
from kvstrata.connectors.sglang.leases import Leases
from kvstrata.connectors.sglang.queued import QueuedLoads
from kvstrata.connectors.sglang.ranks import ranks_of
from kvstrata.connectors.sglang.settings import LINKER_OPTION, read_settings
from kvstrata.connectors.sglang.weights import WeightWatch
from kvstrata.core.errors import ConfigError
from kvstrata.core.ids import LineageDigest
from kvstrata.runtime.session import Session

__all__ = ["KvstrataLinker"]

log = logging.getLogger("kvstrata.sglang")


class KvstrataLinker(UnifiedCacheLinker):  # type: ignore[misc]  # SGLang is untyped here
    """Keeps an SGLang engine's pages in kvstrata's tiers, straight from its device."""

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: Sequence[Any],
        extra_config: Mapping[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        """Check the engine, reach the daemon, and try it with a page of ours.

        Raises ConfigError for settings, pools and engines that it does not know, DaemonError as
        `Session.open`; SGLang does not start then.
        """
        check_version()
        self.forward_stream = forward_stream
        check_linkable(server_args, params, components)
        ranks = ranks_of(server_args, params)
        settings = read_settings(extra_config, LINKER_OPTION)
        arguments = server_arguments()
        check_model(arguments)
        self._weights = WeightWatch(settings.weights_revision, str(arguments["model_path"]))
        self._refused = False
        self._page_tokens = int(params.page_size)
        pool = params.token_to_kv_pool_allocator.get_kvcache()
        geometry = device_geometry(pool, self._page_tokens)
        self._pages = device_pages(pool, geometry)
        # SGLang looks up only which pools there are: tree components without one are left out.
        self.pools = {PoolName.KV: pool}
        layout = geometry.block_layout(ranks.shard)
        namespace = sglang_namespace(
            arguments,
            layout,
            model_config(arguments),
            revision=settings.weights_revision,
            name=settings.model_name,
        )
        where = settings.where(ranks.shard, replicated=False)
        session = Session(where, layout, namespace, settings.session_limits, bridges=True)
        self._kept = KeptPages(
            session, batch_timeout_s=settings.batch_timeout_s, tenant=settings.tenant
        )
        self._kept.open()
        try:
            self._fly_canary(params.token_to_kv_pool_allocator, pool, layout.block_bytes)
        except BaseException:
            self._kept.close()
            raise
        self._leases = Leases(self._kept.turns, wait_s=settings.call_timeout_s)
        self.layer_done_counter = LayerWiseLoadCounter(self._pages.layers)
        self._queued = QueuedLoads(self._leases, ranks.all_can)
        self._loads = LayerLoads(self._leases, self._pages, self.layer_done_counter)
        self._saves = NodeSaves(self._kept, self._pages, self._usable)
        self._closed = False
        log.info("kvstrata links pages of %s to %s", layout.describe(), self._kept.daemon_address)

    # -- loading -------------------------------------------------------------------------------

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Return every number of leading pages that can be loaded now: all that the host has."""
        transfer = self._only_kv(transfers)
        if transfer is None or not self._usable():
            return []
        return list(range(1, self._leases.ready(rid, page_digests(transfer.keys or [])) + 1))

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Lease pages for the batch being built; False, on every rank, has SGLang compute them."""
        return self._queued.add(rid, self._named(transfers) if self._usable() else None)

    def start_layer_wise_loading(self) -> int:
        """Begin the queued loads; return the index that the forward pass waits under, or -1."""
        if not (batch := self._queued.take()):
            return -1
        index = int(self.layer_done_counter.update_producer())
        self._loads.begin(index, batch)
        return index

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Wait until the batch is loaded; False if it failed, and SGLang aborts its requests."""
        return bool(self.layer_done_counter.finish(counter_index))

    def cancel_queued_load(self, rid: str) -> bool:
        """Give up a load that has not begun; False if there is none."""
        return self._queued.cancel(rid)

    # -- saving --------------------------------------------------------------------------------

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Save a node's pages behind the forward pass; what cannot be saved fails in its turn."""
        del session_id
        found = self._named(transfers) if self._usable() else None
        self._saves.begin(NodeSave(*found, self.record_offload_ready()) if found else None)
        return True

    def num_completed_offloads(self) -> int:
        """Return how many saves have ended and were not popped."""
        return self._saves.ended()

    def pop_completed_offload(self) -> bool:
        """Return whether the oldest ended save has kept every page."""
        return self._saves.pop()

    # -- the rest ------------------------------------------------------------------------------

    def reset(self) -> None:
        """Touch no page of the device any more; what the tiers keep stays."""
        self._queued.forget()
        self._loads.settle()
        self._saves.settle()
        self._leases.end_all()
        self.layer_done_counter.reset()

    def close(self) -> None:
        """Leave the daemon, or end it if it is ours; twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self.reset()
        self._loads.close()
        self._saves.close()
        log.info("kvstrata's linker is closed: %s", self.statistics())
        self._kept.close()

    def statistics(self) -> dict[str, int]:
        """Return what happened since the start, by name."""
        saved = self._kept.statistics()
        names = ("saved", "unsaved", "late", "late_turns", "owed_dropped")
        own = {
            "loaded": self._loads.loaded,
            "torn": self._loads.torn,
            "dropped": self._saves.dropped,
        }
        return self._leases.statistics() | own | {name: saved[name] for name in names}

    # -- private -------------------------------------------------------------------------------

    def _usable(self) -> bool:
        """Return whether the weights are those of the start; say once if they are not."""
        if not self._weights.changed:
            return True
        if not self._refused:
            self._refused = True
            log.warning(
                "the engine's weights were updated: kvstrata is idle, since what it keeps belongs "
                "to the old ones; start the engine anew to use it again"
            )
        return False

    def _only_kv(self, transfers: Sequence[PoolTransfer]) -> PoolTransfer | None:
        """Return the transfer of the KV's pool; None if there is another: it would be missing."""
        if len(transfers) != 1 or transfers[0].name != PoolName.KV:
            return None
        return transfers[0]

    def _named(
        self, transfers: Sequence[PoolTransfer]
    ) -> tuple[list[LineageDigest], list[int]] | None:
        """Return the digest and the page of each key; None, and say why, if they do not fit."""
        transfer = self._only_kv(transfers)
        if transfer is None:
            return None
        keys = transfer.keys or []
        digests = page_digests(keys)
        if not keys or len(digests) != len(keys) or transfer.device_indices is None:
            return None
        try:
            indices = transfer.device_indices.detach().cpu()
            pages = page_numbers(indices, self._page_tokens, self._pages.count)
        except ConfigError as error:
            log.warning("kvstrata refuses pages: %s", error)
            return None
        if len(pages) != len(keys) or len(set(pages)) != len(pages):
            log.warning("kvstrata refuses %d pages for %d keys", len(pages), len(keys))
            return None
        return digests, pages

    def _fly_canary(self, allocator: Any, pool: Any, block_bytes: int) -> None:
        scratch = allocator.alloc(self._page_tokens)
        if scratch is None:
            log.warning("kvstrata's canary was not sent: SGLang's device pool is full")
            return
        (page,) = page_numbers(scratch.cpu(), self._page_tokens, self._pages.count)

        def engine(number: int) -> Bytes:
            rows = slice(number * self._page_tokens, (number + 1) * self._page_tokens)
            parts = [each[rows].reshape(-1) for each in (*pool.k_buffer, *pool.v_buffer)]
            flat: Bytes = torch.cat(parts).view(torch.uint8).numpy()
            return flat

        began = time.perf_counter()
        try:
            fly_canary(self._kept, self._pages, page, block_bytes, engine)
        finally:
            self._pages.write(page, np.zeros(block_bytes, np.uint8))
            allocator.free(scratch)
        log.info("kvstrata's canary took %.3f s", time.perf_counter() - began)
