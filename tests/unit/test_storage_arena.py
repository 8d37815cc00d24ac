"""The arena: shared, nameless, and never mapped by someone who would read it wrongly."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstrata.core.errors import ConfigError, DaemonGoneError
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.arena import Arena, ArenaAddress
from kvstrata.storage.base import PAGE_BYTES
from kvstrata.storage.memory import check_host_size, machine_memory_bytes

CAPACITY = 256 << 10


def layout(channels=1000, dtype="int8"):
    return BlockLayout((Dimension("layer", 3), Dimension("channel", channels)), dtype, 8, "test")


@pytest.fixture
def arena():
    created = Arena.create(CAPACITY, layout())
    yield created
    created.close()


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


class TestCreate:
    def test_fits_its_capacity_and_starts_empty(self, arena):
        assert arena.grid.offset(arena.grid.slots) == arena.length_bytes <= CAPACITY
        assert len(arena.generations) == arena.grid.slots
        assert set(arena.generations) == {0}
        assert bytes(arena.region.view[arena.grid.base_bytes :]).strip(b"\0") == b""

    def test_bookkeeping_and_slots_do_not_overlap(self, arena):
        arena.generations[arena.grid.slots - 1] = (1 << 64) - 1
        arena.generations[0] = 7
        for slot in range(arena.grid.slots):
            assert not any(arena.slot(slot)), f"{slot=}"
            arena.slot(slot)[:] = bytes([slot + 1]) * 3000
        assert arena.generations[0] == 7
        assert arena.generations[arena.grid.slots - 1] == (1 << 64) - 1
        assert sum(arena.generations[1:-1]) == 0
        assert [arena.slot(slot)[2999] for slot in range(arena.grid.slots)] == [
            slot + 1 for slot in range(arena.grid.slots)
        ]

    @pytest.mark.parametrize("capacity_bytes", [0, PAGE_BYTES, 3 * PAGE_BYTES + 7])
    def test_too_small_for_one_block(self, capacity_bytes):
        with pytest.raises(ConfigError, match=r"tiers\.host: .* not one block of 3000"):
            Arena.create(capacity_bytes, layout())

    def test_the_hint_for_too_small_is_enough(self):
        with pytest.raises(ConfigError) as caught:
            Arena.create(1, layout(channels=50_000))
        size = int(caught.value.hint.split("KiB")[0].split()[-1]) * 1024
        arena = Arena.create(size, layout(channels=50_000))
        assert arena.grid.slots == 1
        arena.close()

    def test_over_the_machine_s_memory(self):
        before = descriptors()
        with pytest.raises(ConfigError, match=r"tiers\.host: .* more than 90%") as caught:
            Arena.create(1 << 50, layout())
        assert descriptors() == before
        size = int(caught.value.hint.removesuffix("MiB").split()[-1]) << 20
        check_host_size(size)
        with pytest.raises(ConfigError):
            check_host_size(size + (2 << 20))

    def test_memory_is_what_the_machine_or_its_cgroup_has(self):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert 64 << 20 < machine_memory_bytes() <= total

    def test_a_refusing_system_is_the_operator_s_to_solve(self, monkeypatch):
        def refuse(*_):
            raise OSError(12, "Cannot allocate memory")

        monkeypatch.setattr(os, "ftruncate", refuse)
        before = descriptors()
        with pytest.raises(ConfigError, match=r"tiers\.host: .*Cannot allocate memory") as caught:
            Arena.create(CAPACITY, layout())
        assert "smaller host tier" in caught.value.hint
        assert descriptors() == before

    def test_nothing_appears_in_shared_memory_or_temporary_files(self, arena):
        name = Path(arena.address.path).readlink()
        assert str(name).startswith("/memfd:kvstrata-arena")
        assert not list(Path("/dev/shm").glob("*kvstrata*"))


class TestAttach:
    def test_both_see_the_same_bytes(self, arena):
        other = Arena.attach(arena.address, layout())
        assert (other.grid, other.length_bytes) == (arena.grid, arena.length_bytes)
        other.slot(3)[:4] = b"from"
        arena.generations[5] = 11
        assert bytes(arena.slot(3)[:4]) == b"from"
        assert other.generations[5] == 11
        other.close()
        assert bytes(arena.slot(3)[:4]) == b"from", "the owner's mapping stays"

    @pytest.mark.parametrize(
        "other", [layout(channels=1001), layout(channels=9000), layout(dtype="uint8")]
    )
    def test_another_layout(self, arena, other):
        before, held = bytes(arena.region.view), descriptors()
        with pytest.raises(ConfigError, match="is no arena of test") as caught:
            Arena.attach(arena.address, other)
        assert caught.value.hint
        assert bytes(arena.region.view) == before
        assert descriptors() == held

    @pytest.mark.parametrize("field", ["length_bytes", "slots"])
    @pytest.mark.parametrize("off_by", [-1, 1, 4096])
    def test_another_size_than_the_owner_said(self, arena, field, off_by):
        wrong = dataclasses.replace(
            arena.address, **{field: getattr(arena.address, field) + off_by}
        )
        with pytest.raises(ConfigError, match="is no arena of"):
            Arena.attach(wrong, layout())

    def test_a_file_that_is_no_arena(self, tmp_path):
        path = tmp_path / "plain"
        path.write_bytes(bytes(8192))
        with pytest.raises(ConfigError, match="is no arena of"):
            Arena.attach(ArenaAddress(str(path), 8192, 1), layout())
        assert path.read_bytes() == bytes(8192)

    def test_closed_by_its_owner(self, arena):
        address = arena.address
        arena.close()
        with pytest.raises((DaemonGoneError, ConfigError)):
            Arena.attach(address, layout())

    def test_another_process_s_arena_and_its_end(self):
        program = (
            "import sys\n"
            "from kvstrata.layout import BlockLayout, Dimension\n"
            "from kvstrata.storage.arena import Arena\n"
            "shape = (Dimension('layer', 3), Dimension('channel', 1000))\n"
            "arena = Arena.create(262144, BlockLayout(shape, 'int8', 8, 'test'))\n"
            "arena.slot(1)[:5] = b'hello'\n"
            "at = arena.address\n"
            "print(at.path, at.length_bytes, at.slots, flush=True)\n"
            "sys.stdin.read()\n"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            path, length, slots = child.stdout.readline().split()
            address = ArenaAddress(path, int(length), int(slots))
            ours = Arena.attach(address, layout())
            assert bytes(ours.slot(1)[:5]) == b"hello"
        finally:
            child.kill()
            child.communicate(timeout=10)
        assert bytes(ours.slot(1)[:5]) == b"hello", "a mapping outlives its owner"
        with pytest.raises(DaemonGoneError, match="cannot map /proc/"):
            Arena.attach(address, layout())
        ours.close()


class TestClose:
    def test_gives_back_descriptor_and_mapping(self):
        before = descriptors()
        arena = Arena.create(CAPACITY, layout())
        arena.close()
        arena.close()
        assert descriptors() == before

    def test_a_view_that_someone_holds_stays_readable(self, arena):
        view = arena.slot(2)
        view[:3] = b"kv!"
        arena.close()
        assert bytes(view[:3]) == b"kv!"
        view.release()

    def test_memory_has_nothing_to_recover(self, arena):
        arena.slot(0)[:] = bytes([7]) * 3000
        arena.sync()
        assert list(arena.recover()) == list(Arena.attach(arena.address, layout()).recover()) == []
