"""LoRA adapters: which weights stand behind a request's adapter.

Neither a name, a path nor a number says it. Files are replaced, an adapter is loaded again in
place, a number is used twice, and vLLM's worker goes on with what it has loaded. So the worker
half digests the weights that are loaded and tells the scheduler half; with the digest go all jobs,
and the worker half carries none out while other weights are loaded.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from blake3 import blake3

from kvstrata.connectors.vllm.metadata import AdapterKey, AdapterUse

__all__ = ["KnownAdapters", "LoadedAdapters", "key_of", "weights_digest"]

log = logging.getLogger("kvstrata.vllm")

_ADAPTERS_MAX: Final = 65536
_PLANS_MAX: Final = 64
"""Steps in which an answer must come."""


def key_of(lora_request: Any) -> AdapterKey:
    """Return what a request's LoRARequest says."""
    return AdapterKey(lora_request.lora_int_id, lora_request.lora_name, str(lora_request.lora_path))


def weights_digest(loras: Mapping[str, Any], applied: Iterable[str]) -> str:
    """Return a digest over the adapter's weights of each module, as vLLM holds them in memory.

    `applied` are the modules that vLLM applies adapters to, which an operator may choose.
    """
    digest = blake3()
    for module in sorted(applied):
        digest.update(f"\0applied {module}\0".encode())
    for module, weights in sorted(loras.items()):
        digest.update(f"\0module {module}\0".encode())
        for part in ("lora_a", "lora_b", "scaling"):
            values = getattr(weights, part)
            values = values if isinstance(values, list | tuple) else [values]
            digest.update(f"\0{part} {len(values)}\0".encode())
            for value in values:
                if isinstance(value, torch.Tensor):
                    digest.update(f"{value.dtype} {tuple(value.shape)}\0".encode())
                    plain = value.detach().cpu().contiguous().reshape(-1)
                    digest.update(plain.view(torch.uint8).numpy().data)
                else:
                    digest.update(f"{value}\0".encode())
    return digest.hexdigest()


class LoadedAdapters:
    """The worker half's view of the adapters that vLLM has loaded."""

    def __init__(self, runner: Any | None) -> None:
        """Look into this model runner; without one nothing can be told."""
        self._runner = runner
        self._seen: dict[int, tuple[weakref.ref[Any], str]] = {}

    def current(self, use: AdapterUse | None) -> bool:
        """Return whether exactly these weights are loaded now; None is no adapter, always true."""
        return use is None or self._digest(use.key.number) == use.digest

    def digests(self, wanted: Mapping[AdapterKey, Any]) -> dict[AdapterKey, str]:
        """Return the digest of each adapter, after loading it as vLLM would if it is not there.

        To be called only after a step's forward: loading one may push out another.
        """
        return {key: self._digest(key.number) or self._load(request)
                for key, request in wanted.items()}  # fmt: skip

    def _load(self, request: Any) -> str:
        if self._runner is None:
            return ""
        try:
            self._runner.add_lora(request)
        except Exception as error:  # noqa: BLE001 - whatever it is, vLLM will say so to the request
            log.warning("kvstrata cannot look at adapter %r: %s", request.lora_name, error)
            return ""
        return self._digest(request.lora_int_id)

    def _digest(self, number: int) -> str:
        manager = getattr(self._runner, "lora_manager", None)
        if manager is None:
            return ""
        loaded = manager._adapter_manager.list_adapters().get(number)  # noqa: SLF001 - no other way
        if loaded is None:
            self._seen.pop(number, None)
            return ""
        seen = self._seen.get(number)
        if seen is None or seen[0]() is not loaded:
            applied = manager._adapter_manager.modules  # noqa: SLF001 - as above
            seen = self._seen[number] = weakref.ref(loaded), weights_digest(loaded.loras, applied)
        return seen[1]


class KnownAdapters:
    """The scheduler half's knowledge of them, from the worker half's reports."""

    def __init__(self) -> None:
        """Know none."""
        self._digests: dict[AdapterKey, str] = {}  # as reported last
        self._by_name: dict[tuple[str, str], str] = {}  # empty: not to be served any more
        self._asked: dict[AdapterKey, Any] = {}
        self._asked_plans: dict[AdapterKey, int] = {}

    def digest(self, lora_request: Any) -> str | None:
        """Return the digest of a request's adapter, None while the worker half is asked.

        Empty means that it cannot be told, or that requests cannot tell its weights apart.
        """
        key = key_of(lora_request)
        if (
            lora_request.load_inplace
        ):  # vLLM loads it anew in each step, maybe other weights each time
            self._by_name[key.name, key.path] = ""
        full = len(self._by_name) + len(self._asked) >= _ADAPTERS_MAX
        if full or self._by_name.get((key.name, key.path)) == "":
            return ""
        if key not in self._digests:
            self._asked[key] = lora_request
            return None
        return self._digests[key]

    def plan(self, used: Iterable[Any]) -> dict[AdapterKey, Any]:
        """Return what the worker half is to look at: adapters asked about, and those of `used`."""
        for key in list(self._asked):
            self._asked_plans[key] = self._asked_plans.get(key, 0) + 1
            if self._asked_plans[key] > _PLANS_MAX:
                self._learn(key, "")
        return self._asked | {key_of(request): request for request in used}

    def take(self, report: Mapping[AdapterKey, str]) -> None:
        """Learn what the worker half saw."""
        for key, digest in report.items():
            self._learn(key, digest)

    def holds(self, use: AdapterUse | None) -> bool:
        """Return whether requests may still be served under `use`."""
        if use is None:
            return True
        name = (use.key.name, use.key.path)
        return self._digests.get(use.key) == use.digest == self._by_name.get(name)

    def forget(self) -> None:
        """Start afresh: vLLM's own blocks and ours are gone."""
        for known in (self._digests, self._by_name, self._asked, self._asked_plans):
            known.clear()

    def _learn(self, key: AdapterKey, digest: str) -> None:
        self._asked.pop(key, None)
        self._asked_plans.pop(key, None)
        self._digests[key] = digest
        # vLLM's own cache knows an adapter by name and path: with other weights behind them it may
        # give a request blocks of the old ones, which must not be saved as blocks of the new.
        name = (key.name, key.path)
        before = self._by_name.setdefault(name, digest)
        if before and before != digest:
            log.warning(
                "adapter %r has other weights than before under the same path; its requests go "
                "without kvstrata until reset_prefix_cache(reset_connector=True)",
                key.name,
            )
            self._by_name[name] = ""
