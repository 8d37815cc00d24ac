"""What the shipped backends promise beyond the laws of their seam: bounds, threads, bad ranges."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest

from kvstrata.core.errors import TransferError
from kvstrata.storage.base import FileRegion, MemoryRegion
from kvstrata.storage.seal import seal
from kvstrata.transfer.backends.memcpy import MemcpyBackend, copy_bytes
from kvstrata.transfer.backends.posix import PosixBackend
from kvstrata.transfer.backends.sealer import SealerBackend, SealRequest
from kvstrata.transfer.backends.threaded import ThreadedBackend
from kvstrata.transfer.base import Completion, CopyOp, Outcome

LENGTH = 4096


def memory(data):
    return MemoryRegion(memoryview(bytearray(data)))


class Gated(ThreadedBackend):
    """Ops wait at a gate, so that a test decides what is queued, running and done."""

    name = "gated"

    def __init__(self, **settings):
        self.begun = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.moved = []
        super().__init__(**settings)

    def move(self, op, source, target):
        self.begun.release()
        assert self.gate.acquire(timeout=10)
        if op.length == 0:
            raise TransferError("ordered to fail", retryable=True)
        self.moved.append((op, source, target))

    def capabilities(self):
        return frozenset({("memory", "memory")})

    def open_gate(self):
        self.gate.release(1000)


@pytest.fixture
def close_later():
    """Close these backends with the test, and see that their threads end."""
    made = []

    def later(backend):
        made.append(backend)
        return backend

    yield later
    for backend in made:
        if isinstance(backend, Gated):
            backend.open_gate()
        backend.close()
        assert not any(thread.is_alive() for thread in backend._threads)


@pytest.fixture
def finish(eventually):
    """Poll until so many transfers have completed."""

    def collect(backend, count):
        found = []

        def enough():
            found.extend(backend.poll())
            return len(found) >= count

        eventually(enough)
        assert len(found) == count
        return {completion.transfer: completion for completion in found}

    return collect


class TestThreaded:
    def test_full_queue_refuses_and_does_nothing(self, close_later, finish):
        backend = close_later(Gated(threads=1, queue_transfers_max=2))
        op = CopyOp(0, 0, 1)
        assert backend.submit(1, [op], "a", "b")
        assert backend.begun.acquire(timeout=10)  # 1 runs, so the queue is empty
        assert backend.submit(2, [op], "a", "b")
        assert backend.submit(3, [op], "a", "b")
        assert not backend.submit(4, [op], "refused", "refused")
        backend.open_gate()
        assert set(finish(backend, 3)) == {1, 2, 3}
        assert [source for _, source, _ in backend.moved] == ["a"] * 3
        assert backend.submit(4, [op], "a", "b"), "a refused one may be submitted again"
        assert set(finish(backend, 1)) == {4}

    def test_same_name_twice_at_once_is_a_bug(self, close_later):
        backend = close_later(Gated())
        backend.submit(1, [CopyOp(0, 0, 1)], None, None)
        with pytest.raises(AssertionError, match="already under way"):
            backend.submit(1, [CopyOp(0, 0, 1)], None, None)

    def test_cancel_skips_what_has_not_begun(self, close_later, finish):
        backend = close_later(Gated(threads=1))
        ops = [CopyOp(0, 0, 1, index) for index in range(3)]
        backend.submit(1, ops, None, None)
        backend.submit(2, ops, None, None)
        assert backend.begun.acquire(timeout=10)
        backend.cancel(1)
        backend.cancel(2)
        backend.open_gate()
        done = finish(backend, 2)
        for name in (1, 2):
            assert done[name] == Completion(name, Outcome.CANCELLED, (0, 1, 2), "cancelled")
        assert [op.first for op, _, _ in backend.moved] == [0], "only the op that had begun"

    def test_cancel_of_one_leaves_the_others(self, close_later, finish):
        backend = close_later(Gated(threads=1))
        for name in (1, 2, 3):
            backend.submit(name, [CopyOp(0, 0, 1)], None, None)
        backend.cancel(2)
        backend.open_gate()
        done = finish(backend, 3)
        assert {name: each.outcome for name, each in done.items()} == {
            1: Outcome.DONE,
            2: Outcome.CANCELLED,
            3: Outcome.DONE,
        }

    def test_a_cancelled_name_may_be_used_again(self, close_later, finish):
        backend = close_later(Gated(threads=1))
        backend.submit(1, [CopyOp(0, 0, 1)] * 2, None, None)
        backend.cancel(1)
        backend.open_gate()
        finish(backend, 1)
        backend.submit(1, [CopyOp(0, 0, 1)], None, None)
        assert finish(backend, 1)[1].outcome is Outcome.DONE

    def test_failed_ops_are_named_with_the_first_reason(self, close_later, finish):
        backend = close_later(Gated(threads=1))
        backend.open_gate()
        lengths = (1, 0, 1, 0)
        backend.submit(1, [CopyOp(0, 0, each) for each in lengths], None, None)
        done = finish(backend, 1)[1]
        assert done == Completion(1, Outcome.FAILED, (1, 3), "ordered to fail")
        assert len(backend.moved) == 2

    def test_close_ends_what_runs_drops_what_waits_and_loses_nothing(
        self, close_later, finish, eventually
    ):
        backend = close_later(Gated(threads=2))
        for name in range(10):
            backend.submit(name, [CopyOp(0, 0, 1)], None, None)
        assert backend.begun.acquire(timeout=10)
        assert backend.begun.acquire(timeout=10)
        closer = threading.Thread(target=backend.close)
        closer.start()
        eventually(lambda: len(backend._cancelled) == 10)
        backend.open_gate()
        closer.join(10)
        assert not closer.is_alive()
        done = finish(backend, 10)
        assert {name for name, each in done.items() if each.outcome is Outcome.DONE} == {0, 1}
        assert sum(each.outcome is Outcome.CANCELLED for each in done.values()) == 8
        assert not backend.submit(11, [CopyOp(0, 0, 1)], None, None)

    def test_close_with_a_full_queue_does_not_hang(self, close_later, finish):
        backend = close_later(Gated(threads=2, queue_transfers_max=1))
        name = 0
        for name in (1, 2):
            backend.submit(name, [CopyOp(0, 0, 1)], None, None)
            assert backend.begun.acquire(timeout=10)
        assert backend.submit(3, [CopyOp(0, 0, 1)], None, None)
        backend.open_gate()
        closer = threading.Thread(target=backend.close)
        closer.start()
        closer.join(10)
        assert not closer.is_alive()
        assert len(finish(backend, 3)) == 3

    def test_an_empty_transfer_completes(self, close_later, finish):
        backend = close_later(Gated())
        backend.submit(1, [], None, None)
        assert finish(backend, 1)[1] == Completion(1, Outcome.DONE)

    def test_news_come_after_the_completion_can_be_polled(self, close_later):
        told = threading.Semaphore(0)
        backend = close_later(Gated(threads=1, notify=told.release))
        backend.open_gate()
        for name in range(20):
            backend.submit(name, [CopyOp(0, 0, 1)], None, None)
            assert told.acquire(timeout=10)
            assert [each.transfer for each in backend.poll()] == [name]

    def test_threads_carry_their_backend_s_name(self, close_later):
        backend = close_later(Gated(threads=2))
        names = {thread.name for thread in backend._threads}
        assert names == {"kvstrata-gated-0", "kvstrata-gated-1"}


OUTSIDE = [(LENGTH, 1), (LENGTH - 1, 2), (0, LENGTH + 1), (-1, 1), (-LENGTH, 16), (1 << 62, 8)]


MINUS_ONE = (-1, 1)


@pytest.fixture
def open_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (LENGTH // 256))
    descriptor = os.open(path, os.O_RDWR)
    yield FileRegion(descriptor)
    os.close(descriptor)


class TestRanges:
    """An op outside a region fails at once: it never hangs, wraps round or moves a part."""

    @pytest.mark.parametrize(("offset", "length"), OUTSIDE)
    def test_memcpy(self, close_later, finish, offset, length):
        backend = close_later(MemcpyBackend())
        source, target = memory(b"s" * LENGTH), memory(bytes(LENGTH))
        for name, op in enumerate([CopyOp(offset, 0, length), CopyOp(0, offset, length)]):
            backend.submit(name, [op], source, target)
            done = finish(backend, 1)[name]
            assert (done.outcome, done.failed_ops) == (Outcome.FAILED, (0,))
        assert bytes(target.view) == bytes(LENGTH)

    @pytest.mark.parametrize(("offset", "length"), OUTSIDE)
    def test_posix_memory_side(self, close_later, finish, open_file, offset, length):
        backend = close_later(PosixBackend())
        region = memory(b"m" * LENGTH)
        before = os.pread(open_file.descriptor, 2 * LENGTH, 0)
        backend.submit(0, [CopyOp(offset, 0, length)], region, open_file)
        assert finish(backend, 1)[0].failed_ops == (0,)
        assert os.pread(open_file.descriptor, 2 * LENGTH, 0) == before
        backend.submit(1, [CopyOp(0, offset, length)], open_file, region)
        assert finish(backend, 1)[1].failed_ops == (0,)
        assert bytes(region.view) == b"m" * LENGTH

    @pytest.mark.parametrize(
        ("offset", "length"), [(LENGTH, 1), (-LENGTH, 1), MINUS_ONE, (1 << 62, 8)]
    )
    def test_posix_reads_no_file_past_its_end(self, close_later, finish, open_file, offset, length):
        backend = close_later(PosixBackend())
        region = memory(b"m" * LENGTH)
        backend.submit(0, [CopyOp(offset, 0, length)], open_file, region)
        done = finish(backend, 1)[0]
        assert (done.outcome, done.failed_ops) == (Outcome.FAILED, (0,))
        assert bytes(region.view) == b"m" * LENGTH

    def test_posix_says_how_much_of_a_file_was_missing(self, close_later, finish, open_file):
        backend = close_later(PosixBackend())
        region = memory(bytes(LENGTH))
        backend.submit(0, [CopyOp(LENGTH - 10, 0, 64)], open_file, region)
        assert "file ended 54 bytes early" in finish(backend, 1)[0].reason

    def test_posix_between_regions_that_it_does_not_serve(self, close_later, finish, open_file):
        backend = close_later(PosixBackend())
        for name, (one, other) in enumerate([(memory(b"a"), memory(b"b")), (open_file, open_file)]):
            backend.submit(name, [CopyOp(0, 0, 1)], one, other)
            assert finish(backend, 1)[name].outcome is Outcome.FAILED


class TestPosix:
    def test_short_reads_and_writes_are_continued(self, close_later, finish, monkeypatch):
        content, region = bytearray(range(250)), memory(bytes(250))

        def preadv(_, buffers, offset):
            count = min(7, len(buffers[0]))
            buffers[0][:count] = content[offset : offset + count]
            return count

        def pwritev(_, buffers, offset):
            count = min(7, len(buffers[0]))
            content[offset : offset + count] = buffers[0][:count]
            return count

        monkeypatch.setattr(os, "preadv", preadv)
        monkeypatch.setattr(os, "pwritev", pwritev)
        backend = close_later(PosixBackend())
        backend.submit(1, [CopyOp(10, 5, 100)], FileRegion(99), region)
        assert finish(backend, 1)[1].outcome is Outcome.DONE
        assert bytes(region.view) == bytes(5) + bytes(range(10, 110)) + bytes(145)
        backend.submit(2, [CopyOp(5, 110, 100)], region, FileRegion(99))
        assert finish(backend, 1)[2].outcome is Outcome.DONE
        assert content == bytes(range(110)) + bytes(range(10, 110)) + bytes(range(210, 250))

    def test_a_full_disk_fails_the_op_with_the_system_s_words(
        self, close_later, finish, monkeypatch
    ):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwritev", full)
        backend = close_later(PosixBackend())
        backend.submit(1, [CopyOp(0, 0, 8)], memory(bytes(8)), FileRegion(99))
        done = finish(backend, 1)[1]
        assert done.outcome is Outcome.FAILED
        assert "No space left" in done.reason


class TestSealer:
    def test_each_op_gets_the_seal_of_its_block(self, close_later, finish):
        backend = close_later(SealerBackend(threads=2))
        data = os.urandom(LENGTH)
        request = SealRequest(memory(data), (b"a" * 32, b"b" * 32, b"a" * 32), [b""] * 3)
        ops = [CopyOp(0, 0, 100, 0), CopyOp(0, 0, 100, 1), CopyOp(3000, 0, 1096, 2)]
        backend.submit(1, ops, request, None)
        assert finish(backend, 1)[1].outcome is Outcome.DONE
        assert request.seals == [
            seal(b"a" * 32, data[:100]),
            seal(b"b" * 32, data[:100]),
            seal(b"a" * 32, data[3000:]),
        ]
        assert bytes(request.region.view) == data


class TestMemcpy:
    """Ops of more than 2 MiB are cut into pieces, which nobody sees."""

    LENGTH = (5 << 20) + 7

    def ends(self):
        source = np.random.default_rng(1).integers(0, 256, 2 * self.LENGTH, np.uint8)
        target = np.zeros(2 * self.LENGTH, np.uint8)
        return source, target, MemoryRegion(memoryview(source)), MemoryRegion(memoryview(target))

    def test_long_ops_arrive_whole(self, close_later, finish):
        backend = close_later(MemcpyBackend(threads=2))
        source, target, *regions = self.ends()
        ops = [CopyOp(3, self.LENGTH - 1, self.LENGTH, 0), CopyOp(0, 0, 5, 1)]
        assert backend.submit(1, ops, *regions)
        assert finish(backend, 1)[1].outcome is Outcome.DONE
        assert (target[:5] == source[:5]).all()
        assert not target[5 : self.LENGTH - 1].any()
        assert (target[self.LENGTH - 1 : -1] == source[3 : 3 + self.LENGTH]).all()
        assert target[-1] == 0

    def test_several_threads_share_one_op(self, close_later, finish):
        class Noting(MemcpyBackend):
            def move(self, op, source, target):
                moved.append((threading.current_thread().name, op.length))
                together.wait(5)
                super().move(op, source, target)

        moved, together = [], threading.Barrier(2)
        backend = close_later(Noting(threads=2))
        *_, source, target = self.ends()
        assert backend.submit(1, [CopyOp(0, 0, 4 << 20)], source, target)
        assert finish(backend, 1)[1].outcome is Outcome.DONE
        assert len({name for name, _ in moved}) == 2
        assert sorted(length for _, length in moved) == [2 << 20, 2 << 20]

    def test_a_failed_piece_is_its_whole_op(self, close_later, finish):
        class Failing(MemcpyBackend):
            def move(self, op, source, target):
                if op.source_offset == 2 << 20:
                    raise OSError("torn")
                super().move(op, source, target)

        backend = close_later(Failing(threads=2))
        *_, source, target = self.ends()
        ops = [CopyOp(0, 0, 5), CopyOp(0, 0, self.LENGTH), CopyOp(0, self.LENGTH, self.LENGTH)]
        ops.append(CopyOp(self.LENGTH, 0, 9))
        assert backend.submit(1, ops, source, target)
        assert finish(backend, 1)[1].failed_ops == (1, 2)
        assert backend.submit(1, ops[:1], source, target), "the number may be used again"
        assert finish(backend, 1)[1].outcome is Outcome.DONE

    def test_a_long_op_that_ends_outside_moves_nothing(self, close_later, finish):
        backend = close_later(MemcpyBackend(threads=2))
        _, target, *regions = self.ends()
        assert backend.submit(1, [CopyOp(self.LENGTH + 1, 0, self.LENGTH)], *regions)
        done = finish(backend, 1)[1]
        assert (done.outcome, done.failed_ops) == (Outcome.FAILED, (0,))
        assert not target.any()

    def test_within_one_region_an_overlap_is_kept(self, close_later, finish):
        backend = close_later(MemcpyBackend(threads=2))
        source, _, region, _ = self.ends()
        before = source.copy()
        assert backend.submit(1, [CopyOp(0, 4096, self.LENGTH)], region, region)
        assert finish(backend, 1)[1].outcome is Outcome.DONE
        assert (source[4096 : 4096 + self.LENGTH] == before[: self.LENGTH]).all()

    def test_others_run_while_it_copies(self):
        """A copy of 256 MiB takes tens of ms, for which nobody may be stopped."""
        length = 256 << 20
        source, target = np.ones(length, np.uint8), np.ones(length, np.uint8)
        regions = MemoryRegion(memoryview(source)), MemoryRegion(memoryview(target))

        def longest_pause(move):
            """Return the share of the copy's time for which this thread could not run."""
            times = []

            def run():
                times.append(time.perf_counter())
                move()
                times.append(time.perf_counter())

            worker = threading.Thread(target=run)
            last, pause = time.perf_counter(), 0.0
            worker.start()
            while len(times) < 2:
                now = time.perf_counter()
                last, pause = now, max(pause, now - last)
            worker.join()
            return max(pause, time.perf_counter() - last) / (times[1] - times[0])

        def copy():
            copy_bytes(regions[0], 0, regions[1], 0, length)

        assert min(longest_pause(copy) for _ in range(5)) < 0.5

        def keep():
            regions[1].view[:] = regions[0].view

        assert max(longest_pause(keep) for _ in range(5)) > 0.8, "this test would see it"


def test_copy_bytes_copies_exactly_the_range():
    target = memory(bytes(10))
    copy_bytes(memory(b"0123456789"), 2, target, 5, 3)
    assert bytes(target.view) == b"\0\0\0\0\x00234\0\0"
