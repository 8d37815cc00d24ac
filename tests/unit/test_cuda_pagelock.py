"""Page-locking in pieces, on a CUDA runtime without a GPU."""

from __future__ import annotations

import pytest

from kvstrata.core.errors import ConfigError
from kvstrata.testing.cuda import FakeCudaRuntime
from kvstrata.transfer.cuda.libcudart import LibCudart
from kvstrata.transfer.cuda.pagelock import PageLock

START = 0x10000


def test_the_whole_range_is_locked_once_in_pieces_that_tell_their_progress():
    runtime, told = FakeCudaRuntime(1000), []
    lock = PageLock(runtime, START, 100)
    lock.open(piece_bytes=40, progress=lambda done, total: told.append((done, total)))
    lock.open(piece_bytes=40)
    assert runtime.registered == {START: 40, START + 40: 40, START + 80: 20}
    assert told == [(40, 100), (80, 100), (100, 100)]
    assert lock.is_locked
    assert (lock.close(), lock.close()) == (0, 0)
    assert runtime.registered == {}
    assert not lock.is_locked


def test_a_refusal_in_the_middle_locks_nothing_and_names_the_remedy():
    runtime = FakeCudaRuntime(90)
    lock = PageLock(runtime, START, 100)
    with pytest.raises(
        ConfigError, match=r"80 of 100 bytes \(cudaErrorMemoryAllocation\).*memlock"
    ):
        lock.open(piece_bytes=40)
    assert runtime.registered == {}
    assert not lock.is_locked
    runtime.lockable_bytes = 100
    lock.open(piece_bytes=40)
    assert sum(runtime.registered.values()) == 100


def test_memory_that_somebody_else_locked_stays_theirs():
    runtime = FakeCudaRuntime(1000)
    assert runtime.host_register(START + 50, 10) == 0
    with pytest.raises(ConfigError, match=r"AlreadyRegistered.*one connector a process"):
        PageLock(runtime, START, 100).open(piece_bytes=40)
    assert runtime.registered == {START + 50: 10}


def test_a_piece_that_is_not_given_back_is_told_and_tried_again():
    runtime = FakeCudaRuntime(1000)
    lock = PageLock(runtime, START, 100)
    lock.open(piece_bytes=40)
    runtime.stuck.add(START + 40)
    assert lock.close() == 1
    assert lock.is_locked
    runtime.stuck.clear()
    assert lock.close() == 0
    assert runtime.registered == {}


def test_a_missing_library_is_told_with_its_remedy():
    with pytest.raises(ConfigError, match=r"libcudart-of-nobody.so.*nvidia-cuda-runtime"):
        LibCudart("libcudart-of-nobody.so")
