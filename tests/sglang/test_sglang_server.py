"""SGLang's HTTP server, as docs/guides/sglang.md starts it, and its admin routes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest

from kvstrata.testing.server import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

START_S = 180.0
PAGE_TOKENS = 16
KEY = "a-key-of-this-test"


def whole_pages(prompt):
    return (len(prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS


def storage(tiers):
    """The extra config of the guide."""
    return json.dumps(
        {
            "backend_name": "kvstrata",
            "module_path": "kvstrata.connectors.sglang.storage",
            "class_name": "KvstrataStorage",
            "interface_v1": 1,
            "hicache_storage_pass_prefix_keys": True,
            "prefetch_threshold": PAGE_TOKENS,
            "tiers": tiers,
        }
    )


class Server:
    """A running server."""

    def __init__(self, port, log):
        self.port, self._log = port, log

    def call(self, method, path, body=None):
        """Return what the server answers, parsed if it is JSON; AssertionError if it refuses."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                text = reply.read().decode()
        except urllib.error.HTTPError as error:
            raise AssertionError(
                f"{method} {path}: {error.code} {error.read().decode()}"
            ) from error
        return json.loads(text) if text[:1] in "{[" else text

    def until(self, method, path, body=None):
        """Call until it is not refused: what is on its way must have ended."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.call(method, path, body)
            except AssertionError:
                assert time.monotonic() < deadline, self._log.read_text()[-3000:]
                time.sleep(0.05)

    def forget(self):
        """Empty device and host pool; the storage keeps its pages."""
        self.until("POST", "/flush_cache")

    def attach(self, tiers):
        body = {
            "hicache_storage_backend": "dynamic",
            "hicache_storage_backend_extra_config_json": storage(tiers),
            "hicache_storage_prefetch_policy": "wait_complete",
        }
        self.until("PUT", "/hicache/storage-backend", body)

    def detach(self):
        self.until("DELETE", "/hicache/storage-backend")
        self.forget()

    def ask(self, prompts):
        """Return tokens and the number of those that came from storage, of each prompt."""
        sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        said = self.call("POST", "/generate", {"input_ids": prompts, "sampling_params": sampling})
        details = [each["meta_info"].get("cached_tokens_details") or {} for each in said]
        return (
            [tuple(each["output_ids"]) for each in said],
            [each.get("storage", 0) for each in details],
        )


_OPTIONS = f"""
    --device cpu --attention-backend torch_native --dtype float32 --skip-tokenizer-init
    --disable-overlap-schedule --sleep-on-idle --mem-fraction-static 0.2 --max-total-tokens 2048
    --page-size {PAGE_TOKENS} --max-running-requests 16 --log-level info
    --enable-hierarchical-cache --hicache-ratio 4 --hicache-io-backend direct
    --hicache-mem-layout page_first_direct --hicache-write-policy write_through
    --hicache-storage-prefetch-policy wait_complete
"""


@contextmanager
def serving(model, log, tiers):
    """Run `sglang.launch_server`; it is killed at the end, with all its children."""
    port = free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    command += ["--port", str(port), "--admin-api-key", KEY, "--enable-cache-report"]
    command += _OPTIONS.split()
    command += ["--hicache-storage-backend", "dynamic"]
    command += ["--hicache-storage-backend-extra-config", storage(tiers)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_S
        while "The server is fired up and ready to roll" not in log.read_text():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        yield Server(port, log)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(tiny_model, folder):
    """A server with a private daemon from its start."""
    with serving(tiny_model, folder / "server.log", f"host:64MiB,disk:{folder}/a:64MiB") as running:
        yield running


def test_pages_are_there_after_a_flush_and_at_the_next_attach(server, folder, prompts):
    some = prompts[:6]
    pages = [whole_pages(prompt) for prompt in some]
    cold = server.ask(some)
    server.forget()
    warm = server.ask(some)
    server.detach()
    alone = server.ask(some)
    right = alone[0]
    assert len(set(right)) == len(some), "answers that are all the same show nothing"
    assert cold == alone == (right, [0] * 6)
    assert warm == (right, pages)
    server.forget()
    server.attach(f"host:64MiB,disk:{folder}/a:64MiB")
    assert server.ask(some) == (right, pages), "from disk: the daemon of before has ended"
    server.forget()
    server.until("POST", "/hicache/storage-backend/clear")
    assert server.ask(some) == (right, [0] * 6), "cleared"


def test_dozens_at_once_on_a_small_host(server, folder):
    """Sixteen run at a time; most pages have been evicted from the host when they are wanted."""
    luck = random.Random(3)
    heads = [[luck.randrange(3, 512) for _ in range(length)] for length in (40, 130, 200)]
    many = [
        [*heads[number % 3], *(luck.randrange(3, 512) for _ in range(1 + 7 * number % 97))]
        for number in range(32)
    ]
    server.detach()
    right = [server.ask([prompt])[0][0] for prompt in many]
    assert len(set(right)) == len(many), "answers that are all the same show nothing"
    server.forget()
    server.attach(f"host:4MiB,disk:{folder}/b:64MiB")  # 63 pages
    for turn in range(3):
        said, kept = server.ask(many)
        assert said == right
        assert turn == 0 or sum(kept) > 0
        server.forget()
