"""The slab file: what is written is found again, and what is not ours is refused untouched."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from zlib import crc32

import pytest

from kvstrata.core.errors import ConfigError, LayoutError
from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.base import PAGE_BYTES, StoredBlock
from kvstrata.storage.entry import BLANK_ENTRY, ENTRY_BYTES, encode_entry
from kvstrata.storage.footing import SLAB_NAME, check_place
from kvstrata.storage.slab import Slab

CAPACITY = 256 << 10


def layout(channels=1000, dtype="int8"):
    return BlockLayout((Dimension("layer", 3), Dimension("channel", channels)), dtype, 8, "test")


def block(slot, written, name=None, parent=None):
    key = SequenceHash(bytes([slot if name is None else name]) * 16)
    return StoredBlock(SlotId(slot), key, parent, bytes([slot + 100]) * 16, written)


@pytest.fixture
def open_slab(tmp_path):
    """Open the test's slab; whatever is still open is closed with the test."""
    opened = []

    def open_it(capacity_bytes=CAPACITY, of=None):
        opened.append(Slab.open(str(tmp_path), capacity_bytes, of or layout()))
        return opened[-1]

    yield open_it
    for slab in opened:
        slab.close()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / SLAB_NAME


def index(slab, *blocks):
    for each in blocks:
        line = encode_entry(each, slab.grid.block_bytes)
        assert os.pwrite(slab.region.descriptor, line, slab.entry_offset(each.slot)) == ENTRY_BYTES


class TestMaking:
    def test_file_is_whole_private_and_alone(self, open_slab, path):
        slab = open_slab()
        state = path.stat()
        assert state.st_size == slab.grid.offset(slab.grid.slots) <= CAPACITY
        assert state.st_blocks * 512 >= state.st_size, "the space must be taken at the start"
        assert state.st_mode & 0o777 == 0o600
        assert [each.name for each in path.parent.iterdir()] == [SLAB_NAME]

    def test_missing_directories_are_made_for_this_user_only(self, tmp_path):
        folder = tmp_path / "a" / "b"
        Slab.open(str(folder), CAPACITY, layout()).close()
        assert folder.stat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("capacity_bytes", [0, 2 * PAGE_BYTES, 3 * PAGE_BYTES + 127])
    def test_too_small_for_one_block(self, open_slab, path, capacity_bytes):
        with pytest.raises(ConfigError, match=r"tiers\.disk: .* not one block of 3000"):
            open_slab(capacity_bytes)
        assert not path.exists()

    def test_smallest_slab_has_one_slot(self, open_slab, path):
        assert open_slab(3 * PAGE_BYTES + 128).grid.slots == 1
        assert path.stat().st_size == 3 * PAGE_BYTES

    def test_no_room_names_field_and_remedy_and_leaves_nothing(self, open_slab, tmp_path):
        with pytest.raises(ConfigError) as caught:
            open_slab(1 << 50)
        assert caught.value.message.startswith("tiers.disk: cannot preallocate")
        assert "No space left" in caught.value.message
        assert "smaller disk tier" in caught.value.hint
        assert list(tmp_path.iterdir()) == []

    def test_another_daemon_that_was_faster_keeps_its_slab(self, open_slab, path, monkeypatch):
        first = open_slab()
        index(first, block(0, 1))
        first.close()
        before = path.read_bytes()
        real = Path.exists  # the file appears just after the look
        monkeypatch.setattr(Path, "exists", lambda each: each != path and real(each))
        assert open_slab().recover() == [block(0, 1)]
        assert path.read_bytes() == before
        assert [each.name for each in path.parent.iterdir()] == [SLAB_NAME]


class TestDirectory:
    def test_that_is_a_file(self, tmp_path):
        (tmp_path / "plain").write_text("mine")
        with pytest.raises(ConfigError, match=r"tiers\.disk: directory .*plain.*File exists") as e:
            Slab.open(str(tmp_path / "plain"), CAPACITY, layout())
        assert e.value.hint
        assert (tmp_path / "plain").read_text() == "mine"

    def test_below_a_file(self, tmp_path):
        (tmp_path / "plain").touch()
        with pytest.raises(ConfigError, match="Not a directory"):
            check_place(str(tmp_path / "plain" / "below"))

    def test_slab_that_is_a_directory(self, open_slab, path):
        path.mkdir()
        with pytest.raises(ConfigError, match=r"tiers\.disk: .* cannot be opened") as caught:
            open_slab()
        assert caught.value.hint

    def test_check_leaves_no_trace(self, tmp_path):
        assert check_place(str(tmp_path)) == tmp_path
        assert list(tmp_path.iterdir()) == []


