"""The demo's SGLang: engine and scheduler in processes below this one, and a daemon beside them.

SGLang starts its storage in its scheduler's process, so the demo gives it the address of a daemon
that it started itself, which it can then ask and kill.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import sglang
import torch

from kvstrata.apps.cli.demo.daemonhits import DaemonHits
from kvstrata.apps.cli.demo.engines import BLOCK_TOKENS, tiers_of
from kvstrata.core.errors import DaemonError
from kvstrata.runtime.admin import AdminClient

__all__ = ["SglangEngine"]

_START_TIMEOUT_S: Final = 60.0
_END_TIMEOUT_S: Final = 10.0
_SETTLE_TIMEOUT_S: Final = 30.0
_RETRY_INTERVAL_S: Final = 0.02
_POOL_TOKENS: Final = 4096
_WARM_UP_TOKENS: Final = 1100


class SglangEngine:
    """SGLang, with or without kvstrata's storage backend."""

    def __init__(
        self, model_directory: str, disk_directory: str | None, place: list[str] | None = None
    ) -> None:
        self._daemon: subprocess.Popen[bytes] | None = None
        self._address: str | None = None
        storage: dict[str, Any] = {}
        if disk_directory is not None:
            self._address = f"ipc://{Path(disk_directory).parent}/node.sock"
            self._daemon = _start_daemon(self._address, *tiers_of(disk_directory, place))
            storage = {
                "hicache_storage_backend": "dynamic",
                "hicache_storage_backend_extra_config": _extra_config(self._address),
                "hicache_storage_prefetch_policy": "wait_complete",
            }
        self._engine = sglang.Engine(
            model_path=model_directory,
            skip_tokenizer_init=True,
            device="cuda" if torch.cuda.is_available() else "cpu",
            attention_backend="torch_native",
            dtype="float32",
            disable_overlap_schedule=True,
            mem_fraction_static=0.2,
            max_total_tokens=_POOL_TOKENS,
            page_size=BLOCK_TOKENS,
            max_running_requests=2,
            log_level="warning",
            enable_hierarchical_cache=True,
            hicache_ratio=2,
            hicache_io_backend="direct",
            hicache_mem_layout="page_first_direct",
            hicache_write_policy="write_through",
            **storage,
        )
        if disk_directory is not None:  # its turns are measured: one-time costs must fall before
            self.generate([5 + number % 250 for number in range(_WARM_UP_TOKENS)], 2)

    def generate(self, prompt_token_ids: list[int], max_tokens: int) -> dict[str, Any]:
        """See `DemoEngine`."""
        sampling = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
        first_token = None
        token_ids: list[int] = []
        cached_tokens = 0
        with DaemonHits(self._address) as hits:
            started = time.perf_counter()
            for output in self._engine.generate(
                input_ids=prompt_token_ids, sampling_params=sampling, stream=True
            ):
                first_token = first_token or time.perf_counter()
                token_ids = list(output["output_ids"])
                cached_tokens = output["meta_info"]["cached_tokens"]
            self.reset_prefix_cache()  # refused until everything has been written
        assert first_token is not None, "a request ended without a token"
        return {
            "token_ids": token_ids,
            "ttft_s": first_token - started,
            "cached_tokens": cached_tokens,
            "tokens_from": hits.tokens_from,
        }

    def reset_prefix_cache(self) -> dict[str, Any]:
        """Empty device and host pool; the storage keeps its pages."""
        for _ in _retries(_SETTLE_TIMEOUT_S):
            if self._engine.flush_cache().success:
                return {}
        message = "the engine still holds pages of a finished request"
        raise RuntimeError(message)

    def info(self) -> dict[str, Any]:
        """See `DemoEngine`."""
        pid = None if self._daemon is None else self._daemon.pid
        return {"daemon_pid": pid, "daemon_address": self._address}

    def shutdown(self) -> dict[str, Any]:
        """See `DemoEngine`."""
        self._engine.shutdown()
        if self._daemon is not None:
            self._daemon.terminate()
            try:
                self._daemon.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait(_END_TIMEOUT_S)
        return {}


def _start_daemon(address: str, tiers: str, secret_file: str | None) -> subprocess.Popen[bytes]:
    """Start `kvstrata serve` and return once it answers."""
    command = [sys.executable, "-m", "kvstrata.apps.cli.main", "serve"]
    command += ["--tiers", tiers, "--address", address]
    if secret_file is not None:
        command += ["--secret-file", secret_file]
    daemon = subprocess.Popen(command)  # noqa: S603  # ours
    for _ in _retries(_START_TIMEOUT_S):
        if daemon.poll() is not None:
            break
        try:
            with AdminClient(address) as admin:
                admin.stats()
        except DaemonError:
            continue
        return daemon
    daemon.kill()
    message = f"the daemon at {address} does not answer"
    raise RuntimeError(message)


def _extra_config(address: str) -> str:
    return json.dumps(
        {
            "backend_name": "kvstrata",
            "module_path": "kvstrata.connectors.sglang.storage",
            "class_name": "KvstrataStorage",
            "interface_v1": 1,
            "hicache_storage_pass_prefix_keys": True,
            "prefetch_threshold": BLOCK_TOKENS,
            "address": address,
        }
    )


def _retries(timeout_s: float) -> Iterator[None]:
    """Yield at intervals until the deadline."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        yield
        time.sleep(_RETRY_INTERVAL_S)
