"""The fence around other movers under the laws of the seam, whatever is inside it."""

from __future__ import annotations

import mmap
import os
import random

import pytest

from kvstrata.storage.base import PAGE_BYTES, FileRegion, MemoryRegion
from kvstrata.testing.contracts.transfer_backend import Ends, TransferBackendContract
from kvstrata.testing.fakes import Faults, FaultyBackend
from kvstrata.testing.movers import PlainMover
from kvstrata.transfer.backends.guarded import GuardedBackend
from kvstrata.transfer.backends.posix import PosixBackend

LENGTH = 64 << 10


@pytest.fixture
def pattern():
    return random.Random(5).randbytes(LENGTH)


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


def _memory(data):
    mapped = memoryview(mmap.mmap(-1, len(data)))
    mapped[:] = data
    return MemoryRegion(mapped, page_aligned=True)


class _Read(TransferBackendContract):
    capability = ("file", "memory")

    @pytest.fixture
    def ends(self, pattern, file_of):
        target = _memory(bytes(LENGTH))
        return Ends(file_of(pattern), target, LENGTH, pattern, lambda: bytes(target.view))


class _Write(TransferBackendContract):
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


def _fence(inner, page_bytes=1):
    return GuardedBackend(inner, PosixBackend(), name="inner", page_bytes=page_bytes)


class TestPlainRead(_Read):
    """The plug-in itself, as its package would prove it."""

    @pytest.fixture
    def backend(self):
        return PlainMover(threads=2)


class TestPlainWrite(_Write):
    @pytest.fixture
    def backend(self):
        return PlainMover(threads=2)


class TestGuardedRead(_Read):
    """Every op goes to the backend inside."""

    @pytest.fixture
    def backend(self):
        return _fence(PlainMover(threads=2))


class TestGuardedWrite(_Write):
    @pytest.fixture
    def backend(self):
        return _fence(PlainMover(threads=2))


class TestGuardedPagesRead(_Read):
    """Whole pages go to the backend inside, the rest to our threads, in one transfer."""

    @pytest.fixture
    def backend(self):
        return _fence(PlainMover(threads=2), PAGE_BYTES)


class TestGuardedPagesWrite(_Write):
    @pytest.fixture
    def backend(self):
        return _fence(PlainMover(threads=2), PAGE_BYTES)


class TestGuardedLate(TestGuardedWrite):
    @pytest.fixture
    def backend(self):
        return _fence(FaultyBackend(PlainMover(), Faults(late_polls=4), random.Random(1)))


class TestGuardedNarrow(TestGuardedRead):
    """A backend that takes two transfers at a time refuses most; the fence offers them again."""

    @pytest.fixture
    def backend(self):
        return _fence(PlainMover(queue_transfers_max=2))


@pytest.mark.nixl
class TestGuardedNixlRead(_Read):
    @pytest.fixture
    def backend(self):
        return _fence(_nixl())


@pytest.mark.nixl
class TestGuardedNixlWrite(_Write):
    @pytest.fixture
    def backend(self):
        return _fence(_nixl())


def _nixl():
    from kvstrata.transfer.backends.nixl import NixlAgent, NixlBackend

    return NixlBackend(NixlAgent({"POSIX": {"use_aio": "true"}}))
