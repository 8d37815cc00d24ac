"""What vLLM's log line and its /metrics say about us.

The scheduler half counts, from the worker half's reports; vLLM carries the numbers of each step to
where it logs and serves them, maybe in another process.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import Counter, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["ConnectorMetrics", "ConnectorStats", "split_by_tier"]

_WAITS_MAX: Final = 4096

_COUNTERS: Final = {
    "loads": "Requests that were given kept blocks",
    "failed_loads": "Requests whose kept blocks did not arrive whole; the rest was computed",
    "loaded_bytes": "Bytes copied into the engine's cache",
    "load_seconds": "Time spent copying into the engine's cache",
    "saved_blocks": "Blocks copied out of the engine's cache",
    "saved_bytes": "Bytes copied out of the engine's cache",
    "save_seconds": "Time spent copying out of the engine's cache",
    "failed_saves": "Saves that could not be made",
    "untold_blocks": "Blocks in a tier that no KV event tells of: other engines', or too many",
    "missed_changes": "Times that KV events began anew: the daemon had forgotten what came between",
}
_LABELLED: Final = {
    "loaded_tokens": ("tier", "Tokens that arrived instead of being computed, by tier"),
    "given_up": ("why", "Times that a request was not looked up, or its blocks not offered"),
}
_WAIT_BUCKETS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class ConnectorStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is untyped here
    """Counts since the last `take`. All of `data` is plain, since vLLM serialises it."""

    data: dict[str, Any]

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        """Start with what another process has counted, or with nothing."""
        super().__init__(data or {})

    def count(self, name: str, number: float = 1, label: str | None = None) -> None:
        """Add to a counter; `label` is the tier or the reason."""
        if not number:
            return
        if label is None:
            self.data[name] = self.data.get(name, 0) + number
        else:
            by_label = self.data.setdefault(name, {})
            by_label[label] = by_label.get(label, 0) + number

    def waited(self, seconds: float) -> None:
        """Note how long a request waited from its first question to the end of its load."""
        waits = self.data.setdefault("waits", [])
        if len(waits) < _WAITS_MAX:
            waits.append(seconds)
        else:
            self.count("uncounted_waits")

    def take(self) -> ConnectorStats | None:
        """Return what was counted and start anew, None if nothing was."""
        if self.is_empty():
            return None
        taken = ConnectorStats(self.data)
        self.data = {}
        return taken

    def reset(self) -> None:
        """Forget all counts."""
        self.data = {}

    def is_empty(self) -> bool:
        """Return whether nothing was counted."""
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> ConnectorStats:
        """Return these counts and others."""
        both = ConnectorStats(copy.deepcopy(self.data))
        for name, value in other.data.items():
            if name == "waits":
                for seconds in value:
                    both.waited(seconds)
            elif isinstance(value, dict):
                for label, number in value.items():
                    both.count(name, number, label)
            else:
                both.count(name, value)
        return both

    def reduce(self) -> dict[str, int | float]:
        """Return what vLLM's log line says."""
        said: dict[str, int | float] = {}
        for tier, tokens in self.data.get("loaded_tokens", {}).items():
            said[f"kvstrata tokens from {tier}"] = tokens
        for direction, seconds in (("loaded", "load_seconds"), ("saved", "save_seconds")):
            size, took = self.data.get(f"{direction}_bytes", 0), self.data.get(seconds, 0.0)
            said[f"kvstrata {direction} MB"] = round(size / 1e6, 1)
            if took:
                said[f"kvstrata {direction} GB/s"] = round(size / took / 1e9, 2)
        waits = sorted(self.data.get("waits", []))
        if waits:
            said["kvstrata wait p90 ms"] = round(1e3 * waits[(len(waits) * 9) // 10], 1)
        for name in ("failed_loads", "failed_saves"):
            if name in self.data:
                said[f"kvstrata {name.replace('_', ' ')}"] = self.data[name]
        for why, times in self.data.get("given_up", {}).items():
            said[f"kvstrata given up: {why}"] = times
        return said


class ConnectorMetrics(KVConnectorPromMetrics):  # type: ignore[misc]  # as above
    """`vllm:kvstrata_...` on /metrics, per engine."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        """Register every metric; vLLM does this once in a process."""
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, histogram = metric_types[Counter], metric_types[Histogram]
        self._counters = {
            name: counter(f"vllm:kvstrata_{name}", said, labelnames=labelnames)
            for name, said in _COUNTERS.items()
        }
        self._labelled = {
            name: counter(f"vllm:kvstrata_{name}", said, labelnames=[*labelnames, label])
            for name, (label, said) in _LABELLED.items()
        }
        self._waits = histogram(
            "vllm:kvstrata_load_wait_seconds",
            "From the first question about a request to the end of its load",
            labelnames=labelnames,
            buckets=_WAIT_BUCKETS,
        )
        for values in per_engine_labelvalues.values():  # there from the start, as 0
            for each in (*self._counters.values(), self._waits):
                each.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one step's counts."""
        values = self.per_engine_labelvalues[engine_idx]
        for name, metric in self._counters.items():
            if name in transfer_stats_data:
                metric.labels(*values).inc(transfer_stats_data[name])
        for name, metric in self._labelled.items():
            for label, number in transfer_stats_data.get(name, {}).items():
                metric.labels(*values, label).inc(number)
        for seconds in transfer_stats_data.get("waits", []):
            self._waits.labels(*values).observe(seconds)


def split_by_tier(tokens: int, staged: Mapping[str, int]) -> dict[str, int]:
    """Return loaded `tokens` by the tier that they came from; the host has all but the staged."""
    split = {}
    for tier, below in staged.items():
        split[tier] = min(below, tokens)
        tokens -= split[tier]
    split["host"] = split.get("host", 0) + tokens
    return split
