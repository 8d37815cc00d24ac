"""The executor over a real arena and a real slab: what the brain orders is what lies there."""

from __future__ import annotations

import os
import threading

import pytest

from kvstrata.core.config import Limits
from kvstrata.core.errors import TransferError
from kvstrata.core.ids import SequenceHash, SlotId, TransferId
from kvstrata.core.tier import DISK
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.arena import Arena
from kvstrata.storage.base import StoredBlock
from kvstrata.storage.seal import seal
from kvstrata.storage.slab import Slab
from kvstrata.testing.movers import PlainMover
from kvstrata.transfer.backends.guarded import GuardedBackend
from kvstrata.transfer.backends.posix import PosixBackend
from kvstrata.transfer.base import EraseJob, JobDone, ReadJob, SealJob, WriteJob
from kvstrata.transfer.executor import Executor
from kvstrata.transfer.mover import make_mover

CAPACITY = 256 << 10
KEYS = tuple(SequenceHash(bytes([number]) * 16) for number in range(1, 9))


class GatedPosix(PosixBackend):
    """Moves wait at a gate, and those to or from chosen file offsets fail."""

    def __init__(self, **settings):
        self.gate = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self.bad_offsets = set()
        super().__init__(**settings)

    def move(self, op, source, target):
        self.begun.release()
        assert self.gate.acquire(timeout=10)
        if {op.source_offset, op.target_offset} & self.bad_offsets:
            raise TransferError("ordered to fail", retryable=True)
        super().move(op, source, target)


class World:
    """One arena, one slab, one executor."""

    def __init__(self, directory, layout, mover=None, **settings):
        self.layout = layout
        self.arena = Arena.create(CAPACITY, layout)
        self.slab = Slab.open(directory, CAPACITY, layout)
        self.executor = Executor(
            self.arena, {DISK: self.slab}, layout.fingerprint, Limits(), mover=mover, **settings
        )

    def fill(self, *slots):
        """Give each host slot bytes of its own; return their seals under KEYS."""
        for slot in slots:
            self.arena.slot(slot)[:] = os.urandom(self.layout.block_bytes)
        return self.seals(*slots)

    def seals(self, *slots, keys=KEYS):
        return tuple(
            seal(key + self.layout.fingerprint, self.arena.slot(slot))
            for slot, key in zip(slots, keys, strict=False)
        )

    def disk_bytes(self, slot):
        grid = self.slab.grid
        return os.pread(self.slab.region.descriptor, grid.block_bytes, grid.offset(slot))

    def file_bytes(self):
        return self.slab.path.read_bytes()

    def close(self):
        self.executor.close()
        self.arena.close()
        self.slab.close()


LAYOUTS = {
    "gapless": BlockLayout((Dimension("channel", 4096),), "int8", 8, "test"),
    "gaps": BlockLayout((Dimension("channel", 5000),), "int8", 8, "test"),
}


def _plain(notify=lambda: None):
    return GuardedBackend(PlainMover(threads=2, notify=notify), PosixBackend(), name="plain")


def _nixl(notify=lambda: None):
    return make_mover("nixl", Limits(), notify=notify)


@pytest.fixture(params=[None, _plain, pytest.param(_nixl, marks=pytest.mark.nixl)],
                ids=["posix", "plain", "nixl"])  # fmt: skip
def make_a_mover(request):
    """Ours, which seals on the way, and two that have it done in a stage of their own."""
    return request.param


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def world(request, make_a_mover, tmp_path):
    made = World(str(tmp_path), request.param, make_a_mover and make_a_mover())
    yield made
    made.close()


@pytest.fixture
def gated(tmp_path):
    """A world whose disk is in the test's hands."""
    mover = GatedPosix(threads=1)
    made = World(str(tmp_path), LAYOUTS["gapless"], mover, jobs_max=3)
    made.mover = mover
    yield made
    mover.gate.release(1000)
    made.close()


@pytest.fixture
def run(eventually):
    """Submit jobs; return how each ended, and see that each ended once."""

    def finish(executor, *jobs):
        for job in jobs:
            assert executor.try_submit(job)
        ended = []

        def done():
            ended.extend(executor.poll())
            return executor.running == 0

        eventually(done)
        assert executor.poll() == []
        names = [each.transfer for each in ended]
        assert len(set(names)) == len(names)
        return {each.transfer: each for each in ended}

    return finish