class TestRecovery:
    def test_exactly_what_was_indexed_oldest_first(self, open_slab):
        slab = open_slab()
        root = block(slab.grid.slots - 1, 30)
        blocks = [root, block(0, 12, parent=root.key), block(7, 21, parent=bytes(16))]
        index(slab, *blocks)
        slab.sync()
        slab.close()
        again = open_slab()
        assert again.recover() == [blocks[1], blocks[2], blocks[0]]
        assert again.torn_entries == 0

    def test_index_longer_than_one_read(self, tmp_path):
        small = layout(channels=1)
        slab = Slab.open(str(tmp_path), 40 << 20, small)
        assert slab.grid.slots > (1 << 20) // ENTRY_BYTES
        slots = [0, 8190, 8191, 8192, 8193, slab.grid.slots - 1]
        blocks = [
            StoredBlock(SlotId(slot), SequenceHash(slot.to_bytes(16, "big")), None, bytes(16), at)
            for at, slot in enumerate(slots, 1)
        ]
        index(slab, *blocks)
        assert slab.recover() == blocks
        slab.close()

    def test_newest_of_two_lines_with_one_key_counts(self, open_slab):
        slab = open_slab()
        older, newer = block(2, 5, name=9), block(4, 6, name=9)
        index(slab, older, newer)
        assert slab.recover() == [newer]
        index(slab, block(4, 6), block(1, 7, name=9), older)
        assert slab.recover() == [block(4, 6), block(1, 7, name=9)]

    def test_blanked_line_is_gone(self, open_slab):
        slab = open_slab()
        index(slab, block(0, 1), block(1, 2))
        os.pwrite(slab.region.descriptor, BLANK_ENTRY, slab.entry_offset(0))
        assert slab.recover() == [block(1, 2)]

    @pytest.mark.parametrize("cut", [1, 8, 60, 127])
    def test_torn_line_is_counted_and_skipped(self, open_slab, cut):
        slab = open_slab()
        index(slab, block(0, 1), block(2, 3))
        line = encode_entry(block(1, 2), slab.grid.block_bytes)
        os.pwrite(slab.region.descriptor, line[:cut], slab.entry_offset(1))
        slab.close()
        again = open_slab()
        assert again.recover() == [block(0, 1), block(2, 3)]
        assert again.torn_entries == 1

    def test_payloads_are_not_read(self, open_slab):
        slab = open_slab()
        index(slab, block(0, 1))
        os.pwrite(slab.region.descriptor, b"\xff" * 3000, slab.grid.offset(0))
        assert slab.recover() == [block(0, 1)], "the index vouches for nothing but itself"


