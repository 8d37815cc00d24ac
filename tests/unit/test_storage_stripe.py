"""Several files or devices as one disk tier: where slots lie, and what one failing device takes."""

from __future__ import annotations

import errno
import os
import time

import pytest

from kvstrata.core.config import TierConfig, parse_tiers
from kvstrata.core.errors import ConfigError
from kvstrata.core.ids import SequenceHash, SlotId, TransferId
from kvstrata.core.tier import DISK, HOST, Admission, TierKind
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.base import PAGE_BYTES, MemoryRegion, StoredBlock
from kvstrata.storage.entry import ENTRY_BYTES, encode_entry
from kvstrata.storage.footing import SLAB_NAME
from kvstrata.storage.slab import Slab
from kvstrata.storage.stripe import Stripe, open_slab
from kvstrata.transfer.backends.posix import PosixBackend
from kvstrata.transfer.base import CopyOp

CAPACITY = 768 << 10
LAYOUT = BlockLayout((Dimension("byte", 6000),), "int8", 8, "test")


def block(slot, written, name=None):
    key = SequenceHash(bytes([slot if name is None else name]) * 16)
    return StoredBlock(SlotId(slot), key, None, bytes([slot + 100]) * 16, written)


def index(store, *blocks):
    for each in blocks:
        line = encode_entry(each, store.grid.block_bytes)
        (piece,) = store.region.pieces(store.entry_offset(each.slot), ENTRY_BYTES)
        os.pwrite(piece.region.descriptor, line, piece.offset)


@pytest.fixture
def places(tmp_path):
    return [str(tmp_path / name) for name in "abc"]


@pytest.fixture
def open_stripe(places):
    opened = []

    def open_it(of=None):
        opened.append(Stripe.open(of or places, CAPACITY, LAYOUT))
        return opened[-1]

    yield open_it
    for each in opened:
        each.close()


class TestConfiguration:
    def test_places_stand_between_bars(self):
        tiers = parse_tiers("host:8GiB,disk:/a|/b|/c:3TiB:on-evict,disk:/d:1TiB")
        assert tiers[1] == TierConfig(TierKind.DISK, 3 << 40, "/a|/b|/c", Admission.ON_EVICT)
        assert tiers[1].places == ("/a", "/b", "/c")
        assert tiers[2].places == ("/d",)
        assert tiers[0].places == ()

    @pytest.mark.parametrize("text", ["disk:|:1GiB", "disk:/a|:1GiB", "disk:|/a:1GiB"])
    def test_an_empty_place(self, text):
        with pytest.raises(ConfigError, match="names no directory") as caught:
            parse_tiers(text)
        assert caught.value.hint

    @pytest.mark.parametrize("text", ["disk:/a|/a:1GiB", "disk:/a|/b:1GiB,disk:/b:1GiB"])
    def test_a_place_twice(self, text):
        with pytest.raises(ConfigError, match="would keep their files in"):
            parse_tiers(text)

    def test_a_place_twice_under_two_names(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path)
        with pytest.raises(ConfigError, match="names a place twice"):
            Stripe.open([str(tmp_path), str(tmp_path / "link")], CAPACITY, LAYOUT)

    def test_one_place_is_a_plain_slab(self, places):
        slab = open_slab(places[:1], CAPACITY, LAYOUT)
        assert isinstance(slab, Slab)
        slab.close()


