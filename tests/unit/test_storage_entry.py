"""The slab's index line: every value comes back, every single flipped bit is noticed."""

from __future__ import annotations

import struct
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.storage.base import COUNTER_MAX, StoredBlock
from kvstrata.storage.entry import BLANK_ENTRY, ENTRY_BYTES, decode_entry, encode_entry

HASHES = st.binary(min_size=16, max_size=16)
BLOCKS = st.builds(
    StoredBlock,
    slot=st.integers(0, 1 << 40),
    key=HASHES,
    parent=st.none() | HASHES,
    checksum=HASHES,
    written=st.integers(0, COUNTER_MAX),
    owner=HASHES,
)
LENGTHS = st.integers(1, 1 << 30)
BLOCK = StoredBlock(
    SlotId(3), SequenceHash(b"k" * 16), SequenceHash(b"p" * 16), b"c" * 16, written=77
)


@given(block=BLOCKS, block_bytes=LENGTHS)
def test_every_block_comes_back(block, block_bytes):
    line = encode_entry(block, block_bytes)
    assert len(line) == ENTRY_BYTES == 128
    assert decode_entry(line, block.slot, block_bytes) == block


@given(block=BLOCKS, block_bytes=LENGTHS)
def test_a_parent_of_zeros_is_not_no_parent(block, block_bytes):
    root = StoredBlock(block.slot, block.key, None, block.checksum, block.written)
    child = StoredBlock(block.slot, block.key, bytes(16), block.checksum, block.written)
    lines = [encode_entry(each, block_bytes) for each in (root, child)]
    assert lines[0] != lines[1]
    decoded = [decode_entry(line, block.slot, block_bytes) for line in lines]
    assert decoded == [root, child]


@given(block=BLOCKS, block_bytes=LENGTHS)
def test_the_slot_is_where_the_line_is_and_not_in_it(block, block_bytes):
    moved = decode_entry(encode_entry(block, block_bytes), SlotId(9), block_bytes)
    assert moved is not None
    assert moved.slot == 9


def test_every_single_flipped_bit_is_noticed():
    line = encode_entry(BLOCK, 4096)
    for bit in range(ENTRY_BYTES * 8):
        damaged = bytearray(line)
        damaged[bit // 8] ^= 1 << bit % 8
        assert decode_entry(bytes(damaged), BLOCK.slot, 4096) is None, f"{bit=}"


@pytest.mark.parametrize("cut", [0, 1, 8, 64, 127])
def test_a_torn_line_is_no_line(cut):
    line = encode_entry(BLOCK, 4096)
    older = encode_entry(
        StoredBlock(BLOCK.slot, SequenceHash(b"o" * 16), None, b"d" * 16, written=5), 4096
    )
    assert decode_entry(line[:cut], BLOCK.slot, 4096) is None
    assert decode_entry(line[:cut].ljust(ENTRY_BYTES, b"\0"), BLOCK.slot, 4096) is None
    mixed = line[:cut] + older[cut:]
    assert (decode_entry(mixed, BLOCK.slot, 4096) is not None) == (mixed == older)


def test_blank_zeros_and_ones_are_no_line():
    assert bytes(ENTRY_BYTES) == BLANK_ENTRY
    for line in (BLANK_ENTRY, b"\xff" * ENTRY_BYTES):
        assert decode_entry(line, SlotId(0), 4096) is None


def test_another_block_length_or_version_is_no_line_of_ours():
    line = encode_entry(BLOCK, 4096)
    assert decode_entry(line, BLOCK.slot, 4095) is None
    body = b"KVSENTR2" + line[8:-4]  # whole, with a CRC that fits, but of another version
    assert decode_entry(body + struct.pack("<I", crc32(body)), BLOCK.slot, 4096) is None
