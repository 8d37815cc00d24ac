"""Payloads go past the page cache where the file system allows it, and correctly where not."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import numpy as np
import pytest

from kvstrata.core.config import Limits
from kvstrata.core.ids import SequenceHash, SlotId, TransferId
from kvstrata.core.tier import DISK
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.arena import Arena
from kvstrata.storage.base import PAGE_BYTES, MemoryRegion
from kvstrata.storage.seal import seal
from kvstrata.storage.stripe import open_slab
from kvstrata.transfer.backends.posix import PosixBackend
from kvstrata.transfer.base import CopyOp, Outcome, ReadJob, WriteJob
from kvstrata.transfer.executor import Executor

CAPACITY = 1 << 20
KEYS = tuple(SequenceHash(bytes([number]) * 16) for number in range(1, 9))
LAYOUTS = [BlockLayout((Dimension("byte", size),), "int8", 8, "test") for size in (8192, 6000)]


class World:
    def __init__(self, places, layout):
        self.layout = layout
        self.arena = Arena.create(CAPACITY, layout)
        self.slab = open_slab(places, CAPACITY, layout)
        self.executor = Executor(self.arena, {DISK: self.slab}, layout.fingerprint, Limits())

    def run(self, eventually, job):
        assert self.executor.try_submit(job)
        ended = []
        eventually(lambda: ended.extend(self.executor.poll()) or ended)
        return ended[0]

    def round_trip(self, eventually):
        """Write four blocks, read them into other host slots; they must be the same."""
        slots, targets = tuple(map(SlotId, (0, 1, 2, 5))), tuple(map(SlotId, (4, 5, 6, 1)))
        back = tuple(map(SlotId, (10, 11, 12, 13)))
        for slot in slots:
            self.arena.slot(slot)[:] = os.urandom(self.layout.block_bytes)
        seals = tuple(
            seal(key + self.layout.fingerprint, self.arena.slot(slot))
            for key, slot in zip(KEYS, slots, strict=False)
        )
        keys = KEYS[:4]
        write = WriteJob(TransferId(1), DISK, slots, targets, keys, (None,) * 4, seals, 1)
        assert self.run(eventually, write).ok == (True,) * 4
        done = self.run(eventually, ReadJob(TransferId(2), DISK, targets, back, keys))
        assert done.ok == (True,) * 4
        assert done.checksums == seals
        for one, other in zip(slots, back, strict=True):
            assert bytes(self.arena.slot(one)) == bytes(self.arena.slot(other))
        return targets

    def close(self):
        self.executor.close()
        self.arena.close()
        self.slab.close()


@pytest.fixture(params=LAYOUTS, ids=["whole pages", "part of a page"])
def make(request):
    made = []

    def make_it(*places):
        made.append(World([str(place) for place in places], request.param))
        return made[-1]

    yield make_it
    for world in made:
        world.close()


def cached_pages(region):
    """Return which pages of the file are in the page cache; looking brings none in."""
    length = os.fstat(region.descriptor).st_size
    with mmap.mmap(region.descriptor, length) as mapped:
        pages = np.zeros(-(-length // PAGE_BYTES), np.uint8)
        start = np.frombuffer(mapped, np.uint8).ctypes.data
        libc = ctypes.CDLL(None, use_errno=True)
        size = ctypes.c_size_t(length)
        assert (
            libc.mincore(ctypes.c_void_p(start), size, pages.ctypes.data_as(ctypes.c_void_p)) == 0
        )
    return set(np.flatnonzero(pages & 1).tolist())


@pytest.mark.parametrize("count", [1, 2])
def test_the_page_cache_holds_no_payload(make, tmp_path, eventually, count):
    world = make(*(tmp_path / str(number) for number in range(count)))
    states = world.slab.statistics()
    if any(each["io"] != "direct" for each in states):
        pytest.skip(f"no O_DIRECT here: {states[0]['buffered_because']}")
    for slot in world.round_trip(eventually):
        offset = world.slab.grid.offset(slot)
        for piece in world.slab.region.pieces(offset, world.slab.grid.stride_bytes):
            pages = {
                *range(piece.offset // PAGE_BYTES, (piece.offset + piece.length) // PAGE_BYTES)
            }
            assert pages.isdisjoint(cached_pages(piece.region))
            os.pread(piece.region.descriptor, 1, piece.offset)
            assert not pages.isdisjoint(cached_pages(piece.region)), "the look sees what is cached"


def test_an_old_copy_in_the_page_cache_hides_nothing(make, tmp_path, eventually):
    world = make(tmp_path)
    region, grid = world.slab.region, world.slab.grid
    for slot in range(8):
        os.pread(region.descriptor, grid.block_bytes, grid.offset(slot))  # zeros, now cached
        os.pwrite(region.descriptor, b"dirty" * 1000, grid.offset(slot))  # and dirty
    targets = world.round_trip(eventually)
    for slot, host in zip(targets, (0, 1, 2, 5), strict=True):
        data = os.pread(region.descriptor, grid.block_bytes, grid.offset(slot))
        assert data == bytes(world.arena.slot(host))


@pytest.mark.parametrize("refuses", ["open", "read", "short"])
def test_without_o_direct_it_goes_through_the_page_cache(
    make, tmp_path, eventually, monkeypatch, refuses
):
    real_open, real_read = os.open, os.preadv

    def opens(path, flags, *rest):
        if refuses == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest)

    def reads(descriptor, buffers, offset, *rest):
        if refuses == "read":
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_read(descriptor, buffers, offset, *rest) // 2

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opens)
        if refuses != "open":
            patch.setattr(os, "preadv", reads)
        world = make(tmp_path)
    state = world.slab.statistics()[0]
    assert state["io"] == "buffered"
    assert "O_DIRECT" in state["buffered_because"]
    assert world.slab.region.direct == -1
    world.round_trip(eventually)


def test_memory_file_systems_work_too(make, eventually):
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        world = make(folder)
        world.round_trip(eventually)


def test_on_a_device(make, loop_device, eventually):
    world = make(loop_device(CAPACITY))
    assert world.slab.statistics()[0]["io"] == "direct"
    world.round_trip(eventually)


def test_arena_slots_are_page_aligned_in_memory():
    for layout in LAYOUTS:
        arena = Arena.create(CAPACITY, layout)
        assert arena.region.page_aligned
        assert np.frombuffer(arena.region.view, np.uint8).ctypes.data % PAGE_BYTES == 0
        assert arena.grid.base_bytes % PAGE_BYTES == arena.grid.stride_bytes % PAGE_BYTES == 0
        arena.close()


@pytest.mark.parametrize(
    ("memory_offset", "file_offset", "length"),
    [(0, 0, 512), (512, 0, 4096), (0, 512, 4096), (4096, 8192, 4095), (4096, 8192, 8192)],
)
def test_what_is_not_aligned_moves_all_the_same(
    tmp_path, eventually, memory_offset, file_offset, length
):
    slab = open_slab([str(tmp_path)], CAPACITY, LAYOUTS[0])
    base = slab.grid.offset(0)
    data = os.urandom(64 << 10)
    arena = Arena.create(CAPACITY, LAYOUTS[0])
    start = arena.grid.offset(0)
    arena.region.view[start : start + len(data)] = data
    backend = PosixBackend()
    try:
        op = CopyOp(start + memory_offset, base + file_offset, length)
        assert backend.submit(TransferId(1), [op], arena.region, slab.region)
        ended = []
        eventually(lambda: ended.extend(backend.poll()) or ended)
        assert ended[0].outcome is Outcome.DONE
        found = os.pread(slab.region.descriptor, length, base + file_offset)
        assert found == data[memory_offset : memory_offset + length]
        plain = MemoryRegion(memoryview(bytearray(length)))
        assert backend.submit(
            TransferId(2), [CopyOp(base + file_offset, 0, length)], slab.region, plain
        )
        ended.clear()
        eventually(lambda: ended.extend(backend.poll()) or ended)
        assert bytes(plain.view) == found
    finally:
        backend.close()
        arena.close()
        slab.close()