def write_job(slots, targets, checksums, name=1, parents=None, written=100):
    return WriteJob(
        TransferId(name),
        DISK,
        tuple(map(SlotId, slots)),
        tuple(map(SlotId, targets)),
        KEYS[: len(slots)],
        parents or (None, *KEYS)[: len(slots)],
        tuple(checksums),
        written,
    )


def read_job(sources, slots, name=2, keys=KEYS):
    return ReadJob(
        TransferId(name),
        DISK,
        tuple(map(SlotId, sources)),
        tuple(map(SlotId, slots)),
        keys[: len(slots)],
    )


class TestSeal:
    def test_computes_the_seal_of_each_slot_under_its_key(self, world, run):
        seals = world.fill(5, 0, 2)
        job = SealJob(TransferId(1), (SlotId(5), SlotId(0), SlotId(2)), KEYS[:3])
        assert run(world.executor, job)[1] == JobDone(1, (True,) * 3, seals)

    def test_needs_no_disk(self, run):
        arena = Arena.create(CAPACITY, LAYOUTS["gaps"])
        executor = Executor(arena, {}, LAYOUTS["gaps"].fingerprint, Limits())
        done = run(executor, SealJob(TransferId(1), (SlotId(0),), KEYS[:1]))
        assert done[1].ok == (True,)
        executor.close()
        arena.close()


