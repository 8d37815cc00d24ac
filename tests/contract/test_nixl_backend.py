"""The NIXL backend under the laws of the seam, in each direction, with real NIXL."""

from __future__ import annotations

import os
import random

import pytest

from kvstrata.storage.base import FileRegion, MemoryRegion
from kvstrata.testing.contracts.transfer_backend import Ends, TransferBackendContract
from kvstrata.testing.fakes import Faults, FaultyBackend

pytestmark = pytest.mark.nixl

LENGTH = 64 << 10


def _memory(data):
    return MemoryRegion(memoryview(bytearray(data)))


@pytest.fixture
def pattern():
    return random.Random(5).randbytes(LENGTH)


@pytest.fixture
def backend():
    from kvstrata.transfer.backends.nixl import NixlBackend

    return NixlBackend()


@pytest.fixture
def file_of(tmp_path):
    """Returns an open file with these bytes."""
    opened = []

    def make(data):
        path = tmp_path / f"region-{len(opened)}"
        path.write_bytes(data)
        opened.append(os.open(path, os.O_RDWR))
        return FileRegion(opened[-1])

    yield make
    for descriptor in opened:
        os.close(descriptor)


@pytest.fixture
def neighbour():
    """Another agent of this process, and a function that exports memory of it to a backend."""
    from kvstrata.transfer.backends.nixl import NixlAgent

    agent = NixlAgent()

    def invite(backend, region):
        return backend.agent.connect(agent.export({"end": region}))["end"]

    yield invite
    agent.close()


class NixlContract(TransferBackendContract):
    @pytest.fixture
    def backend(self, backend):
        return backend


class TestNixlMemory(NixlContract):
    @pytest.fixture
    def ends(self, pattern):
        source, target = _memory(pattern), _memory(bytes(LENGTH))
        return Ends(source, target, LENGTH, pattern, lambda: bytes(target.view))


class TestNixlRead(NixlContract):
    capability = ("file", "memory")

    @pytest.fixture
    def ends(self, pattern, file_of):
        target = _memory(bytes(LENGTH))
        return Ends(file_of(pattern), target, LENGTH, pattern, lambda: bytes(target.view))


class TestNixlWrite(NixlContract):
    capability = ("memory", "file")

    @pytest.fixture
    def ends(self, pattern, file_of):
        target = file_of(bytes(LENGTH))
        return Ends(
            _memory(pattern),
            target,
            LENGTH,
            pattern,
            lambda: os.pread(target.descriptor, LENGTH, 0),
        )


@pytest.fixture
def ring():
    from kvstrata.transfer.backends.nixl import NixlAgent, NixlBackend

    return NixlBackend(NixlAgent({"POSIX": {"use_uring": "true"}}))


class TestNixlReadThroughIoUring(TestNixlRead):
    @pytest.fixture
    def backend(self, ring):
        return ring


class TestNixlWriteThroughIoUring(TestNixlWrite):
    @pytest.fixture
    def backend(self, ring):
        return ring


class TestNixlPull(NixlContract):
    capability = ("peer", "memory")

    @pytest.fixture
    def ends(self, backend, neighbour, pattern):
        target = _memory(bytes(LENGTH))
        source = neighbour(backend, _memory(pattern))
        return Ends(source, target, LENGTH, pattern, lambda: bytes(target.view))


class TestNixlPush(NixlContract):
    capability = ("memory", "peer")

    @pytest.fixture
    def ends(self, backend, neighbour, pattern):
        target = _memory(bytes(LENGTH))
        there = neighbour(backend, target)
        return Ends(_memory(pattern), there, LENGTH, pattern, lambda: bytes(target.view))


class TestFaultyNixl(TestNixlRead):
    """Wrapped, it is what it was."""

    @pytest.fixture
    def backend(self, backend):
        return FaultyBackend(backend, Faults(late_polls=3), random.Random(1))