class TestFloor:
    def test_a_new_slab_has_none(self, open_slab):
        assert open_slab().floor == 0

    def test_what_was_written_up_to_it_is_never_found_again(self, open_slab):
        slab = open_slab()
        index(slab, block(0, 10), block(1, 11), block(2, 12))
        slab.forget_until(11)
        assert slab.recover() == [block(2, 12)]
        slab.close()
        again = open_slab()
        assert again.floor == 11
        assert again.recover() == [block(2, 12)]

    def test_a_cleared_line_does_not_count_as_the_newest_of_its_key(self, open_slab):
        slab = open_slab()
        slab.forget_until(10)
        index(slab, block(0, 10, name=7), block(1, 11, name=7))
        assert slab.recover() == [block(1, 11, name=7)]

    @pytest.mark.parametrize("kept", [1, 7, 8, 11])
    def test_a_torn_one_clears_everything_and_harms_nothing_else(self, open_slab, kept):
        slab = open_slab()
        index(slab, block(0, 1))
        slab.forget_until(0x1122334455667788)
        place = PAGE_BYTES - 512 + kept
        rest = os.pread(slab.region.descriptor, 12 - kept, place)
        os.pwrite(slab.region.descriptor, bytes(each ^ 0x55 for each in rest), place)
        slab.close()
        again = open_slab()
        assert again.recover() == []
        index(again, block(0, again.floor + 1))
        assert again.recover() == [block(0, again.floor + 1)], "later blocks are found again"

    def test_a_second_torn_one_clears_what_was_written_since_the_first(self, open_slab):
        slab = open_slab()
        for turn in range(3):
            index(slab, block(turn, slab.floor + 1))
            slab.forget_until(slab.floor + 1)
            os.pwrite(slab.region.descriptor, b"torn", PAGE_BYTES - 512)
            slab.close()
            slab = open_slab()
            assert slab.recover() == [], f"cleared blocks came back after tear {turn}"
            assert slab.torn_floor

    def test_a_crash_between_blanking_and_mending_only_repeats_both(self, open_slab, monkeypatch):
        slab = open_slab()
        index(slab, block(0, 5))
        os.pwrite(slab.region.descriptor, b"torn", PAGE_BYTES - 512)
        slab.close()
        monkeypatch.setattr(Slab, "forget_until", lambda *_: None)  # the floor stays torn
        assert open_slab().recover() == []
        monkeypatch.undo()


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def damage(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def rewrite_version(path):
    page = bytearray(path.read_bytes()[: PAGE_BYTES - 512])
    page[8:12] = struct.pack("<I", 2)
    page[-4:] = struct.pack("<I", crc32(page[:-4]))
    damage(path, 0, bytes(page))


REFUSALS = {
    "not a slab": (lambda path: damage(path, 0, b"SQLite 3"), "is not a kvstrata slab"),
    "empty": (lambda path: os.truncate(path, 0), "is not a kvstrata slab"),
    "half a page": (lambda path: os.truncate(path, 2000), "is not a kvstrata slab"),
    "other version": (rewrite_version, "was written by slab version 2, this is 1"),
    "damaged text": (lambda path: damage(path, 70, b"\xff"), "the superblock of .* is damaged"),
    "damaged slots": (lambda path: damage(path, 30, b"\xff"), "the superblock of .* is damaged"),
    "cut short": (
        lambda path: os.truncate(path, path.stat().st_size - 1),
        "has been cut short",
    ),
}


class TestRefusals:
    @pytest.mark.parametrize(("spoil", "sentence"), REFUSALS.values(), ids=REFUSALS.keys())
    def test_spoilt_file_is_left_as_it_is(self, open_slab, path, spoil, sentence):
        slab = open_slab()
        index(slab, block(0, 1))
        slab.close()
        spoil(path)
        before = path.read_bytes()
        with pytest.raises(LayoutError, match=rf"tiers\.disk: .*{sentence}") as caught:
            open_slab()
        assert str(path) in caught.value.message
        assert "move it away" in caught.value.hint
        assert path.read_bytes() == before
        assert [each.name for each in path.parent.iterdir()] == [SLAB_NAME]

    @pytest.mark.parametrize(
        "other", [layout(channels=1001), layout(channels=4000), layout(dtype="uint8")]
    )
    def test_another_layout(self, open_slab, path, other):
        open_slab().close()
        before = path.read_bytes()
        with pytest.raises(LayoutError) as caught:
            open_slab(of=other)
        assert layout().describe() in caught.value.message
        assert other.describe() in caught.value.message
        assert path.read_bytes() == before
        open_slab().close()

    @pytest.mark.parametrize("capacity_bytes", [CAPACITY // 2, CAPACITY * 2])
    def test_another_size(self, open_slab, path, capacity_bytes):
        slab = open_slab()
        slab.close()
        before = path.read_bytes()
        with pytest.raises(ConfigError, match=f"has {slab.grid.slots} slots") as caught:
            open_slab(capacity_bytes)
        assert "keep the size" in caught.value.hint
        assert path.read_bytes() == before

    def test_while_it_is_open_elsewhere(self, open_slab, path):
        first = open_slab()
        before = path.read_bytes()
        with pytest.raises(ConfigError, match="in use by another kvstrata daemon") as caught:
            open_slab()
        assert "connect to that daemon" in caught.value.hint
        assert path.read_bytes() == before
        first.close()
        open_slab().close()

    def test_a_refusal_keeps_no_descriptor_and_no_lock(self, open_slab):
        open_slab().close()
        before = descriptors()
        for _ in range(3):
            with pytest.raises(LayoutError):
                open_slab(of=layout(channels=999))
        assert descriptors() == before
        open_slab().close()
