"""Every shipped backend under the laws of the seam, in each direction that it declares."""

from __future__ import annotations

import os
import random
import struct
import threading

import pytest

from kvstrata.storage.base import FileRegion, MemoryRegion
from kvstrata.storage.codecs import CodecSettings, make_chain
from kvstrata.testing.contracts.transfer_backend import Ends, TransferBackendContract
from kvstrata.testing.fakes import Faults, FaultyBackend
from kvstrata.testing.keyed import DelayedKeyedStore, MemoryKeyedStore
from kvstrata.transfer.backends.keyed import KeyedBackend, KeyedEnd, KeyedOp
from kvstrata.transfer.backends.memcpy import MemcpyBackend
from kvstrata.transfer.backends.posix import PosixBackend
from kvstrata.transfer.base import Completion, CopyOp, Outcome

LENGTH = 64 << 10


def _memory(data):
    return MemoryRegion(memoryview(bytearray(data)))


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


class TestMemcpy(TransferBackendContract):
    @pytest.fixture
    def backend(self):
        return MemcpyBackend(threads=2)

    @pytest.fixture
    def ends(self, pattern):
        source, target = _memory(pattern), _memory(bytes(LENGTH))
        return Ends(source, target, LENGTH, pattern, lambda: bytes(target.view))


class TestPosixRead(TransferBackendContract):
    capability = ("file", "memory")

    @pytest.fixture
    def backend(self):
        return PosixBackend(threads=2)

    @pytest.fixture
    def ends(self, pattern, file_of):
        target = _memory(bytes(LENGTH))
        return Ends(file_of(pattern), target, LENGTH, pattern, lambda: bytes(target.view))


class TestPosixWrite(TransferBackendContract):
    capability = ("memory", "file")

    @pytest.fixture
    def backend(self):
        return PosixBackend(threads=2)

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


class TestFaultyWithoutFaults(TestPosixRead):
    @pytest.fixture
    def backend(self):
        return FaultyBackend(PosixBackend(threads=2), Faults(), random.Random(1))


class TestFaultyMemcpy(TestMemcpy):
    @pytest.fixture
    def backend(self):
        return FaultyBackend(MemcpyBackend(threads=2), Faults(), random.Random(1))


class TestFaultyLate(TestPosixWrite):
    """Late is no fault: a completion may come whenever it likes, once."""

    @pytest.fixture
    def backend(self):
        return FaultyBackend(PosixBackend(threads=2), Faults(late_polls=5), random.Random(1))


def _key(source_offset, target_offset, length):
    """Return a key that no other move has; what it says is how a test finds its bytes again."""
    return struct.pack("<iii4x", source_offset, target_offset, length)


class _Keyed(TransferBackendContract):
    """A move of the suite as a keyed op; the chain and the store are a subclass's."""

    chain = "none"

    @pytest.fixture
    def backend(self):
        return KeyedBackend(threads=4, queue_transfers_max=48)

    @pytest.fixture
    def end(self):
        return self.make_end(MemoryKeyedStore())

    def make_end(self, store):
        if self.chain != "none":
            for module in ("zstandard", "cryptography"):
                pytest.importorskip(module, reason=f"no {module} installed (kvstrata[codecs])")
        settings = CodecSettings("int8", bytes(32))
        return KeyedEnd(store, make_chain(self.chain, settings), b"f" * 16)


class TestKeyedWrite(_Keyed):
    capability = ("memory", "keyed")

    @pytest.fixture
    def ends(self, pattern, end):
        return Ends(_memory(pattern), end, LENGTH, pattern, lambda: self.read(end))

    def op(self, source_offset, target_offset, length, first=0):
        key = _key(source_offset, target_offset, length)
        offset = source_offset if target_offset >= 0 else -1  # a store has no byte -1 either
        return KeyedOp(key, offset, length, first)

    def read(self, end):
        """Every block that is in the store, each where its move wanted it."""
        found = bytearray(LENGTH)
        reader = KeyedBackend(threads=1)
        for entry in end.store.entries():
            _, target, length = struct.unpack("<iii4x", entry.key)
            into = _memory(bytes(length))
            assert reader.submit(1, [KeyedOp(entry.key, 0, length)], end, into)
            assert self.drain(reader, [1])[1].outcome is Outcome.DONE
            found[target : target + length] = into.view
        reader.close()
        return bytes(found)


