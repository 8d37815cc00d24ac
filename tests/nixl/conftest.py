"""A process at the other end, and what the two-process tests ask of ours."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kvstrata.storage.base import MemoryRegion
from kvstrata.transfer.base import CopyOp

PIECE = 1 << 20


class PeerProcess:
    """`peer.py`, and its orders as methods."""

    def __init__(self, length, value):
        self.length = length
        script = Path(__file__).parent / "peer.py"
        self.process = subprocess.Popen(
            [sys.executable, script, str(length), str(value)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.invitation = bytes.fromhex(self._answer())

    def order(self, do, **given):
        self.process.stdin.write(json.dumps({"do": do, **given}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, "the peer process has died"
        return json.loads(line)

    def signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)

    def end(self):
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Side:
    """Our side: a backend, memory that is exported, and a way to wait with a limit."""

    def __init__(self, length, **limits):
        from kvstrata.transfer.backends.nixl import NixlBackend

        self.length = length
        self.backend = NixlBackend(**limits)
        self.agent = self.backend.agent
        self.memory = mmap.mmap(-1, length)
        self.array = np.frombuffer(self.memory, np.uint8)
        self.array[:] = 0
        self.region = MemoryRegion(memoryview(self.memory))
        self.invitation = self.agent.export({"arena": self.region})
        self.ops = [CopyOp(at, at, PIECE) for at in range(0, length, PIECE)]

    def pull(self, name, there):
        assert self.backend.submit(name, self.ops, there, self.region)

    def push(self, name, there):
        assert self.backend.submit(name, self.ops, self.region, there)

    def wait(self, name, timeout_s):
        """Return the completion of `name`, or None; nothing else may complete."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            for completion in self.backend.poll():
                assert completion.transfer == name
                return completion
            time.sleep(0.001)
        return None

    def wait_until_landing(self, value):
        """Return once the first byte of the far side's memory is here."""
        end = time.monotonic() + 10
        while self.array[0] != value:
            assert time.monotonic() < end, "nothing lands"

    def wait_until_posted(self):
        """Return once NIXL has a part of the transfer, and not all."""
        end = time.monotonic() + 10
        while not self.agent.statistics().requests:
            assert time.monotonic() < end, "nothing is posted"

    def assert_quiet(self, seconds=0.4):
        """Use the memory for something else, and see that nobody else does."""
        self.array[:] = 0xEE
        time.sleep(seconds)
        assert int(np.count_nonzero(self.array != 0xEE)) == 0, "late bytes in a slot in use"

    def assert_nothing_left(self):
        found = self.agent.statistics()
        assert (found.live, found.descriptors, found.overdue) == (0, 0, 0)
        assert not self.agent._requests.live, "a handle was neither ended nor released"
        assert found.registrations == 1, "the exported arena, and nothing that a transfer held"


@pytest.fixture
def start_peer():
    """Returns a function that starts a peer with so many bytes of one value."""
    peers = []

    def start(length, value):
        peers.append(PeerProcess(length, value))
        return peers[-1]

    yield start
    for peer in peers:
        with contextlib.suppress(ProcessLookupError):
            peer.signal(signal.SIGCONT)
        peer.end()


@pytest.fixture
def side():
    """Returns a function that makes our side."""
    sides = []

    def make(length, **limits):
        sides.append(Side(length, **limits))
        return sides[-1]

    yield make
    for each in sides:
        if each.backend is not None:
            each.backend.close()


@pytest.fixture(params=["cma", "tcp"])
def transport(request, monkeypatch):
    """Both processes use shared address spaces where the system allows it, or only sockets."""
    if request.param == "tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    return request.param


@pytest.fixture
def sockets(monkeypatch):
    """Sockets only: bytes are in flight long enough to be interrupted."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
