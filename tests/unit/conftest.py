"""What the unit lane shares: short run directories, `kvstrata serve` processes, deadlines."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstrata.core.config import NodeConfig, TierConfig
from kvstrata.core.ids import Holder, SequenceHash, SessionId
from kvstrata.core.tier import TierKind
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.runtime.node import Node

BLOCK_TOKENS = 4
BLOCK_SHAPE = (3, 5)


class Daemon:
    """A `kvstrata serve` process and all it has said."""

    def __init__(self, address: str, arguments: list[str], environment: dict[str, str]) -> None:
        self.address = address
        self.lines: list[str] = []
        self._said = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvstrata.apps.cli.main", "serve", *arguments],
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, name="stderr", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        with self.process.stderr as stream:
            for line in stream:
                self.lines.append(line)
                if " serves " in line:
                    self._said.set()
        self._said.set()

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_ready(self) -> Daemon:
        assert self._said.wait(30), "the daemon said nothing"
        if not any(" serves " in line for line in self.lines):
            raise AssertionError(f"ended with {self.process.wait(10)}: {''.join(self.lines)}")
        return self

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def end(self) -> int:
        """Ask it to end; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        try:
            status = self.process.wait(10)
        finally:
            self.process.kill()
        self._reader.join(10)
        return status


@pytest.fixture
def eventually() -> Callable[..., Any]:
    """Call something until it answers truly; fail with its last word at the deadline."""

    def wait(check: Callable[[], Any], timeout_s: float = 10.0, ignore: Any = ()) -> Any:
        deadline = time.monotonic() + timeout_s
        last: Any = None
        while time.monotonic() < deadline:
            try:
                last = check()
            except ignore as error:
                last = error
            else:
                if last:
                    return last
            time.sleep(0.005)
        raise AssertionError(f"not within {timeout_s} s; last: {last!r}")

    return wait


@pytest.fixture
def run_directory(monkeypatch) -> Iterator[Path]:
    """A short directory that is this test's XDG_RUNTIME_DIR: a socket's path must be short."""
    folder = Path(tempfile.mkdtemp(prefix="kv"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def serve(run_directory) -> Iterator[Callable[..., Daemon]]:
    """Start `kvstrata serve` processes; all are ended with the test."""
    started: list[Daemon] = []

    def start(tiers: str = "host:1MiB", name: str = "n.sock", *more: str, **env: str) -> Daemon:
        address = f"ipc://{run_directory / name}"
        arguments = ["--tiers", tiers, "--address", address, *more]
        started.append(Daemon(address, arguments, os.environ | env))
        return started[-1].wait_ready()

    yield start
    for daemon in started:
        daemon.end()


@pytest.fixture
def connect(run_directory) -> Iterator[Callable[..., Any]]:
    """Open Clients for blocks of 4 tokens and 3x5 floats; all are closed with the test."""
    from kvstrata import Client
    from kvstrata.runtime.session import SessionLimits

    assert run_directory.is_dir()
    opened: list[Client] = []

    def open_client(**settings: Any) -> Client:
        limits = {"call_timeout_s": 5.0, "retry_interval_s": 0.02} | settings.pop("limits", {})
        defaults = {"block_shape": BLOCK_SHAPE, "dtype": np.float32, "block_tokens": BLOCK_TOKENS}
        client = Client(**(defaults | settings), limits=SessionLimits(**limits))
        opened.append(client)
        return client

    yield open_client
    for client in opened:
        client.close()


@pytest.fixture
def command(run_directory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `kvstrata` with arguments and variables."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"XDG_RUNTIME_DIR": str(run_directory)} | variables
        return subprocess.run(
            [sys.executable, "-m", "kvstrata.apps.cli.main", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture
def command_here(monkeypatch) -> Callable[..., Any]:
    """Run `kvstrata` in this process, in a tenth of the time; answers as `command`'s."""
    from typer.testing import CliRunner

    from kvstrata.apps.cli.main import app

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            done = CliRunner().invoke(app, list(arguments))
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture
def make_blocks() -> Callable[..., Any]:
    """Return (tokens, blocks): `count` random blocks, the same for the same seed."""

    def make(seed: int, count: int) -> tuple[list[int], Any]:
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, 50_000, count * BLOCK_TOKENS).tolist()
        return tokens, rng.random((count, *BLOCK_SHAPE), dtype=np.float32)

    return make


class DiskWorld:
    """A node over slabs, driven by hand: stores and loads blocks by number."""

    LAYOUT = BlockLayout((Dimension("byte", 6000),), "int8", 8, "test")

    def __init__(self, places, capacity_bytes):
        tiers = (
            TierConfig(TierKind.HOST, 1 << 20),
            TierConfig(TierKind.DISK, capacity_bytes, "|".join(map(str, places))),
        )
        self.news = threading.Event()
        self.node = Node(NodeConfig(tiers), self.LAYOUT, self.news.set)
        self.requests = 0

    @property
    def counters(self):
        return self.node.manager.counters

    @property
    def disk(self):
        return self.node.statistics()["tiers"]["disk"]

    def work(self):
        deadline = time.monotonic() + 20
        while self.node.manager.pending:
            self.step()
            assert time.monotonic() < deadline
        self.node.work(time.monotonic())

    def step(self):
        self.node.work(time.monotonic())
        self.news.wait(0.02)
        self.news.clear()

    def holder(self):
        self.requests += 1
        return Holder(SessionId(1), str(self.requests))

    def key(self, number):
        return SequenceHash(number.to_bytes(16, "big"))

    def payload(self, number):
        return (number.to_bytes(8, "big") * 750)[:6000]

    def store(self, number):
        manager, holder = self.node.manager, self.holder()
        answer = manager.reserve(holder, None, [self.key(number)], now=time.monotonic())
        for slot in answer.slots:
            self.node.arena.slot(slot)[:] = self.payload(number)
        manager.seal(holder, answer.slots)
        manager.release(holder)
        self.work()

    def load(self, number):
        """Return whether the block is found; what is found must be right."""
        manager, holder = self.node.manager, self.holder()
        found = manager.lookup(holder, [self.key(number)], time.monotonic())
        while found.pending:
            self.step()
            found = manager.lookup(holder, [self.key(number)], time.monotonic())
        answer = manager.acquire(holder, [self.key(number)], time.monotonic())
        for slot in answer.slots:
            assert bytes(self.node.arena.slot(slot)) == self.payload(number)
        manager.release(holder)
        return answer.blocks == 1


@pytest.fixture
def disk_world():
    """Make nodes over places and a capacity; each is closed with the test."""
    made = []

    def make(places, capacity_bytes):
        made.append(DiskWorld(places, capacity_bytes))
        return made[-1]

    yield make
    for world in made:
        world.node.close()