class TestWrite:
    def test_payload_and_index_lines_lie_where_they_belong(self, world, run):
        seals = world.fill(3, 4, 5)
        done = run(world.executor, write_job((3, 4, 5), (7, 8, 1), seals))
        assert done[1] == JobDone(1, (True,) * 3, seals)
        for host, disk in ((3, 7), (4, 8), (5, 1)):
            assert world.disk_bytes(disk) == bytes(world.arena.slot(host))
        assert world.slab.recover() == [
            StoredBlock(SlotId(1), KEYS[2], KEYS[1], seals[2], 100),
            StoredBlock(SlotId(8), KEYS[1], KEYS[0], seals[1], 101),
            StoredBlock(SlotId(7), KEYS[0], None, seals[0], 102),
        ]

    def test_nothing_else_in_the_file_changes(self, world, run):
        grid, before = world.slab.grid, world.file_bytes()
        seals = world.fill(0, 1)
        run(world.executor, write_job((0, 1), (2, 3), seals))
        after = bytearray(world.file_bytes())
        for slot in (2, 3):
            for start, length in (
                (grid.offset(slot), grid.block_bytes),
                (world.slab.entry_offset(slot), 128),
            ):
                after[start : start + length] = before[start : start + length]
        assert bytes(after) == before

    @pytest.mark.parametrize("bad", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
    def test_a_block_that_differs_from_its_seal_is_never_written(self, world, run, bad):
        seals = list(world.fill(3, 4, 5))
        for index in bad:
            world.arena.slot(3 + index)[17] ^= 4
        before = [world.disk_bytes(slot) for slot in range(3)]
        done = run(world.executor, write_job((3, 4, 5), (0, 1, 2), seals))[1]
        assert done.ok == tuple(index not in bad for index in range(3))
        assert "differs from its seal" in done.reason
        for index in range(3):
            fresh = bytes(world.arena.slot(3 + index))
            assert world.disk_bytes(index) == (before[index] if index in bad else fresh)
        assert {each.slot for each in world.slab.recover()} == {0, 1, 2} - set(bad)

    def test_when_no_block_is_whole_the_file_is_not_touched(self, world, run):
        seals = world.fill(0, 1)
        before = world.file_bytes()
        world.arena.slot(0)[0] ^= 1
        world.arena.slot(1)[0] ^= 1
        done = run(world.executor, write_job((0, 1), (0, 1), seals))[1]
        assert done.ok == (False, False)
        assert world.file_bytes() == before

    def test_a_seal_under_another_key_is_refused(self, world, run):
        world.fill(0)
        wrong = world.seals(0, keys=KEYS[1:])
        assert run(world.executor, write_job((0,), (0,), wrong))[1].ok == (False,)
        assert world.slab.recover() == []

    def test_a_failed_payload_gets_no_index_line(self, gated, run):
        seals = gated.fill(0, 2, 4)  # not neighbours: one op each
        gated.mover.bad_offsets = {gated.slab.grid.offset(2)}
        gated.mover.gate.release(1000)
        done = run(gated.executor, write_job((0, 2, 4), (0, 2, 4), seals))[1]
        assert done.ok == (True, False, True)
        assert done.reason == "ordered to fail"
        assert [each.slot for each in gated.slab.recover()] == [4, 0]

    def test_a_failed_merged_move_fails_each_block_that_it_carried(self, gated, run):
        seals = gated.fill(0, 1, 5)
        gated.mover.bad_offsets = {gated.slab.grid.offset(0)}
        gated.mover.gate.release(1000)
        done = run(gated.executor, write_job((0, 1, 5), (0, 1, 5), seals))[1]
        assert done.ok == (False, False, True)
        assert [each.slot for each in gated.slab.recover()] == [5]

    def test_a_failed_index_line_fails_its_block_only(self, gated, run):
        seals = gated.fill(0, 1, 2)
        gated.mover.bad_offsets = {gated.slab.entry_offset(1)}
        gated.mover.gate.release(1000)
        done = run(gated.executor, write_job((0, 1, 2), (0, 1, 2), seals))[1]
        assert done.ok == (True, False, True)
        assert [each.slot for each in gated.slab.recover()] == [2, 0]

    def test_failures_are_counted_by_block_after_a_bad_seal_too(self, gated, run):
        """Ops are numbered by the blocks that are left; `ok` by the blocks of the job."""
        seals = gated.fill(0, 2, 4, 6)  # not neighbours: one op each
        gated.arena.slot(0)[0] ^= 1
        gated.mover.bad_offsets = {gated.slab.grid.offset(8)}
        gated.mover.gate.release(1000)
        done = run(gated.executor, write_job((0, 2, 4, 6), (4, 6, 8, 10), seals))[1]
        assert done.ok == (False, True, False, True)
        assert [each.slot for each in gated.slab.recover()] == [10, 6]

    def test_no_index_line_before_the_payload(self, gated, eventually):
        seals = gated.fill(0)
        old = gated.file_bytes()
        assert gated.executor.try_submit(write_job((0,), (0,), seals))
        eventually(
            lambda: gated.executor.poll() == [] and gated.mover.begun.acquire(blocking=False)
        )
        assert gated.file_bytes() == old
        gated.mover.gate.release()
        eventually(
            lambda: gated.executor.poll() == [] and gated.mover.begun.acquire(blocking=False)
        )
        assert gated.disk_bytes(0) == bytes(gated.arena.slot(0)), "the payload is down"
        assert gated.slab.recover() == [], "its line is still at the gate"
        gated.mover.gate.release()
        eventually(gated.executor.poll)
        assert [each.key for each in gated.slab.recover()] == [KEYS[0]]


class TestRead:
    def test_round_trip_gives_the_same_bytes_and_seals(self, world, run):
        seals = world.fill(0, 1, 2)
        content = [bytes(world.arena.slot(slot)) for slot in range(3)]
        run(world.executor, write_job((0, 1, 2), (4, 5, 9), seals))
        for slot in range(3):
            world.arena.slot(slot)[:] = bytes(world.layout.block_bytes)
        done = run(world.executor, read_job((4, 5, 9), (6, 7, 0)))
        assert done[2] == JobDone(2, (True,) * 3, seals)
        assert [bytes(world.arena.slot(slot)) for slot in (6, 7, 0)] == content
        assert not any(world.arena.slot(1)), "other host slots stay as they were"

    def test_a_slot_that_was_never_written_has_another_seal(self, world, run):
        seals = world.fill(0)
        run(world.executor, write_job((0,), (0,), seals))
        done = run(world.executor, read_job((3,), (1,)))[2]
        assert done.ok == (True,)
        assert done.checksums != seals

    def test_one_flipped_bit_on_disk_has_another_seal(self, world, run):
        seals = world.fill(0)
        run(world.executor, write_job((0,), (0,), seals))
        place = world.slab.grid.offset(0) + 123
        byte = os.pread(world.slab.region.descriptor, 1, place)[0]
        os.pwrite(world.slab.region.descriptor, bytes([byte ^ 16]), place)
        assert run(world.executor, read_job((0,), (1,)))[2].checksums != seals

    def test_the_same_bytes_under_another_key_have_another_seal(self, world, run):
        seals = world.fill(0)
        run(world.executor, write_job((0,), (0,), seals))
        done = run(world.executor, read_job((0,), (1,), keys=KEYS[1:]))[2]
        assert done.checksums != seals

    def test_a_file_cut_short_fails_the_blocks_that_are_gone(self, world, run):
        seals = world.fill(0, 1)
        last = world.slab.grid.slots - 1
        run(world.executor, write_job((0, 1), (0, last), seals))
        os.ftruncate(world.slab.region.descriptor, world.slab.grid.offset(last) + 10)
        done = run(world.executor, read_job((0, last), (2, 4)))[2]
        assert done.ok == (True, False)
        assert done.checksums[0] == seals[0]
        assert done.reason


class TestStages:
    """A mover that does not seal: what it moves is sealed before it is written, after it is read.

    Its gate lets one op through at a time, so what lies between two stages can be changed.
    """

    @pytest.fixture
    def staged(self, tmp_path):
        class Gated(PlainMover):
            def move(self, op, source, target):
                begun.release()
                assert gate.acquire(timeout=10)
                super().move(op, source, target)

        gate, begun = threading.Semaphore(0), threading.Semaphore(0)
        inner = Gated()
        made = World(
            str(tmp_path),
            LAYOUTS["gapless"],
            GuardedBackend(inner, PosixBackend(), name="gated", close_timeout_s=0.2),
        )
        made.gate, made.begun = gate, begun
        yield made
        gate.release(1000)
        made.close()

    def test_a_read_is_sealed_after_it_arrived(self, staged, run):
        seals = staged.fill(0)
        staged.gate.release(1000)
        run(staged.executor, write_job((0,), (4,), seals))
        while staged.gate.acquire(blocking=False):
            pass
        assert staged.executor.try_submit(read_job((4,), (1,)))
        staged.arena.slot(1)[:] = bytes(staged.layout.block_bytes)
        staged.gate.release(1000)
        assert run(staged.executor)[2] == JobDone(2, (True,), seals)

    def test_what_did_not_arrive_has_no_seal(self, staged, run):
        """Its slot may still hold the very block that was asked for."""
        seals = staged.fill(0, 2)
        last = staged.slab.grid.slots - 1
        staged.gate.release(1000)
        run(staged.executor, write_job((0, 2), (0, last), seals))
        os.ftruncate(staged.slab.region.descriptor, staged.slab.grid.offset(last))
        done = run(staged.executor, read_job((0, last), (0, 2)))[2]
        assert (done.ok, done.checksums) == ((True, False), (seals[0], b""))

    def test_a_cancelled_read_ends_when_the_mover_says_so(self, staged, run, eventually):
        """Until then its host slots are nobody's: bytes may still arrive."""
        seals = staged.fill(0, 2)
        staged.gate.release(1000)
        run(staged.executor, write_job((0, 2), (0, 2), seals))
        while staged.gate.acquire(blocking=False):
            pass
        while staged.begun.acquire(blocking=False):
            pass
        assert staged.executor.try_submit(read_job((0, 2), (4, 6)))
        assert staged.begun.acquire(timeout=10)
        staged.executor.cancel(TransferId(2))
        assert staged.executor.poll() == []
        assert staged.executor.running == 1
        before = bytes(staged.arena.slot(4))
        staged.gate.release(1000)
        (done,) = eventually(staged.executor.poll)
        assert done.ok == (False, False)
        assert before != bytes(staged.arena.slot(4)), "late bytes came, and before its end"

    def test_close_in_mid_read_ends_and_frees_nothing_that_is_written_to(self, staged):
        assert staged.executor.try_submit(read_job((0, 2), (4, 6)))
        assert staged.begun.acquire(timeout=10)
        staged.executor.close()
        staged.arena.close()
        (done,) = staged.executor.poll()
        assert done.ok == (False, False)
        assert "closed in mid-transfer" in done.reason
        staged.gate.release(1000)  # and the late bytes crash nobody


class TestErase:
    def test_blanks_the_lines_and_nothing_else(self, world, run):
        seals = world.fill(0, 1, 2)
        run(world.executor, write_job((0, 1, 2), (3, 4, 5), seals))
        before = bytearray(world.file_bytes())
        done = run(world.executor, EraseJob(TransferId(3), DISK, (SlotId(5), SlotId(3))))
        assert done[3] == JobDone(3, (True, True))
        for slot in (3, 5):
            start = world.slab.entry_offset(slot)
            before[start : start + 128] = bytes(128)
        assert world.file_bytes() == bytes(before)
        assert [each.slot for each in world.slab.recover()] == [4]


class TestBounds:
    def test_over_jobs_max_is_refused_and_does_nothing(self, gated, run):
        seals = gated.fill(0)
        for name in (1, 2, 3):
            assert gated.executor.try_submit(read_job((0,), (name,), name=name))
        before = gated.file_bytes()
        assert not gated.executor.try_submit(write_job((0,), (0,), seals, name=4))
        assert gated.executor.running == 3
        gated.mover.gate.release(1000)
        assert set(run(gated.executor)) == {1, 2, 3}
        assert gated.file_bytes() == before
        assert run(gated.executor, write_job((0,), (0,), seals, name=4))[4].ok == (True,)

    def test_cancel_still_ends_in_one_job_done(self, gated, run):
        for name in (1, 2, 3):
            assert gated.executor.try_submit(read_job((0, 2), (name, name + 4), name=name))
        assert gated.mover.begun.acquire(timeout=10)
        for name in (2, 3, 99):
            gated.executor.cancel(name)
        gated.mover.gate.release(1000)
        done = run(gated.executor)
        assert set(done) == {1, 2, 3}
        assert done[1].ok == (True, True)
        assert done[2].ok == done[3].ok == (False, False)
        assert done[2].reason == "cancelled"

    def test_a_cancelled_write_leaves_no_index_line(self, gated, run, eventually):
        seals = gated.fill(0, 2)
        assert gated.executor.try_submit(write_job((0, 2), (0, 2), seals))
        eventually(
            lambda: gated.executor.poll() == [] and gated.mover.begun.acquire(blocking=False)
        )
        gated.executor.cancel(1)
        gated.mover.gate.release(1000)
        assert run(gated.executor)[1].ok == (False, False)
        assert gated.slab.recover() == []

    def test_many_jobs_of_all_kinds_each_end_once(self, world, run):
        seals = world.fill(*range(6))
        jobs = [write_job((slot,), (slot,), seals[:1], name=slot) for slot in range(6)]
        assert [done.ok for _, done in sorted(run(world.executor, *jobs).items())] == [
            (True,),  # the others carry the seal of slot 0
            *[(False,)] * 5,
        ]
        run(world.executor, write_job(range(6), range(6), seals))
        content = [bytes(world.arena.slot(slot)) for slot in range(6)]
        jobs = [
            *(SealJob(TransferId(10 + n), (SlotId(n),), KEYS[n : n + 1]) for n in range(6)),
            *(read_job((n,), (n + 20,), name=20 + n, keys=KEYS[n:]) for n in range(6)),
            *(EraseJob(TransferId(30 + n), DISK, (SlotId(n),)) for n in range(6)),
        ]
        done = run(world.executor, *jobs)
        assert set(done) == {job.transfer for job in jobs}
        for n in range(6):
            assert done[10 + n].checksums == done[20 + n].checksums == seals[n : n + 1]
            assert bytes(world.arena.slot(20 + n)) == content[n]
        assert world.slab.recover() == []

    def test_close_with_jobs_waiting_does_not_hang_and_loses_none(self, gated):
        for name in (1, 2, 3):
            assert gated.executor.try_submit(read_job((0, 2), (name, name + 4), name=name))
        assert gated.mover.begun.acquire(timeout=10)
        closer = threading.Thread(target=gated.executor.close)
        closer.start()
        gated.mover.gate.release(1000)
        closer.join(10)
        assert not closer.is_alive()
        assert gated.mover.poll() != []

    def test_poll_after_close_ends_what_was_between_two_stages(self, world, make_a_mover):
        told = threading.Semaphore(0)
        executor = Executor(
            world.arena,
            {DISK: world.slab},
            world.layout.fingerprint,
            Limits(),
            notify=told.release,
            mover=make_a_mover and make_a_mover(told.release),
        )
        assert executor.try_submit(write_job((0,), (0,), world.fill(0)))
        sealed = told.acquire(timeout=10)
        executor.close()
        ended = executor.poll()
        assert sealed
        assert [each.ok for each in ended] == [(False,)]

    def test_news_are_told(self, world):
        told = threading.Semaphore(0)
        executor = Executor(
            world.arena, {DISK: world.slab}, world.layout.fingerprint, Limits(), notify=told.release
        )
        executor.try_submit(write_job((0,), (0,), world.fill(0)))
        assert told.acquire(timeout=10), "the payload"
        assert executor.poll() == []
        assert told.acquire(timeout=10), "its line"
        assert [each.transfer for each in executor.poll()] == [1]
        executor.close()
