"""The process that holds vLLM: JSON lines in on stdin, JSON lines out on what was stdout.

Started by `engine.EngineProcess`, which sets the environment that vLLM reads at import. Everything
that vLLM or its libraries print goes to stderr, which the parent has pointed at a log file. End of
input ends the process, so that it does not outlive its parent. One thread; one request at a time.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, Final

__all__ = ["Engine", "main", "serve"]

_SETTLE_TIMEOUT_S: Final = 30.0
_RETRY_INTERVAL_S: Final = 0.02
_BATCH_TOKENS_MAX: Final = 1024
_CONTEXT_TOKENS_MAX: Final = 4096
_KV_CACHE_BYTES: Final = 96 << 20  # about 12,000 tokens of the demo's model
_WARM_UP_TOKENS: Final = 1100
_HOST_TIER: Final = "host:512MiB"
_DISK_TIER_SIZE: Final = "1GiB"
_OBJECT_TIER_SIZE: Final = "1GiB"
_BLOCK_TOKENS: Final = 64


class Engine:
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
        return {
            "token_ids": list(output.outputs[0].token_ids),
            "ttft_s": ttft_s,
            "num_cached_tokens": output.num_cached_tokens or 0,
            "kv_transfer_params": output.kv_transfer_params,
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
        tiers = f"{_HOST_TIER},disk:{disk_directory}:{_DISK_TIER_SIZE}"
        extra: dict[str, Any] = {"tiers": tiers, "block_tokens": _BLOCK_TOKENS}
        if place is not None:
            url, extra["secret_file"] = place
            extra["tiers"] = f"{tiers},object:{url}:{_OBJECT_TIER_SIZE}"
        return importlib.import_module("vllm.config").KVTransferConfig(
            kv_connector="KvstrataConnector",
            kv_connector_module_path="kvstrata.connectors.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config=extra,
        )


def serve(lines: IO[str], answers: IO[str], build: Callable[..., Engine] = Engine) -> None:
    """Answer each command line with one line: the command's result, or `{"error": sentence}`.

    The first command is `build`; the last is `shutdown` or the end of the input.
    """
    engine: Engine | None = None
    for line in lines:
        arguments = json.loads(line)
        command = arguments.pop("command")
        try:
            if command == "build":
                engine = build(**arguments)
                result = engine.info()
            else:
                assert engine is not None, "`build` comes first"
                result = getattr(engine, command)(**arguments)
        except Exception as error:  # noqa: BLE001 - the outermost loop; the parent raises it again
            result = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(result) + "\n")
        answers.flush()
        if command == "shutdown":
            return


def main() -> None:
    """Take stdin and stdout for the protocol, import vLLM early, and serve."""
    commands = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - a device, and only its number is used
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    importlib.import_module("vllm.entrypoints.llm")  # seconds, while the parent makes the model
    serve(commands, answers)


def _retries() -> Iterator[None]:
    """Yield at intervals until the deadline."""
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    while time.monotonic() < deadline:
        yield
        time.sleep(_RETRY_INTERVAL_S)


if __name__ == "__main__":
    main()
