"""Daemons, arguments and engines for the tests of the TensorRT-LLM connector."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

VARIABLE = "TLLM_KVSTRATA_"


@pytest.fixture(scope="session")
def sim() -> Any:
    """The simulator; loaded late, since it needs torch."""
    name = "trtllm_simulator"
    if name not in sys.modules:
        path = Path(__file__).with_name("simulator.py")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec
        assert spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def world(sim) -> Any:
    return sim.World()


@pytest.fixture(scope="session")
def model_folder(sim, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": sim.HEADS * 2,
        "num_key_value_heads": sim.HEADS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"not read: the simulator makes its own")
    return folder


@pytest.fixture
def arguments(model_folder) -> Callable[..., Any]:
    """Make an engine's arguments; keywords change them, those of `cache` the KV cache's."""

    def make(cache: dict[str, Any] | None = None, **changes: Any) -> Any:
        settings = {"tokens_per_block": 4, "enable_block_reuse": True, "dtype": "auto"}
        given = {"model": str(model_folder), "tensor_parallel_size": 1, "dtype": "float64"}
        kv = SimpleNamespace(**(settings | (cache or {})))
        return SimpleNamespace(**(given | changes), kv_cache_config=kv)

    return make


class Daemon:
    """A `kvstrata serve` process."""

    def __init__(self, address: str, tiers: str, *more: str) -> None:
        self.address = address
        self._command = [
            sys.executable, "-m", "kvstrata.apps.cli.main", "serve",
            "--tiers", tiers, "--address", address, *more,
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        socket = Path(self.address.removeprefix("ipc://"))
        until = time.monotonic() + 30
        while not socket.exists():
            assert self.process.poll() is None, "the daemon ended"
            assert time.monotonic() < until, "the daemon did not start"
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)
        Path(self.address.removeprefix("ipc://")).unlink(missing_ok=True)


@pytest.fixture(scope="session")
def run_folder() -> Iterator[Path]:
    """A short directory: a socket's path must be short."""
    folder = Path(tempfile.mkdtemp(prefix="kvt"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_daemons(run_folder) -> Iterator[Callable[[str], str]]:
    """Return the address of this session's daemon for a kind of layout; it has room for all."""
    started: dict[str, Daemon] = {}

    def address(kind: str) -> str:
        if kind not in started:
            started[kind] = Daemon(f"ipc://{run_folder}/{kind}.sock", "host:16MiB")
        return started[kind].address

    yield address
    for daemon in started.values():
        daemon.kill()


@pytest.fixture
def serve(run_folder) -> Iterator[Callable[..., Daemon]]:
    """Start a daemon of the test's own."""
    started: list[Daemon] = []

    def start(tiers: str = "host:16MiB", *more: str) -> Daemon:
        address = f"ipc://{run_folder}/own{len(started)}-{time.monotonic_ns() % 10**9}.sock"
        started.append(Daemon(address, tiers, *more))
        return started[-1]

    yield start
    for daemon in started:
        daemon.signal(18)
        daemon.kill()


@pytest.fixture
def settle(monkeypatch, run_folder) -> Callable[..., None]:
    """Set the connector's settings, by variables, as TensorRT-LLM forwards them."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run_folder))

    def set_all(**settings: Any) -> None:
        for name in [name for name in os.environ if name.startswith(VARIABLE)]:
            monkeypatch.delenv(name)
        for key, value in settings.items():
            monkeypatch.setenv(f"{VARIABLE}{key.upper()}", str(value))

    set_all()
    return set_all


@pytest.fixture
def start(sim, world, arguments, settle, shared_daemons, request) -> Iterator[Callable[..., Any]]:
    """Start engines with the connector; all are closed with the test.

    `manager`, `groups` and the rest go to the engine, `settings` to the connector. Engines of one
    test and one layout share a daemon, and blocks if `weights` and `changes`, what is different in
    the engine's arguments, are the same.
    """
    from kvstrata.connectors.trtllm import KvstrataScheduler, KvstrataWorker

    opened = []

    def make(
        *,
        weights: str | None = None,
        settings: dict[str, Any] | None = None,
        changes: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        kind = f"{options.get('manager', 'v1')}{options.get('groups', 1)}"
        given = {
            "weights_revision": weights or request.node.name,
            "block_tokens": 8,
            "call_timeout_s": 5.0,
            "retry_interval_s": 0.02,
            "staging_wait_s": 1.0,
        } | (settings or {})
        if "tiers" not in given and "address" not in given:
            given["address"] = shared_daemons(kind)
        settle(**given)
        given_engine = arguments(**(changes or {}))
        engine = sim.Engine(world, KvstrataScheduler, KvstrataWorker, given_engine, **options)
        opened.append(engine)
        return engine

    yield make
    for engine in opened:
        engine.close()
