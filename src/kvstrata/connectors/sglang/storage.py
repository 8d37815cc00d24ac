"""The class that SGLang loads with `--hicache-storage-backend dynamic`.

SGLang owns the device and its own host pool and asks us for pages below them, from four threads:
`batch_exists` when a request waits, `batch_get_v1` to fill host pages, `batch_set_v1` when it has
written a node to its host pool, `get_stats` in every turn of its scheduler. No call raises for
what the cache cannot do: it returns fewer pages, and SGLang computes the rest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.srt.observability.metrics_collector import StorageMetrics

from kvstrata.connectors.sglang.canary import fly_canary
from kvstrata.connectors.sglang.engine import (
    check_model,
    check_pool_name,
    check_version,
    host_pages,
    model_config,
    pool_geometry,
    server_arguments,
    shard_of,
)
from kvstrata.connectors.sglang.hostpages import Bytes, FlatPages, HostPages, page_numbers
from kvstrata.connectors.sglang.identity import sglang_namespace
from kvstrata.connectors.sglang.kept import KeptPages
from kvstrata.connectors.sglang.keys import page_digests
from kvstrata.connectors.sglang.settings import read_settings
from kvstrata.connectors.sglang.weights import WeightWatch
from kvstrata.core.errors import ConfigError, DaemonError
from kvstrata.core.ids import LineageDigest
from kvstrata.runtime.session import Session

__all__ = ["KvstrataStorage"]

log = logging.getLogger("kvstrata.sglang")

_PAGE_TOKENS_FEW: Final = 16


class KvstrataStorage(HiCacheStorage):  # type: ignore[misc]  # SGLang is untyped here
    """Keeps an SGLang engine's pages in kvstrata's tiers.

    Raises ConfigError at attach for settings, host pools and engines that it does not know.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Any = None) -> None:
        """Check what can be checked before there is a host pool."""
        del kwargs
        check_version()
        self._config = storage_config
        self._settings = read_settings(storage_config.extra_config)
        self._shard, self._replicated = shard_of(storage_config)
        self._arguments = server_arguments()
        check_model(self._arguments)
        self._weights = WeightWatch(
            self._settings.weights_revision, str(self._arguments["model_path"])
        )
        self._refused = False
        self._kept: KeptPages | None = None
        self._pages: HostPages | None = None
        self._page_tokens = 0
        self._block_bytes = 0
        self._metrics = StorageMetrics()

    # -- attach, detach ------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take SGLang's host pool, reach the daemon, and try both with a page of ours.

        Raises LayoutError for a pool that we do not know, ConfigError or DaemonError as
        `Session.open`; SGLang gives the attach up for either.
        """
        super().register_mem_pool_host(mem_pool_host)
        geometry = pool_geometry(mem_pool_host)
        pages = host_pages(mem_pool_host, geometry)
        layout = geometry.block_layout(self._shard)
        if geometry.page_tokens < _PAGE_TOKENS_FEW:
            log.warning(
                "page_size is %d: every page is a block of its own, which costs time for each "
                "(hint: set --page-size to %d or more)",
                geometry.page_tokens,
                _PAGE_TOKENS_FEW,
            )
        namespace = sglang_namespace(
            self._arguments,
            layout,
            model_config(self._arguments),
            revision=self._settings.weights_revision,
            name=self._settings.model_name,
            first_layer=int(mem_pool_host.start_layer) if self._shard.pipeline_size > 1 else None,
        )
        where = self._settings.where(self._shard, replicated=self._replicated)
        limits = self._settings.session_limits
        session = Session(where, layout, namespace, limits, bridges=True)
        kept = KeptPages(
            session,
            batch_timeout_s=self._settings.batch_timeout_s,
            tenant=self._settings.tenant,
        )
        kept.open()
        self._page_tokens, self._block_bytes = geometry.page_tokens, layout.block_bytes
        try:
            self._fly_canary(mem_pool_host, pages, kept)
        except BaseException:
            kept.close()
            raise
        self._kept, self._pages = kept, pages
        log.info("kvstrata keeps pages of %s at %s", layout.describe(), kept.daemon_address)
        if (held := kept.held_layout) not in {None, layout}:
            log.info("kvstrata re-arranges them: its daemon holds %s", held.describe())

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Refuse every pool but the KV's: a hit without the others' pages would be wrong."""
        try:
            check_pool_name(str(host_pool_name))
        except ConfigError:
            self.close()
            raise
        super().register_mem_host_pool_v2(host_pool, host_pool_name)

    def close(self) -> None:
        """Leave the daemon, or end it if it is ours; twice is harmless."""
        kept, self._kept = self._kept, None
        if kept:
            log.info("kvstrata is detached: %s", kept.statistics())
            kept.close()

    @property
    def daemon_pid(self) -> int:
        """The daemon's process, 0 while there is none."""
        return self._kept.daemon_pid if self._kept else 0

    @property
    def daemon_address(self) -> str:
        """Where the daemon listens, empty while there is none."""
        return self._kept.daemon_address if self._kept else ""

    def statistics(self) -> dict[str, int]:
        """Return what happened since the attach, by name; empty while detached."""
        return self._kept.statistics() if self._kept else {}

    # -- zero-copy -----------------------------------------------------------------------------

    def batch_exists(
        self, keys: Sequence[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        """Return how many leading pages can be loaded; those below the host are staged first."""
        del extra_info
        kept = self._usable()
        return kept.find(page_digests(keys)) if kept else 0

    def batch_get_v1(
        self,
        keys: Sequence[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Fill host pages; return of each whether it has its bytes."""
        del extra_info
        began = time.perf_counter()
        numbers = self._numbers(keys, host_indices)
        digests = page_digests(keys)
        loaded = 0
        kept = self._usable()
        if numbers is not None and kept and self._pages:
            loaded = kept.load(digests, self._pages, numbers[: len(digests)])
        self._note(self._metrics.prefetch_pgs, self._metrics.prefetch_bandwidth, loaded, began)
        return [place < loaded for place in range(len(keys))]

    def batch_set_v1(
        self,
        keys: Sequence[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Save host pages; return of each whether it is kept."""
        numbers = self._numbers(keys, host_indices)
        if numbers is None or self._pages is None:
            return [False] * len(keys)
        return self._save(keys, self._pages, numbers, extra_info)

    def batch_exists_v2(
        self,
        keys: Sequence[str],
        pool_transfers: Sequence[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """As `batch_exists`; with a pool besides the KV's nothing is found."""
        others = [str(each.name) for each in pool_transfers or () if str(each.name) != "kv"]
        pages = 0 if others else self.batch_exists(keys, extra_info)
        hits = {"kv": pages, **dict.fromkeys(others, 0)}
        return PoolTransferResult(pages, hits, list(range(1, pages + 1)))

    def batch_get_v2(
        self,
        transfers: Sequence[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        """As `batch_get_v1` for the KV's pool; no page of another one is ever loaded."""
        return {
            each.name: self.batch_get_v1(each.keys or [], each.host_indices, extra_info)
            if str(each.name) == "kv"
            else [False] * len(each.keys or [])
            for each in transfers
        }

    def batch_set_v2(
        self,
        transfers: Sequence[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        """As `batch_set_v1` for the KV's pool; no page of another one is ever saved."""
        return {
            each.name: self.batch_set_v1(each.keys or [], each.host_indices, extra_info)
            if str(each.name) == "kv"
            else [False] * len(each.keys or [])
            for each in transfers
        }

    # -- generic: one tensor a page, which SGLang copies once more -----------------------------

    def exists(self, key: str) -> bool:
        """Return whether one page can be loaded."""
        return self.batch_exists([key]) == 1

    def get(
        self, key: str, target_location: Any = None, target_sizes: Any = None
    ) -> torch.Tensor | None:
        """Return the page in `target_location`, a flat tensor, or None."""
        (page,) = self.batch_get([key], [target_location], target_sizes)
        return page

    def batch_get(
        self, keys: Sequence[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """Fill flat tensors, one a page; return those of the leading pages, None for the rest."""
        del target_sizes
        nothing: list[torch.Tensor | None] = [None] * len(keys)
        targets = _flat_bytes(target_locations, len(keys), self._block_bytes)
        kept = self._usable()
        if targets is None or kept is None:
            return nothing
        digests = page_digests(keys)
        loaded = kept.load(digests, FlatPages(targets), range(len(digests)))
        return [*target_locations[:loaded], *nothing[loaded:]]

    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        """Save one page, a flat tensor."""
        return self.batch_set([key], [value], target_location, target_sizes)

    def batch_set(
        self,
        keys: Sequence[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Save flat tensors, one a page; return whether all are kept."""
        del target_locations, target_sizes
        sources = _flat_bytes(values, len(keys), self._block_bytes)
        if sources is None:
            return False
        return all(self._save(keys, FlatPages(sources), range(len(keys)), None))

    # -- the rest ------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget every page of this model in every tier; raises DaemonError if it must wait.

        It is then made good before the daemon is asked for anything again.
        """
        if self._kept and not self._kept.clear():
            raise DaemonError("kvstrata's daemon is away: it forgets the pages once it is back")

    def get_stats(self) -> StorageMetrics | None:
        """Return what happened since the last call: O(1), the scheduler asks in every turn."""
        if not self._config.enable_storage_metrics:
            return None
        metrics, self._metrics = self._metrics, StorageMetrics()
        return metrics

    # -- private -------------------------------------------------------------------------------

    def _usable(self) -> KeptPages | None:
        """Return what is kept of the weights at hand; None while detached, or if they changed."""
        if not self._weights.changed:
            return self._kept
        if not self._refused:
            self._refused = True
            log.warning(
                "the engine's weights were updated: kvstrata is idle, since what it keeps belongs "
                "to the old ones; detach it, and attach it with another weights_revision"
            )
        return None

    def _save(
        self,
        keys: Sequence[str],
        source: HostPages | FlatPages,
        numbers: Sequence[int],
        extra_info: HiCacheStorageExtraInfo | None,
    ) -> list[bool]:
        """Save pages, unless another rank has them to write; see `batch_set_v1`."""
        if not self._config.is_storage_writer:
            return [True] * len(keys)
        began = time.perf_counter()
        digests = page_digests(keys)
        saved: list[bool] = []
        if kept := self._usable():
            parent = _parent(extra_info)
            saved = kept.save(digests, parent, source, numbers[: len(digests)])
        self._note(self._metrics.backup_pgs, self._metrics.backup_bandwidth, sum(saved), began)
        return [*saved, *([False] * (len(keys) - len(saved)))]

    def _numbers(self, keys: Sequence[str], host_indices: Any) -> list[int] | None:
        """Return the host page of each key; None, and say why, if they do not fit the pool."""
        if self._pages is None or host_indices is None:
            return None
        try:
            numbers = page_numbers(host_indices, self._page_tokens, self._pages.count)
        except ConfigError as error:
            log.warning("kvstrata refuses pages: %s", error)
            return None
        if len(numbers) != len(keys):
            log.warning("kvstrata refuses %d pages for %d keys", len(numbers), len(keys))
            return None
        return numbers

    def _note(self, pages: list[int], speeds: list[float], count: int, began: float) -> None:
        """Add one transfer to SGLang's metrics: pages, and GB per second."""
        if self._config.enable_storage_metrics and count:
            seconds = max(time.perf_counter() - began, 1e-9)
            pages.append(count)
            speeds.append(count * self._block_bytes / seconds / 1e9)

    def _fly_canary(self, pool: Any, pages: HostPages, kept: KeptPages) -> None:
        if not self._config.is_storage_writer:
            return
        scratch = pool.alloc(self._page_tokens)
        if scratch is None:
            log.warning("kvstrata's canary was not sent: SGLang's host pool is full")
            return
        (page,) = page_numbers(scratch, self._page_tokens, pages.count)

        def engine(number: int) -> Bytes:
            flat: Bytes = pool.get_data_page(number * self._page_tokens).view(torch.uint8).numpy()
            return flat

        try:
            fly_canary(kept, pages, page, self._block_bytes, engine)
        finally:
            pages.write(page, np.zeros(self._block_bytes, np.uint8))
            pool.free(scratch)


def _parent(extra_info: HiCacheStorageExtraInfo | None) -> LineageDigest | None:
    """Return the page before the first of a call, None if that is the root or SGLang is silent."""
    if extra_info is None or not extra_info.prefix_keys:
        return None
    digests = page_digests(extra_info.prefix_keys[-1:])
    return digests[0] if digests else None


def _flat_bytes(tensors: Any, count: int, block_bytes: int) -> list[Bytes] | None:
    """Return each tensor's bytes, sharing its memory; None unless all are pages of ours."""
    if tensors is None or len(tensors) != count:
        return None
    found: list[Bytes] = []
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
            return None
        if not tensor.is_contiguous() or tensor.numel() * tensor.element_size() != block_bytes:
            return None
        found.append(tensor.view(-1).view(torch.uint8).numpy())
    return found
