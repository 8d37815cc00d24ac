"""Damage of every kind under a node: nothing wrong is served, everything is counted."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess

import pytest

from kvstrata.core.config import parse_tiers
from kvstrata.core.errors import CallRefusedError, ConfigError, LayoutError
from kvstrata.core.tier import DISK, HOST
from kvstrata.storage.base import PAGE_BYTES
from kvstrata.storage.entry import ENTRY_BYTES
from kvstrata.storage.footing import SLAB_NAME
from kvstrata.storage.slab import Slab
from kvstrata.testing.fakes import Faults, FaultyBackend
from kvstrata.transfer.backends.posix import PosixBackend

CAPACITY = 512 << 10
NUMBERS = range(1, 41)


@pytest.fixture
def filled(disk_world, tmp_path):
    """A world of forty blocks on disk, closed; returns its file."""
    world = disk_world([tmp_path], CAPACITY)
    for number in NUMBERS:
        world.store(number)
    assert world.counters.written_blocks == len(NUMBERS)
    world.node.close()
    return tmp_path / SLAB_NAME


def slots_of(world):
    pool = world.node._lower[0].pool
    return {number: pool.scan([world.key(number)])[0] for number in NUMBERS}


def change(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path, offset, bit):
    with path.open("rb") as file:
        file.seek(offset)
        change(path, offset, bytes([file.read(1)[0] ^ 1 << bit]))


class TestFlippedBits:
    def test_in_payloads(self, disk_world, filled, tmp_path):
        world = disk_world([tmp_path], CAPACITY)
        slots, grid = slots_of(world), world.node._slabs[DISK].grid
        luck = random.Random(1)
        hurt = set(luck.sample(list(NUMBERS), 12))
        for number in hurt:
            place = luck.randrange(grid.block_bytes)
            flip(filled, grid.offset(slots[number]) + place, luck.randrange(8))
        assert {number for number in NUMBERS if world.load(number)} == set(NUMBERS) - hurt
        assert world.counters.corrupt_blocks == len(hurt)
        world.node.close()
        again = disk_world([tmp_path], CAPACITY)
        assert again.counters.recovered_blocks == len(NUMBERS) - len(hurt)
        assert all(again.load(number) for number in set(NUMBERS) - hurt)

    def test_in_index_lines(self, disk_world, filled, tmp_path):
        world = disk_world([tmp_path], CAPACITY)
        slots, slab = slots_of(world), world.node._slabs[DISK]
        world.node.close()
        luck = random.Random(2)
        hurt = set(luck.sample(list(NUMBERS), 12))
        for number in hurt:
            offset = slab.entry_offset(slots[number]) + luck.randrange(ENTRY_BYTES)
            flip(filled, offset, luck.randrange(8))
        flip(filled, slab.entry_offset(slab.grid.slots - 1) + 77, 3)  # a blank one
        again = disk_world([tmp_path], CAPACITY)
        assert again.node.statistics()["counters"]["torn_index_entries"] == len(hurt) + 1
        assert again.counters.recovered_blocks == len(NUMBERS) - len(hurt)
        assert {number for number in NUMBERS if again.load(number)} == set(NUMBERS) - hurt
        assert again.counters.corrupt_blocks == 0

    @pytest.mark.parametrize("seed", range(8))
    def test_in_the_superblock(self, disk_world, filled, tmp_path, seed):
        luck = random.Random(seed)
        flip(filled, luck.randrange(PAGE_BYTES - 512), luck.randrange(8))
        before = filled.read_bytes()
        with pytest.raises(LayoutError) as caught:
            disk_world([tmp_path], CAPACITY)
        assert caught.value.hint
        assert filled.read_bytes() == before

    @pytest.mark.parametrize("seed", range(4))
    def test_in_the_floor(self, disk_world, filled, tmp_path, seed):
        luck = random.Random(seed)
        flip(filled, PAGE_BYTES - 512 + luck.randrange(12), luck.randrange(8))
        world = disk_world([tmp_path], CAPACITY)
        assert not any(world.load(number) for number in NUMBERS)
        assert world.disk["devices"][0]["torn_floor"] is True
        world.store(7)
        world.node.close()
        again = disk_world([tmp_path], CAPACITY)
        assert [number for number in NUMBERS if again.load(number)] == [7]
        assert again.disk["devices"][0]["torn_floor"] is False

    @pytest.mark.parametrize("seed", range(6))
    def test_anywhere_and_many(self, disk_world, filled, tmp_path, seed):
        """Whatever 300 flips in slots and lines hit: a right block or a counted miss."""
        luck = random.Random(seed)
        length = filled.stat().st_size
        for _ in range(300):
            flip(filled, luck.randrange(PAGE_BYTES, length), luck.randrange(8))
        world = disk_world([tmp_path], CAPACITY)
        found = sum(world.load(number) for number in NUMBERS)  # `load` compares the bytes
        stats = world.node.statistics()["counters"]
        assert found + stats["corrupt_blocks"] == world.counters.recovered_blocks
        torn = stats["torn_index_entries"]
        assert found + stats["corrupt_blocks"] + torn >= len(NUMBERS)


@pytest.mark.parametrize("seed", range(6))
def test_torn_writes_at_random_offsets(disk_world, filled, tmp_path, seed):
    """A page run of one block over another, a line over half of another."""
    luck = random.Random(seed)
    world = disk_world([tmp_path], CAPACITY)
    slots, slab = slots_of(world), world.node._slabs[DISK]
    world.node.close()
    data = filled.read_bytes()
    hurt = set()
    for number in luck.sample(list(NUMBERS), 8):
        other = luck.choice([each for each in NUMBERS if each != number])
        cut = luck.randrange(1, slab.grid.block_bytes)
        source = slab.grid.offset(slots[other])
        change(filled, slab.grid.offset(slots[number]), data[source : source + cut])
        hurt.add(number)
    torn = set()
    for number in luck.sample(sorted(set(NUMBERS) - hurt), 8):
        other = luck.choice([each for each in NUMBERS if each != number])
        cut = luck.randrange(16, ENTRY_BYTES - 1)
        source = slab.entry_offset(slots[other])
        change(filled, slab.entry_offset(slots[number]), data[source : source + cut])
        torn.add(number)
    again = disk_world([tmp_path], CAPACITY)
    assert {number for number in NUMBERS if again.load(number)} == set(NUMBERS) - hurt - torn
    assert again.counters.corrupt_blocks == len(hurt)
    assert again.node.statistics()["counters"]["torn_index_entries"] == len(torn)


@pytest.mark.parametrize("faults", [Faults(fail=0.3), Faults(flip=0.3), Faults(tear=0.3)])
def test_a_faulty_mover_is_counted_and_never_believed(disk_world, tmp_path, faults):
    world = disk_world([tmp_path], CAPACITY)
    executor = world.node._executor
    executor._mover.close()
    inner = PosixBackend(threads=4, notify=world.news.set)
    executor._mover = FaultyBackend(inner, faults, random.Random(3))
    for number in NUMBERS:
        world.store(number)
    world.node.clear([HOST])
    found = sum(world.load(number) for number in NUMBERS)  # `load` compares the bytes
    counters = world.counters
    lost = counters.corrupt_blocks + counters.read_failed_blocks + counters.write_failed_blocks
    assert 5 < found < 40
    assert found + lost == len(NUMBERS)
    world.node._lower[0].pool.check()


class TestNoRoom:
    def test_a_full_file_system_is_refused_at_start(self, small_file_system, disk_world):
        with pytest.raises(ConfigError, match="cannot preallocate") as caught:
            disk_world([small_file_system], 64 << 20)
        assert "smaller disk tier" in caught.value.hint
        assert list(small_file_system.glob("blocks*")) == []

    def test_a_full_file_system_without_preallocation(
        self, small_file_system, disk_world, monkeypatch
    ):
        """Where fallocate is missing the file is sparse: writes fail singly and are counted."""

        def missing(*_):
            raise OSError(95, "Operation not supported")

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", missing)
            world = disk_world([small_file_system], CAPACITY)
        filler = small_file_system / "filler"
        room = shutil.disk_usage(small_file_system).free - 100 * 1024
        filler.write_bytes(bytes(room))
        os.sync()
        for number in NUMBERS:
            world.store(number)
        failed = world.counters.write_failed_blocks
        assert 0 < failed < len(NUMBERS)
        assert not world.disk["devices"][0]["failed"], "a full disk still reads"
        world.node.clear([HOST])
        found = sum(world.load(number) for number in NUMBERS)
        assert found + failed + world.counters.corrupt_blocks == len(NUMBERS)
        filler.unlink()
        world.store(1000)
        world.node.clear([HOST])
        assert world.load(1000), "room came back"

    def test_a_file_size_limit(self, disk_world, tmp_path):
        world = disk_world([tmp_path], CAPACITY)
        slab = world.node._slabs[DISK]
        old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (slab.grid.offset(20) + 100, limits[1]))
        try:
            for number in NUMBERS:
                world.store(number)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, old)
        failed = world.counters.write_failed_blocks
        assert 0 < failed < len(NUMBERS)
        world.node.clear([HOST])
        assert sum(world.load(number) for number in NUMBERS) == len(NUMBERS) - failed
        assert world.counters.corrupt_blocks == 0


class TestPulledAway:
    def test_a_read_only_remount(self, small_file_system, disk_world):
        world = disk_world([small_file_system], CAPACITY)
        for number in NUMBERS:
            world.store(number)
        world.node.clear([HOST])
        os.sync()
        # As an error of the device does: descriptors stay open, writes begin to fail.
        subprocess.run(
            ["mount", "-o", "remount,ro,force", str(small_file_system)],
            check=False,
            capture_output=True,
        )
        assert all(world.load(number) for number in NUMBERS), "what is there is still served"
        world.node.close()
        subprocess.run(
            ["mount", "-o", "remount,ro", str(small_file_system)], check=True, capture_output=True
        )
        with pytest.raises(ConfigError, match="cannot be written") as caught:
            disk_world([small_file_system], CAPACITY)
        assert caught.value.hint

    def test_a_directory_deleted_under_us(self, disk_world, tmp_path):
        place = tmp_path / "place"
        world = disk_world([place], CAPACITY)
        for number in NUMBERS:
            world.store(number)
        shutil.rmtree(place)
        world.node.clear([HOST])
        assert all(world.load(number) for number in NUMBERS), "the file lives while it is open"
        world.store(1000)
        assert world.node.clear([HOST, DISK]) > 0
        world.node.close()
        fresh = disk_world([place], CAPACITY)
        assert fresh.counters.recovered_blocks == 0

    def test_a_file_cut_short_under_us(self, disk_world, filled, tmp_path):
        world = disk_world([tmp_path], CAPACITY)
        slots, grid = slots_of(world), world.node._slabs[DISK].grid
        os.truncate(filled, grid.offset(10) + 100)
        gone = {number for number, slot in slots.items() if slot >= 10}
        assert {number for number in NUMBERS if world.load(number)} == set(NUMBERS) - gone
        assert world.counters.read_failed_blocks == len(gone)
        world.node.close()
        with pytest.raises(LayoutError, match="cut short"):
            disk_world([tmp_path], CAPACITY)

    def test_a_clear_that_the_disk_does_not_note_says_so(self, disk_world, filled, tmp_path):
        world = disk_world([tmp_path], CAPACITY)
        region = world.node._slabs[DISK].region
        read_only = os.open(filled, os.O_RDONLY)
        os.dup2(read_only, region.descriptor)
        os.close(read_only)
        with pytest.raises(CallRefusedError, match="did not take note"):
            world.node.clear([DISK])
        assert not any(world.load(number) for number in NUMBERS)


def test_two_daemons_on_one_stripe(disk_world, tmp_path):
    places = [tmp_path / "a", tmp_path / "b"]
    first = disk_world(places, CAPACITY)
    for share in (places, places[::-1], [places[1], tmp_path / "c"]):
        with pytest.raises(ConfigError, match="in use by another kvstrata daemon"):
            disk_world(share, CAPACITY)
    first.store(1)
    first.node.close()
    assert disk_world(places, CAPACITY).load(1)


def test_a_stripe_in_a_real_daemon(connect, make_blocks, tmp_path):
    tiers = f"host:128KiB,disk:{tmp_path / 'a'}|{tmp_path / 'b'}:1MiB"
    assert parse_tiers(tiers)[1].places == (str(tmp_path / "a"), str(tmp_path / "b"))
    client = connect(tiers=tiers)
    tokens, blocks = make_blocks(1, 6)
    client.put(tokens, blocks)
    client.wait_idle()
    devices = client.stats()["node"]["tiers"]["disk"]["devices"]
    assert [each["path"] for each in devices] == [
        str(tmp_path / "a" / SLAB_NAME),
        str(tmp_path / "b" / SLAB_NAME),
    ]
    client.close()
    assert connect(tiers=tiers).get(tokens).tobytes() == blocks.tobytes()


@pytest.fixture
def small_file_system(loop_device, tmp_path):
    """Return the mount point of a file system of 8 MiB."""
    device, where = loop_device(8 << 20), tmp_path / "small"
    where.mkdir()
    try:
        subprocess.run(["mkfs.ext4", "-q", "-m0", str(device)], check=True, capture_output=True)
        subprocess.run(["mount", str(device), str(where)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mounting here ({getattr(error, 'stderr', '') or error})")
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True, timeout=30)


def test_a_slab_of_one_place_says_what_it_does(tmp_path):
    slab = Slab.open(str(tmp_path), CAPACITY, parse_layout())
    (state,) = slab.statistics()
    assert state["path"] == str(tmp_path / SLAB_NAME)
    assert (state["io"] == "direct") == (state["buffered_because"] == "")
    assert state["slots"] == slab.grid.slots
    slab.close()


def parse_layout():
    from kvstrata.layout import BlockLayout, Dimension

    return BlockLayout((Dimension("byte", 6000),), "int8", 8, "test")
