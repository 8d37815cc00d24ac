"""A mover that does what it must not: what the executor sees, and what becomes of memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import threading

import pytest

from kvstrata.core.ids import TransferId
from kvstrata.storage.base import PAGE_BYTES, FileRegion, MemoryRegion, SlotGrid, StripedRegion
from kvstrata.testing.movers import PlainMover
from kvstrata.transfer.backends import guarded
from kvstrata.transfer.backends.guarded import GuardedBackend
from kvstrata.transfer.backends.posix import PosixBackend
from kvstrata.transfer.base import Completion, CopyOp, Outcome

PAGES = 8
LENGTH = PAGES * PAGE_BYTES
OPS = [CopyOp(at, at, PAGE_BYTES, at // PAGE_BYTES) for at in range(0, LENGTH, PAGE_BYTES)]
DONE, FAILED, CANCELLED = Outcome.DONE, Outcome.FAILED, Outcome.CANCELLED


class Puppet:
    """Does only what a test tells it to."""

    def __init__(self):
        self.given = []
        self.said = []
        self.accepts = True
        self.raises = {}
        self.cancelled = []
        self.hang = threading.Event()
        self.hang.set()

    def _act(self, verb):
        if verb in self.raises:
            raise self.raises[verb]

    def submit(self, transfer, ops, source, target):
        self._act("submit")
        if self.accepts:
            self.given.append((transfer, list(ops), source, target))
        return self.accepts

    def poll(self):
        self._act("poll")
        said, self.said = self.said, []
        return said

    def cancel(self, transfer):
        self._act("cancel")
        self.cancelled.append(transfer)

    def capabilities(self):
        return frozenset({("file", "memory"), ("memory", "file")})

    def close(self):
        self._act("close")
        self.hang.wait(20)

    def say(self, outcome=DONE, failed=(), reason="", place=0):
        self.said.append(Completion(self.given[place][0], outcome, failed, reason))


@pytest.fixture
def puppet():
    made = Puppet()
    yield made
    made.hang.set()


@pytest.fixture
def fence(puppet):
    """A fence with short limits around the puppet."""
    made = GuardedBackend(puppet, PosixBackend(), name="puppet", stall_s=0.05, close_timeout_s=0.1)
    yield made
    made.close()


@pytest.fixture
def pattern():
    return random.Random(3).randbytes(LENGTH)


@pytest.fixture
def memory(pattern):
    mapped = memoryview(mmap.mmap(-1, LENGTH))
    mapped[:] = pattern
    return MemoryRegion(mapped, page_aligned=True)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "blocks"
    path.write_bytes(bytes(LENGTH))
    descriptor = os.open(path, os.O_RDWR)
    yield FileRegion(descriptor)
    os.close(descriptor)


def read(fence, file, memory, name=1, ops=OPS):
    assert fence.submit(TransferId(name), ops, file, memory)


class TestWhatIsSaid:
    @pytest.mark.parametrize(
        ("outcome", "failed", "want"),
        [
            (DONE, (), (DONE, ())),
            (FAILED, (2, 5), (FAILED, (2, 5))),
            (DONE, (3,), (FAILED, (3,))),
            (FAILED, (), (FAILED, tuple(range(PAGES)))),
            (FAILED, (PAGES,), (FAILED, tuple(range(PAGES)))),
            (FAILED, (-1,), (FAILED, tuple(range(PAGES)))),
            (FAILED, ("two",), (FAILED, tuple(range(PAGES)))),
            (FAILED, None, (FAILED, tuple(range(PAGES)))),
            (CANCELLED, (), (CANCELLED, tuple(range(PAGES)))),
            ("fine", (), (FAILED, tuple(range(PAGES)))),
        ],
    )
    def test_is_believed_only_where_it_makes_sense(
        self, fence, puppet, file, memory, outcome, failed, want
    ):
        read(fence, file, memory)
        puppet.say(outcome, failed, reason="as told")
        (done,) = fence.poll()
        assert (done.outcome, done.failed_ops) == want
        assert bool(done.reason) == bool(done.failed_ops)

    def test_ends_of_nothing_are_counted_and_ignored(self, fence, puppet, file, memory):
        read(fence, file, memory)
        puppet.said = [Completion(TransferId(77), DONE), "done", None, Completion([], DONE)]
        assert fence.poll() == []
        puppet.say()
        puppet.say()  # a second end
        assert [done.outcome for done in fence.poll()] == [DONE]
        assert fence.statistics()["odd_completions"] == 5
        read(fence, file, memory, name=2)
        puppet.say(place=0)  # the end of one that has ended is not the next one's
        assert fence.poll() == []
        puppet.say(place=1)
        assert [done.transfer for done in fence.poll()] == [2]

    def test_a_failure_is_the_files_until_it_is_left_alone(self, fence, puppet, file, memory):
        for name in range(3):
            read(fence, file, memory, name)
            puppet.say(FAILED, (0,), "bad sector", place=name)
            assert [done.failed_ops for done in fence.poll()] == [(0,)]
        assert (file.health.failed, file.health.read_errors) == (True, 3)
        assert "backend puppet: bad sector" in file.health.reason
        read(fence, file, memory, 9)
        assert len(puppet.given) == 3, "a file that is left alone is not touched"
        assert [done.failed_ops for done in fence.poll()] == [tuple(range(PAGES))]

    def test_a_good_one_between_clears_the_count(self, fence, puppet, file, memory):
        for name, outcome in enumerate([FAILED, FAILED, DONE, FAILED, FAILED]):
            read(fence, file, memory, name)
            puppet.say(outcome, place=name)
            fence.poll()
        assert not file.health.failed


class TestWhatIsRefused:
    def test_waits_while_others_are_under_way(self, fence, puppet, file, memory):
        read(fence, file, memory, 1)
        puppet.accepts = False
        read(fence, file, memory, 2)
        assert fence.poll() == []
        puppet.accepts = True
        assert fence.poll() == []
        assert len(puppet.given) == 2
        puppet.say(place=0)
        puppet.say(place=1)
        assert {done.transfer for done in fence.poll()} == {1, 2}

    def test_fails_where_there_is_nothing_to_wait_for(self, fence, puppet, file, memory):
        puppet.accepts = False
        read(fence, file, memory)
        (done,) = fence.poll()
        assert (done.outcome, done.reason) == (FAILED, "backend puppet accepts no transfer")
        assert not file.health.failed

    def test_is_ended_by_cancel_and_by_close(self, fence, puppet, file, memory):
        read(fence, file, memory, 1)
        puppet.accepts = False
        read(fence, file, memory, 2)
        read(fence, file, memory, 3)
        fence.cancel(TransferId(2))
        assert [(done.transfer, done.outcome) for done in fence.poll()] == [(2, CANCELLED)]
        fence.close()
        ended = {done.transfer: done.outcome for done in fence.poll()}
        assert ended == {1: CANCELLED, 3: CANCELLED}

    def test_the_queue_has_a_bound(self, puppet, file, memory):
        fence = GuardedBackend(puppet, PosixBackend(), name="puppet", queue_transfers_max=2)
        read(fence, file, memory, 1)
        read(fence, file, memory, 2)
        assert not fence.submit(TransferId(3), OPS, file, memory)
        puppet.say()
        fence.poll()
        read(fence, file, memory, 3)
        fence.close()


class TestWhatRaises:
    @pytest.mark.parametrize("verb", ["submit", "poll", "cancel"])
    def test_is_given_no_more_work_and_what_it_has_stays_under_way(
        self, fence, puppet, file, memory, verb
    ):
        read(fence, file, memory, 1)
        puppet.raises = {verb: LookupError("odd")}
        read(fence, file, memory, 2)
        fence.cancel(TransferId(1))
        assert fence.poll() == [], "its bytes may still arrive: no slot may be given away"
        read(fence, file, memory, 3)
        (done,) = fence.poll()
        assert (done.transfer, done.outcome) == (3, FAILED)
        assert "backend puppet failed: LookupError: odd" in done.reason
        assert fence.statistics()["left_alone"] == done.reason
        puppet.raises = {}
        puppet.say(place=0)
        assert [done.transfer for done in fence.poll()] == [1]

    def test_a_close_that_raises_ends(self, fence, puppet):
        puppet.raises = {"close": LookupError("odd")}
        fence.close()
        fence.close()


class TestWhatHangs:
    def test_is_given_no_more_work_until_something_ends(
        self, fence, puppet, file, memory, eventually
    ):
        read(fence, file, memory, 1)
        eventually(lambda: fence.statistics()["left_alone"])
        read(fence, file, memory, 2)
        (done,) = fence.poll()
        assert (done.transfer, done.outcome) == (2, FAILED)
        assert "ended nothing for" in done.reason
        puppet.say()
        assert [done.transfer for done in fence.poll()] == [1]
        read(fence, file, memory, 3)
        puppet.say(place=1)
        assert [done.outcome for done in fence.poll()] == [DONE]

    def test_close_leaves_it_behind_with_its_memory(
        self, puppet, file, pattern, monkeypatch, tmp_path
    ):
        monkeypatch.setattr(guarded, "_kept", [])
        mapped = mmap.mmap(-1, LENGTH)
        view = memoryview(mapped)
        view[:] = pattern
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        fence = GuardedBackend(puppet, PosixBackend(), name="puppet", close_timeout_s=0.05)
        read(fence, file, MemoryRegion(view, page_aligned=True))
        puppet.hang.clear()
        puppet.raises = {"poll": AssertionError("asked while it closes")}
        fence.close()
        (done,) = fence.poll()
        assert not fence.statistics()["left_alone"], "it was not asked again"
        assert (done.outcome, done.failed_ops) == (CANCELLED, tuple(range(PAGES)))
        given = puppet.given[0][2]
        puppet.given.clear()  # a driver knows an address, which keeps nothing
        view.release()
        with pytest.raises(BufferError):
            mapped.close()
        ctypes.memmove(address, b"late", 4)  # no crash: it is still mapped
        other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
        assert os.fstat(given.descriptor).st_ino == os.fstat(file.descriptor).st_ino
        assert given.descriptor not in {other, file.descriptor}
        os.close(other)

    def test_a_file_that_its_store_closed_is_still_the_same_file(
        self, puppet, memory, pattern, tmp_path
    ):
        """The store's number may come to mean another file while the mover has writes left."""
        first, second = (os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in "ab")
        fence = GuardedBackend(puppet, PosixBackend(), name="puppet")
        assert fence.submit(TransferId(1), OPS, memory, FileRegion(first))
        os.dup2(second, first)
        _, ops, source, target = puppet.given[0]
        for op in ops:
            os.pwritev(target.descriptor, [source.view[op.source_offset :][: op.length]],
                       op.target_offset)  # fmt: skip
        assert (tmp_path / "a").read_bytes() == pattern
        assert (tmp_path / "b").read_bytes() == b""
        puppet.say()
        fence.poll()
        fence.close()
        for descriptor in (first, second):
            os.close(descriptor)


