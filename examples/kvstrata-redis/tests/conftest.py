"""Real servers and real daemons, ended with the test that started them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from kvstrata.testing.server import ServerProcess, free_port

PROGRAMS = ("redis-server", "valkey-server")


class RedisServer(ServerProcess):
    """A server on a port and a socket of its own; keeps nothing on disk unless told to."""

    def __init__(self, folder: Path, *options: str, port: int = 0) -> None:
        program = next(filter(None, map(shutil.which, PROGRAMS)), None)
        if program is None:
            pytest.skip("no redis-server here (apt install redis-server)")
        self.port = port or free_port()
        self.socket = folder / "s"
        self.folder, self.options = folder, options
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder)]
        command += ["--unixsocket", str(self.socket), "--save", "", *options]
        super().__init__(command, self.port, folder, {})

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def again(self) -> RedisServer:
        """Start another one in its place."""
        return RedisServer(self.folder, *self.options, port=self.port)


@pytest.fixture
def start_redis():
    """Start servers with options; each ends with the test."""
    started: list[RedisServer] = []
    folders: list[str] = []

    def start(*options: str, place: RedisServer | None = None) -> RedisServer:
        if place is not None:
            started.append(place.again())
            return started[-1]
        folders.append(tempfile.mkdtemp(prefix="kv"))  # short: a socket's path must be
        started.append(RedisServer(Path(folders[-1]), *options))
        return started[-1]

    yield start
    for server in started:
        server.signal(signal.SIGCONT)
        server.close()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def redis_server():
    """The server of all tests that do it no harm."""
    folder = Path(tempfile.mkdtemp(prefix="kv"))
    with RedisServer(folder) as server:
        yield server
    shutil.rmtree(folder, ignore_errors=True)


class Daemon:
    """A `kvstrata serve` process."""

    def __init__(self, address: str, arguments: list[str], variables: dict[str, str]) -> None:
        self.address = f"ipc://{address}"
        self.lines: list[str] = []
        self._said = threading.Event()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "kvstrata.apps.cli.main", "serve"),
                *("--address", self.address, *arguments),
            ],
            stderr=subprocess.PIPE,
            env=os.environ | variables,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, name="stderr", daemon=True)
        self._reader.start()
        assert self._said.wait(30), "the daemon said nothing"

    def _read(self) -> None:
        assert self.process.stderr
        with self.process.stderr as stream:
            for line in stream:
                self.lines.append(line)
                if " serves " in line:
                    self._said.set()
        self._said.set()

    def end(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            self._reader.join(10)


@pytest.fixture
def serve(tmp_path):
    """Start daemons over tiers, all with one secret; each ends with the test."""
    secret = tmp_path / "secret"
    secret.write_bytes(os.urandom(32))
    folder = tempfile.mkdtemp(prefix="kv")
    started: list[Daemon] = []

    def start(tiers: str, *more: str, **variables: str) -> Daemon:
        arguments = ["--tiers", tiers, "--secret-file", str(secret), *more]
        started.append(Daemon(f"{folder}/{len(started)}", arguments, variables))
        return started[-1]

    yield start
    for daemon in started:
        if daemon.process.poll() is None:
            daemon.end(signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def connect():
    """Open clients for blocks of 4 tokens and 3x5 floats; each is closed with the test."""
    import numpy as np

    from kvstrata import Client
    from kvstrata.runtime.session import SessionLimits

    opened = []

    def open_client(daemon: Daemon) -> Client:
        limits = SessionLimits(call_timeout_s=10.0, retry_interval_s=0.02)
        opened.append(
            Client(
                address=daemon.address,
                block_shape=(3, 5),
                dtype=np.float32,
                block_tokens=4,
                limits=limits,
            )
        )
        return opened[-1]

    yield open_client
    for client in opened:
        client.close()


@pytest.fixture
def make_blocks():
    """Return (tokens, blocks): `count` random blocks, the same for the same seed."""
    import numpy as np

    def make(seed: int, count: int):
        luck = np.random.default_rng(seed)
        tokens = luck.integers(0, 50_000, count * 4).tolist()
        return tokens, luck.random((count, 3, 5), dtype=np.float32)

    return make
