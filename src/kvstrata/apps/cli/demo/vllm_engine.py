"""The demo's vLLM, in this process."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from typing import Any, Final

from kvstrata.apps.cli.demo.engines import BLOCK_TOKENS, tiers_of

__all__ = ["VllmEngine"]

_SETTLE_TIMEOUT_S: Final = 30.0
_RETRY_INTERVAL_S: Final = 0.02
_BATCH_TOKENS_MAX: Final = 1024
_CONTEXT_TOKENS_MAX: Final = 4096
_KV_CACHE_BYTES: Final = 96 << 20  # about 12,000 tokens of the demo's model
_WARM_UP_TOKENS: Final = 1100


class VllmEngine:
    """vLLM in this process, with or without kvstrata's connector."""

    def __init__(
        self, model_directory: str, disk_directory: str | None, place: list[str] | None = None
    ) -> None:
        self._vllm = importlib.import_module("vllm")
        self._llm = self._vllm.LLM(
            model_directory,
            dtype="float32",
            block_size=32,
            enable_prefix_caching=True,
            enforce_eager=True,
            max_model_len=_CONTEXT_TOKENS_MAX,
            max_num_batched_tokens=_BATCH_TOKENS_MAX,
            max_num_seqs=2,
            kv_cache_memory_bytes=_KV_CACHE_BYTES,
            skip_tokenizer_init=True,
            disable_log_stats=False,
            kv_transfer_config=disk_directory and self._transfer_config(disk_directory, place),
        )
        self._requests = 0
        if disk_directory is not None:  # its turns are measured: one-time costs must fall before
            self.generate([5 + number % 250 for number in range(_WARM_UP_TOKENS)], 2)

    def generate(self, prompt_token_ids: list[int], max_tokens: int) -> dict[str, Any]:
        """Answer one prompt greedily; the clock starts when the engine gets the request."""
        parameters = self._vllm.SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        engine = self._llm.llm_engine
        self._requests += 1
        ttft_s = None
        output = None
        started = time.perf_counter()
        engine.add_request(str(self._requests), {"prompt_token_ids": prompt_token_ids}, parameters)
        while engine.has_unfinished_requests():
            for output in engine.step():  # noqa: B007 - the last one is the whole answer
                if ttft_s is None:
                    ttft_s = time.perf_counter() - started
        self._settle()
        assert output is not None, "a request ended without an output"
        transfer = (output.kv_transfer_params or {}).get("kvstrata") or {}
        return {
            "token_ids": list(output.outputs[0].token_ids),
            "ttft_s": ttft_s,
            "cached_tokens": output.num_cached_tokens or 0,
            "tokens_from": transfer.get("tokens_from") or {},
        }

    def reset_prefix_cache(self) -> dict[str, Any]:
        """Empty the engine's own prefix cache; the connector keeps its blocks."""
        for _ in _retries():
            if self._llm.reset_prefix_cache():
                return {}
            self._llm.llm_engine.step()
        message = "the engine still holds blocks of a finished request"
        raise RuntimeError(message)

    def info(self) -> dict[str, Any]:
        """Tell which daemon the connector uses, if there is a connector."""
        connector = self._scheduler.connector
        return {
            "daemon_pid": getattr(connector, "daemon_pid", None),
            "daemon_address": getattr(connector, "daemon_address", None),
        }

    def shutdown(self) -> dict[str, Any]:
        """End the engine; no other command may follow."""
        self._llm.llm_engine.engine_core.shutdown()
        return {}

    @property
    def _scheduler(self) -> Any:
        return self._llm.llm_engine.engine_core.engine_core.scheduler

    def _settle(self) -> None:
        # The connector learns in a later step that a request ended, and may have copies in flight.
        for _ in _retries():
            if not self._scheduler.has_requests():
                return
            self._llm.llm_engine.step()
        message = "the connector's copies did not end in time"
        raise RuntimeError(message)

    @staticmethod
    def _transfer_config(disk_directory: str, place: list[str] | None) -> Any:
        tiers, secret_file = tiers_of(disk_directory, place)
        extra = {"tiers": tiers, "block_tokens": BLOCK_TOKENS, "secret_file": secret_file}
        return importlib.import_module("vllm.config").KVTransferConfig(
            kv_connector="KvstrataConnector",
            kv_connector_module_path="kvstrata.connectors.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config=extra,
        )


def _retries() -> Iterator[None]:
    """Yield at intervals until the deadline."""
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    while time.monotonic() < deadline:
        yield
        time.sleep(_RETRY_INTERVAL_S)
