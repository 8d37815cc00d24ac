"""An object tier under a real daemon: a real S3 server, a dead one and one that says nothing."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from contextlib import suppress

import pytest

pytest.importorskip("obstore", reason="no obstore installed (kvstrata[object])")

SIZE = 4 << 20


@pytest.fixture
def bucket(s3_server, monkeypatch, tmp_path):
    """Return a prefix of its own on the session's S3 server; the environment has its keys."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket, _, options = s3_server.url.partition("?")
    return f"{bucket}/{tmp_path.name}-{os.urandom(4).hex()}?{options}"


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "cluster-secret"
    path.write_bytes(os.urandom(32))
    return path


def counters(client) -> dict:
    return client.stats()["node"]["counters"]


def test_daemon_and_slab_deleted_blocks_come_back_from_s3(
    serve, connect, make_blocks, tmp_path, bucket, secret
) -> None:
    where = f"host:128KiB,disk:{tmp_path / 'd'}:1MiB,object:{bucket}:{SIZE}"
    chains = [make_blocks(seed, 8) for seed in range(3)]
    daemon = serve(where, "a.sock", "--secret-file", str(secret))
    client = connect(address=daemon.address)
    for tokens, blocks in chains:
        client.put(tokens, blocks)
    client.wait_idle()
    client.close()
    daemon.kill()
    shutil.rmtree(tmp_path / "d")
    again = serve(where, "b.sock", "--secret-file", str(secret))
    client = connect(address=again.address)
    client.wait_idle()
    assert counters(client)["adopted_blocks"] == 24
    for tokens, blocks in chains:
        assert client.get(tokens).tobytes() == blocks.tobytes()
    assert client.stats()["node"]["tiers"]["object"]["hit_blocks"] == 24
    client.wait_idle()
    assert client.forget(chains[0][0][:4]) == 24, "8 blocks in 3 tiers"
    client.clear()
    client.wait_idle()
    client.close()
    assert again.end() == 0
    third = serve(where, "c.sock", "--secret-file", str(secret))
    client = connect(address=third.address)
    client.wait_idle()
    assert counters(client)["adopted_blocks"] == 0, "what was cleared is deleted"


def test_a_clear_while_the_bucket_is_listed_leaves_nothing(
    serve, connect, make_blocks, bucket, secret
) -> None:
    where = f"host:256KiB,object:{bucket}:{SIZE}"
    daemon = serve(where, "a.sock", "--secret-file", str(secret))
    client = connect(address=daemon.address)
    tokens, blocks = make_blocks(1, 60)
    client.put(tokens, blocks)
    client.wait_idle()
    client.close()
    assert daemon.end() == 0
    again = serve(where, "b.sock", "--secret-file", str(secret))
    client = connect(address=again.address)
    client.clear()
    client.wait_idle()
    assert client.lookup(tokens) == 0
    assert counters(client)["deleted_blocks"] == 60


class Proxy:
    """Forwards to an S3 server until it is told to stall; then it reads and says nothing."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.stalled = threading.Event()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def close(self) -> None:
        """Refuse connections, and end those there are."""
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for each in self._open:
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            self._open += [near, far]
            for source, target in ((near, far), (far, near)):
                threading.Thread(
                    target=self._pump, args=(source, target), name="pump", daemon=True
                ).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if not self.stalled.is_set():
                    target.sendall(data)
        except OSError:
            pass
        finally:
            for each in (source, target):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("how", ["dead", "stalled"])
def test_a_server_that_fails_is_misses_within_the_deadline(
    serve, connect, make_blocks, bucket, secret, s3_server, how
) -> None:
    proxy = Proxy(s3_server.port)
    url = bucket.replace(f":{s3_server.port}", f":{proxy.port}")
    more = ("--secret-file", str(secret), "--staging-timeout-s", "1")
    daemon = serve(f"host:128KiB,object:{url}:{SIZE}", "a.sock", *more)
    client = connect(address=daemon.address)
    tokens, blocks = make_blocks(1, 6)
    others, other_blocks = make_blocks(2, 3)
    client.put(tokens, blocks)
    client.wait_idle()
    client.clear(["host"])
    if how == "dead":
        proxy.close()
    else:
        proxy.stalled.set()
    began = time.monotonic()
    assert client.get(tokens).shape[0] == 0
    assert time.monotonic() - began < 3.0
    began = time.monotonic()
    assert client.get(tokens).shape[0] == 0
    assert time.monotonic() - began < 0.5, "a tier that failed rests"
    assert "failed or was too slow" in client.why(tokens)
    assert client.put(others, other_blocks) == 3
    assert client.get(others).tobytes() == other_blocks.tobytes(), "the daemon works on"
    tier = client.stats()["node"]["tiers"]["object"]
    assert tier["idle"] + tier["in_use"] == 6, "they may come back"
    if how == "stalled":
        proxy.stalled.clear()

        def back() -> bool:
            return client.get(tokens).tobytes() == blocks.tobytes()

        deadline = time.monotonic() + 25
        while not back():
            assert time.monotonic() < deadline, "the server is back"
            time.sleep(0.3)


def test_a_daemon_ends_in_time_although_its_server_says_nothing(
    serve, connect, make_blocks, bucket, secret, s3_server
) -> None:
    proxy = Proxy(s3_server.port)
    url = bucket.replace(f":{s3_server.port}", f":{proxy.port}")
    more = ("--secret-file", str(secret), "--staging-timeout-s", "1")
    daemon = serve(f"host:128KiB,object:{url}:{SIZE}", "a.sock", *more)
    client = connect(address=daemon.address)
    tokens, blocks = make_blocks(1, 20)
    client.put(tokens, blocks)
    client.wait_idle()
    client.clear(["host"])
    proxy.stalled.set()
    assert client.get(tokens).shape[0] == 0
    client.put(*make_blocks(2, 6))
    began = time.monotonic()
    assert daemon.end() == 0
    assert time.monotonic() - began < 9.0
    assert not [line for line in daemon.lines if "Traceback" in line or "Error" in line]


@pytest.mark.parametrize("how", ["dead", "stalled", "no bucket"])
def test_a_server_that_fails_at_the_start_is_an_error_with_a_hint(
    secret, serve, connect, bucket, how
) -> None:
    from kvstrata.core.errors import ConfigError

    listening = socket.create_server(("127.0.0.1", 0))
    url = f"s3://b?endpoint=http://127.0.0.1:{listening.getsockname()[1]}"
    if how == "dead":
        listening.close()
    elif how == "no bucket":
        url = bucket.replace("s3://kvstrata-test/", "s3://not-there/")
    daemon = serve(f"host:128KiB,object:{url}:{SIZE}", "a.sock", "--secret-file", str(secret))
    with pytest.raises(ConfigError, match=r"tiers\.object: s3://.* cannot be used"):
        connect(address=daemon.address, limits={"call_timeout_s": 20.0})
    listening.close()