class TestWhatItIsGiven:
    def test_only_whole_pages_and_the_direct_descriptor(self, fence, puppet, file, memory):
        direct = FileRegion(file.descriptor, os.dup(file.descriptor))
        ops = [OPS[0], CopyOp(PAGE_BYTES, PAGE_BYTES, 100, 1), OPS[2]]
        assert fence.submit(TransferId(1), ops, memory, direct)
        ((_, given, source, target),) = puppet.given
        assert [op.source_offset for op in given] == [0, 2 * PAGE_BYTES]
        assert source is memory
        assert target.direct == target.descriptor not in {file.descriptor, direct.direct}
        os.close(direct.direct)

    def test_nothing_outside_its_regions(self, fence, puppet, file, memory):
        ops = [
            OPS[0],
            CopyOp(-PAGE_BYTES, 0, PAGE_BYTES),
            CopyOp(0, -PAGE_BYTES, PAGE_BYTES),
            CopyOp(0, LENGTH, PAGE_BYTES),
            CopyOp(0, 0, -PAGE_BYTES),
        ]
        read(fence, file, memory, ops=ops)
        assert puppet.given[0][1] == [OPS[0]]
        puppet.say()
        (done,) = fence.poll()
        assert done.failed_ops == (1, 2, 3, 4)
        assert fence.submit(TransferId(2), OPS, memory, memory)
        assert [done.failed_ops for done in fence.poll()] == [tuple(range(PAGES))]

    def test_a_stripe_is_cut_into_its_files_and_one_that_fails_fails_its_own(
        self, tmp_path, memory, pattern
    ):
        class OneBad(PlainMover):
            def move(self, op, source, target):
                if os.fstat(target.descriptor).st_ino == bad:
                    raise OSError(5, "bad device")
                super().move(op, source, target)

        files = []
        for number in range(3):
            path = tmp_path / str(number)
            path.write_bytes(bytes(2 * LENGTH))
            files.append(FileRegion(os.open(path, os.O_RDWR)))
        bad = os.fstat(files[1].descriptor).st_ino
        each = SlotGrid(PAGE_BYTES, PAGE_BYTES, PAGE_BYTES, 4)
        whole = SlotGrid(PAGE_BYTES, PAGE_BYTES, PAGE_BYTES, 12)
        stripe = StripedRegion(tuple(files), each, whole, 0, 128)
        news = threading.Semaphore(0)
        fence = GuardedBackend(OneBad(notify=news.release), PosixBackend(), name="plain")
        ops = [CopyOp(op.source_offset, whole.offset(op.first), PAGE_BYTES, op.first) for op in OPS]
        assert fence.submit(TransferId(1), ops, memory, stripe)
        found = []
        while not found:
            assert news.acquire(timeout=10)
            found = fence.poll()
        assert (found[0].outcome, found[0].failed_ops) == (FAILED, (1, 4, 7))
        assert [file.health.write_errors for file in files] == [0, 1, 0]
        for slot in (0, 2, 3, 5, 6):
            stored = os.pread(files[slot % 3].descriptor, PAGE_BYTES, each.offset(slot // 3))
            assert stored == pattern[slot * PAGE_BYTES :][:PAGE_BYTES]
        fence.close()
        for file in files:
            os.close(file.descriptor)