class TestKeyedRead(_Keyed):
    capability = ("keyed", "memory")

    @pytest.fixture
    def ends(self, pattern, end, monkeypatch):
        target = _memory(bytes(LENGTH))
        writer = KeyedBackend(threads=1)
        source = _memory(pattern)

        def op(source_offset, target_offset, length, first=0):
            """What is read must have been written; what has no bytes to read is a miss."""
            key = _key(source_offset, 0, length)
            if 0 <= source_offset <= LENGTH - length and not end.store.exists([key])[0]:
                written = KeyedOp(key, source_offset, length)
                assert writer.submit(1, [written], source, end)
                assert self.drain(writer, [1])[1].outcome is Outcome.DONE
            return KeyedOp(key, target_offset, length, first)

        monkeypatch.setattr(self, "op", op)
        yield Ends(end, target, LENGTH, pattern, lambda: bytes(target.view))
        writer.close()


class TestKeyedWriteEncoded(TestKeyedWrite):
    chain = "zstd+aes"


class TestKeyedReadEncoded(TestKeyedRead):
    chain = "zstd+aes"


class TestKeyedReadDelayed(TestKeyedRead):
    @pytest.fixture
    def end(self):
        return self.make_end(DelayedKeyedStore(MemoryKeyedStore(), 0.002, random.Random(1)))


class TestKeyedWriteDelayed(TestKeyedWrite):
    @pytest.fixture
    def end(self):
        return self.make_end(DelayedKeyedStore(MemoryKeyedStore(), 0.002, random.Random(1)))


class TestFaultyKeyedWrite(TestKeyedWrite):
    @pytest.fixture
    def backend(self):
        inner = KeyedBackend(threads=4, queue_transfers_max=48)
        return FaultyBackend(inner, Faults(), random.Random(1))


OPS = [CopyOp(at, at, 1024, at // 1024) for at in range(0, LENGTH, 1024)]


def _spoil(faults, seed, source, target):
    """Run OPS under these faults; return the completion."""
    backend = FaultyBackend(PosixBackend(), faults, random.Random(seed))
    assert backend.submit(1, OPS, source, target)
    try:
        return TransferBackendContract().drain(backend, [1])[1]
    finally:
        backend.close()


def _differing(found, pattern):
    """Return the bits that differ, by op."""
    return {
        op.first: sum(
            (one ^ other).bit_count()
            for one, other in zip(
                found[op.target_offset :][:1024], pattern[op.source_offset :][:1024], strict=True
            )
        )
        for op in OPS
    }


def test_ordered_failures_are_reported(pattern, file_of):
    completion = _spoil(Faults(fail=0.5), 2, file_of(pattern), _memory(bytes(LENGTH)))
    assert completion.outcome is Outcome.FAILED
    assert 10 < len(completion.failed_ops) < 54
    assert completion.reason


def test_ordered_flips_are_one_bit_each_and_silent(pattern, file_of):
    target = _memory(bytes(LENGTH))
    completion = _spoil(Faults(flip=0.5), 2, file_of(pattern), target)
    assert completion.outcome is Outcome.DONE
    bits = _differing(bytes(target.view), pattern)
    assert set(bits.values()) == {0, 1}
    assert 10 < sum(bits.values()) < 54


def test_ordered_tears_leave_half_a_write_and_are_silent(pattern, file_of):
    target = file_of(bytes(LENGTH))
    completion = _spoil(Faults(tear=0.5), 2, _memory(pattern), target)
    assert completion == Completion(1, Outcome.DONE)
    found = os.pread(target.descriptor, LENGTH, 0)
    torn = 0
    for op in OPS:
        want = pattern[op.source_offset :][:1024]
        got = found[op.target_offset :][:1024]
        assert got in {want, want[:512] + bytes(512)}
        torn += got != want
    assert 10 < torn < 54


def test_the_same_luck_gives_the_same_faults(pattern, file_of):
    worlds = []
    for seed in (7, 7, 8):
        target = _memory(bytes(LENGTH))
        done = _spoil(Faults(fail=0.3, flip=0.3), seed, file_of(pattern), target)
        worlds.append((done.failed_ops, bytes(target.view)))
    assert worlds[0] == worlds[1] != worlds[2]


def test_late_completions_wait_for_that_many_polls(pattern, told):
    inner = MemcpyBackend(notify=told.release)
    backend = FaultyBackend(inner, Faults(late_polls=3), random.Random(1))
    backend.submit(1, [CopyOp(0, 0, 8)], _memory(pattern), _memory(bytes(LENGTH)))
    assert told.acquire(timeout=10)
    assert [len(backend.poll()) for _ in range(6)] == [0, 0, 0, 1, 0, 0]
    backend.close()


@pytest.fixture
def told():
    return threading.Semaphore(0)
