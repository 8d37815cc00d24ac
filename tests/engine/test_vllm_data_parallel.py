"""Data parallel: engines of their own behind one server, beside each other on one daemon."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
from kit import SharedDaemon

from kvstrata.core.errors import ConfigError
from kvstrata.runtime.admin import AdminClient

pytestmark = pytest.mark.engine

START_DEADLINE_S = 200


def post(port, path, body, rank=None):
    headers = {"Content-Type": "application/json"}
    if rank is not None:
        headers["X-data-parallel-rank"] = str(rank)
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        text = reply.read()
        return json.loads(text) if text else {}


@contextmanager
def served(model, log, extra):
    """Run the OpenAI server with two engines; yields its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    transfer = {
        "kv_connector": "KvstrataConnector",
        "kv_connector_module_path": "kvstrata.connectors.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }
    options = "--enforce-eager --dtype float32 --max-model-len 512 --skip-tokenizer-init"
    options += " --enable-prompt-tokens-details --kv-cache-memory-bytes 67108864 --block-size 32"
    options += " --data-parallel-size 2"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options.split()]
    command += ["--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--kv-transfer-config", json.dumps(transfer)]
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_DEADLINE_S
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
            except OSError:
                time.sleep(0.2)
        yield port
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_one_engine_saved_is_a_hit_for_the_other(tiny_model, prompts, reference, tmp_path):
    daemon = SharedDaemon(tmp_path)
    try:
        with served(tiny_model, tmp_path / "server.log", {"address": daemon.address}) as port:

            def ask(prompt, rank):
                body = {
                    "model": str(tiny_model), "prompt": prompt, "max_tokens": 16,
                    "temperature": 0, "ignore_eos": True, "return_token_ids": True,
                    "detokenize": False,
                }  # fmt: skip
                reply = post(port, "/v1/completions", body, rank)
                details = reply["usage"]["prompt_tokens_details"] or {}
                return tuple(reply["choices"][0]["token_ids"]), details.get("cached_tokens", 0)

            # No engine's own cache is ever emptied: what the second one has, it has from us.
            first = [ask(prompt, 0) for prompt in prompts[:2]]
            with AdminClient(daemon.address) as admin:
                assert admin.stats()["sessions"] == 2, "each engine has a session of its own"
            second = [ask(prompt, 1) for prompt in prompts[:2]]
            back = [ask(prompts[2], rank) for rank in (1, 0)]
            node = daemon.statistics()
    finally:
        daemon.signal(signal.SIGKILL)
    assert [tokens for tokens, _ in (*first, *second)] == reference[:2] * 2
    assert [cached for _, cached in (*first, *second)] == [0, 0, 64, 128]
    assert back == [(reference[2], 0), (reference[2], 256)]
    assert node["counters"]["stored_blocks"] == 1 + 2 + 4, "nobody stored a block twice"
    assert node["counters"]["corrupt_blocks"] == 0


def test_a_private_daemon_does_not_touch_the_directory_of_another(
    engine_on, prompts, reference, tmp_path
):
    """The daemon here is `kvstrata serve`; a private one claims its directory by the same lock."""
    daemon = SharedDaemon(tmp_path)
    shared = {"address": daemon.address}
    try:
        with engine_on(shared) as engine:
            engine.ask(prompts)
        before = daemon.statistics()["counters"]["stored_blocks"]
        with (
            pytest.raises(ConfigError, match="in use by another kvstrata daemon") as caught,
            engine_on({"tiers": f"host:64MiB,disk:{tmp_path / 'kv'}:64MiB"}),
        ):
            pass
        assert "address" in caught.value.hint
        with engine_on(shared) as engine:
            answers = engine.ask(prompts)
        assert [answer.tokens for answer in answers] == reference
        assert [answer.cached for answer in answers] == [64, 128, 256, 0]
        assert daemon.statistics()["counters"]["stored_blocks"] == before
    finally:
        daemon.signal(signal.SIGKILL)