class TestPlaces:
    def test_slots_and_lines_are_dealt_round_robin(self, open_stripe):
        stripe = open_stripe()
        members = stripe.region.members
        each = stripe.region.member_grid
        for slot in range(stripe.grid.slots):
            offset = stripe.grid.offset(slot)
            (piece,) = stripe.region.pieces(offset, stripe.grid.stride_bytes)
            assert piece == (members[slot % 3], each.offset(slot // 3), each.stride_bytes)
            (line,) = stripe.region.pieces(stripe.entry_offset(slot), ENTRY_BYTES)
            assert line == (members[slot % 3], PAGE_BYTES + slot // 3 * ENTRY_BYTES, ENTRY_BYTES)

    def test_bytes_of_neighbours_are_one_piece_each(self, open_stripe):
        stripe = open_stripe()
        pieces = stripe.region.pieces(stripe.grid.offset(2) + 4096, 2 * stripe.grid.stride_bytes)
        assert [piece.length for piece in pieces] == [4096, 8192, 4096]
        assert [stripe.region.members.index(piece.region) for piece in pieces] == [2, 0, 1]

    def test_what_is_no_slot_and_no_line_has_no_place(self, open_stripe):
        stripe = open_stripe()
        end = stripe.grid.offset(stripe.grid.slots)
        for offset in (0, PAGE_BYTES - 1, -1, end, stripe.grid.base_bytes - 1):
            assert list(stripe.region.pieces(offset, 1)) == []

    def test_capacity_is_shared_equally(self, open_stripe, tmp_path):
        stripe = open_stripe()
        sizes = {(tmp_path / name / SLAB_NAME).stat().st_size for name in "abc"}
        assert len(sizes) == 1
        assert sizes.pop() <= CAPACITY // 3
        assert stripe.grid.slots % 3 == 0


class TestRecovery:
    def test_each_block_in_its_slot_oldest_first(self, open_stripe):
        stripe = open_stripe()
        blocks = [block(slot, 100 - slot) for slot in range(10)]
        index(stripe, *blocks)
        stripe.close()
        assert open_stripe().recover() == blocks[::-1]

    def test_newest_of_two_copies_on_two_devices_counts(self, open_stripe):
        stripe = open_stripe()
        index(stripe, block(0, 5, name=9), block(1, 6, name=9), block(5, 4, name=9))
        assert stripe.recover() == [block(1, 6, name=9)]

    def test_another_order_of_places_loses_nothing(self, open_stripe, places):
        stripe = open_stripe()
        index(stripe, *(block(slot, slot + 1) for slot in range(9)))
        stripe.close()
        found = open_stripe(places[::-1]).recover()
        assert [each.key for each in found] == [block(slot, 0).key for slot in range(9)]
        assert [each.slot for each in found] == [2, 1, 0, 5, 4, 3, 8, 7, 6]

    def test_a_clear_that_missed_a_device_covers_it(self, open_stripe):
        stripe = open_stripe()
        index(stripe, *(block(slot, slot + 1) for slot in range(6)))
        stripe._slabs[1].forget_until(4)
        stripe.close()
        again = open_stripe()
        assert again.floor == 4
        assert again.recover() == [block(4, 5), block(5, 6)]

    def test_a_clear_fails_only_if_no_device_takes_it(self, open_stripe, monkeypatch):
        stripe = open_stripe()
        index(stripe, *(block(slot, slot + 1) for slot in range(6)))
        broken = {stripe.region.members[0].descriptor, stripe.region.members[2].descriptor}
        real = os.pwritev

        def pwritev(descriptor, *rest):
            if descriptor in broken:
                raise OSError(errno.EIO, "Input/output error")
            return real(descriptor, *rest)

        monkeypatch.setattr(os, "pwritev", pwritev)
        stripe.forget_until(6)
        assert stripe.recover() == []
        broken.add(stripe.region.members[1].descriptor)
        with pytest.raises(OSError, match="Input/output"):
            stripe.forget_until(7)
        assert [each["write_errors"] for each in stripe.statistics()] == [2, 1, 2]

    def test_a_torn_floor_clears_its_own_device_only(self, open_stripe, tmp_path):
        stripe = open_stripe()
        index(stripe, *(block(slot, slot + 1) for slot in range(6)))
        stripe.close()
        with (tmp_path / "b" / SLAB_NAME).open("r+b") as file:
            file.seek(PAGE_BYTES - 512)
            file.write(b"torn")
        again = open_stripe()
        assert [each.slot for each in again.recover()] == [0, 2, 3, 5]
        assert [each["torn_floor"] for each in again.statistics()] == [False, True, False]
        again.close()
        assert [each.slot for each in open_stripe().recover()] == [0, 2, 3, 5]

    def test_one_place_that_cannot_be_opened_refuses_all_and_keeps_none_open(
        self, open_stripe, places
    ):
        other = BlockLayout((Dimension("byte", 5),), "int8", 8, "test")
        Slab.open(places[2], CAPACITY // 3, other).close()
        with pytest.raises(ConfigError, match="another layout"):
            open_stripe()
        Slab.open(places[0], CAPACITY // 3, LAYOUT).close()


def key(number):
    return SequenceHash(number.to_bytes(16, "big"))


@pytest.fixture
def world(places, disk_world):
    return disk_world(places, CAPACITY)


def break_device(stripe, member):
    """Let every read and write of this member fail, as a device that is gone does."""
    region = stripe.region.members[member]
    refuses = os.open("/proc/self/mem", os.O_RDWR)  # its low addresses give EIO
    os.dup2(refuses, region.descriptor)
    if region.direct >= 0:
        os.dup2(refuses, region.direct)
    os.close(refuses)


class TestFailingDevice:
    def test_it_takes_its_own_blocks_and_slots_and_nothing_else(self, world):
        numbers = range(1, 61)
        for number in numbers:
            world.store(number)
        slots = world.disk["total"]
        assert slots >= 60
        where = {number: world.node._lower[0].pool.scan([key(number)])[0] % 3 for number in numbers}
        break_device(world.node._slabs[DISK], 1)
        world.node.clear([HOST])
        found = {number for number in numbers if world.load(number)}
        assert found == {number for number in numbers if where[number] != 1}
        devices = world.disk["devices"]
        assert [each["failed"] for each in devices] == [False, True, False]
        assert devices[1]["read_errors"] >= 3
        assert "Input/output error" in devices[1]["last_error"]
        lost = world.counters.lost_blocks
        assert lost + world.counters.read_failed_blocks == sum(at == 1 for at in where.values())
        assert lost >= 10, "most are withdrawn at once, not one failed read after the other"
        assert world.disk["lost"] == slots // 3
        # More new blocks than the tier has slots: none goes to the dead device.
        failed = world.counters.write_failed_blocks
        for number in range(1000, 1000 + slots):
            world.store(number)
        assert world.counters.write_failed_blocks - failed == 0
        for number in range(1000 + slots - 20, 1000 + slots):
            assert world.node._lower[0].pool.scan([key(number)])[0] % 3 != 1
        assert world.disk["quarantined"] == slots // 3
        world.node._lower[0].pool.check()

    def test_it_fails_while_it_is_written(self, world):
        for number in range(1, 7):
            world.store(number)
        break_device(world.node._slabs[DISK], 0)
        for number in range(10, 150):
            world.store(number)
        assert 3 <= world.counters.write_failed_blocks <= 3 + 16
        assert [each["failed"] for each in world.disk["devices"]] == [True, False, False]
        world.node.clear([HOST])
        there = {number for number in range(10, 150) if key(number) in world.node._lower[0].pool}
        assert {number for number in range(10, 150) if world.load(number)} == there
        assert len(there) >= world.disk["total"] // 2
        assert world.counters.corrupt_blocks == 0
        world.node._lower[0].pool.check()

    def test_one_bad_read_is_no_failed_device(self, world):
        for number in range(1, 30):
            world.store(number)
        stripe = world.node._slabs[DISK]
        stripe.region.members[0].health.failed_to(OSError(errno.EIO, "once"), write=False)
        world.node.clear([HOST])
        assert all(world.load(number) for number in range(1, 30))
        assert not any(each["failed"] for each in world.disk["devices"])

    def test_a_read_only_or_full_device_keeps_what_it_has(self, world):
        health = world.node._slabs[DISK].region.members[0].health
        for code in (errno.EROFS, errno.ENOSPC, errno.EFBIG, errno.EDQUOT) * 3:
            health.failed_to(OSError(code, os.strerror(code)), write=True)
        assert not health.failed
        assert health.write_errors == 12

    def test_real_errors_of_a_loop_device(self, tmp_path, loop_device, disk_world):
        devices = [loop_device(CAPACITY // 3) for _ in range(3)]
        world = disk_world(devices, CAPACITY)
        for number in range(1, 31):
            world.store(number)
        os.truncate(tmp_path / "loop-2.img", 0)  # reads behind its end are EIO
        world.node.clear([HOST])
        assert sum(world.load(number) for number in range(1, 31)) == 20
        assert [each["failed"] for each in world.disk["devices"]] == [False, False, True]
        assert world.disk["devices"][2]["read_errors"] == 3
        assert world.counters.read_failed_blocks == 3
        assert world.counters.lost_blocks == 7

    def test_it_is_not_touched_any_more(self, open_stripe):
        """Also what was queued before anybody noticed: a dying disk takes seconds for each no."""
        stripe = open_stripe()
        region = stripe.region
        for _ in range(3):
            region.members[1].health.failed_to(OSError(errno.EIO, "gone"), write=False)
        memory = MemoryRegion(memoryview(bytearray(8192)))
        ops = [CopyOp(stripe.grid.offset(slot), 0, 4096, slot) for slot in range(3)]
        mover = PosixBackend()
        try:
            assert mover.submit(TransferId(1), ops, region, memory)
            while not (done := mover.poll()):
                time.sleep(0.001)
        finally:
            mover.close()
        assert done[0].failed_ops == (1,)
        assert "left alone" in done[0].reason
