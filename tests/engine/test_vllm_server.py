"""What users run: the OpenAI server, in processes of its own, ended with kill -9."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]

START_DEADLINE_S = 200


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _post(port: int, path: str, body: dict) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        text = reply.read()
        return json.loads(text) if text else {}


def _wait_until_up(port: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no server in {START_DEADLINE_S} s: {log.read_text()[-3000:]}")


def _metrics(port: int) -> dict[str, float]:
    """Our metrics by name, with the label that vLLM does not put on each."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("vllm:kvstrata_"):
            name, labels, value = re.fullmatch(r"vllm:(\w+)\{(.*)\} (\S+)", line).groups()
            own = [label for label in labels.split(",") if label.startswith(("tier=", "why="))]
            found[" ".join([name, *own])] = float(value)
    return found


def _wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + 30
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


def _processes_with(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if text.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it ended while we looked
    return found


def test_server_with_a_private_daemon(tiny_model, prompts, reference, tmp_path):
    port, log = _free_port(), tmp_path / "server.log"
    kept = tmp_path / "kv"
    transfer = {
        "kv_connector": "KvstrataConnector",
        "kv_connector_module_path": "kvstrata.connectors.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"tiers": f"host:64MiB,disk:{kept}:64MiB"},
    }
    options = "--enforce-eager --dtype float32 --max-model-len 512 --skip-tokenizer-init"
    options += " --enable-prompt-tokens-details --kv-cache-memory-bytes 67108864"
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_LOG_STATS_INTERVAL": "1",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options.split()]
    command += ["--model", str(tiny_model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--kv-transfer-config", json.dumps(transfer)]
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        _wait_until_up(port, server, log)
        body = {
            "model": str(tiny_model),
            "prompt": prompts[2],
            "max_tokens": 16,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "detokenize": False,
        }
        cached, answers = [], []
        for _ in range(2):
            reply = _post(port, "/v1/completions", body)
            answers.append(tuple(reply["choices"][0]["token_ids"]))
            cached.append((reply["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0))
            _post(port, "/reset_prefix_cache", {})
        assert answers == [reference[2], reference[2]]
        assert cached == [0, 256]
        metrics = _metrics(port)
        assert metrics['kvstrata_loaded_tokens_total tier="host"'] == 256
        assert metrics["kvstrata_saved_blocks_total"] == 2  # vLLM's pages have 128 tokens here
        assert metrics["kvstrata_loaded_bytes_total"] == metrics["kvstrata_saved_bytes_total"] > 0
        assert metrics["kvstrata_load_wait_seconds_count"] == 1
        assert metrics["kvstrata_failed_loads_total"] == 0
        _wait_for(log, "kvstrata tokens from host=256")
        (daemon,) = [pid for pid in _processes_with(str(kept)) if _is_daemon(pid)]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(30)
    deadline = time.monotonic() + 30
    while Path("/proc", str(daemon)).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path("/proc", str(daemon)).exists(), "the private daemon outlived its engine"


def _is_daemon(pid: int) -> bool:
    return b"kvstrata.runtime.daemon" in Path("/proc", str(pid), "cmdline").read_bytes()
