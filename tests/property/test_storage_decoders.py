"""What is read from a disk may be anything: a block, nothing, or a refusal of our own."""

from __future__ import annotations

import struct
from zlib import crc32

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvstrata.core.errors import ConfigError
from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.storage.base import COUNTER_MAX, PAGE_BYTES, StoredBlock
from kvstrata.storage.entry import (
    BLANK_ENTRY,
    ENTRY_BYTES,
    decode_entries,
    decode_entry,
    encode_entry,
)
from kvstrata.storage.superblock import (
    FLOOR_BYTES,
    FLOOR_OFFSET,
    Superblock,
    decode_floor,
    encode_floor,
)

BLOCK_BYTES = 4096
SUPERBLOCK = Superblock(b"f" * 16, 7, 8192, BLOCK_BYTES, "some layout")
HASHES = st.binary(min_size=16, max_size=16)
BLOCKS = st.builds(
    StoredBlock,
    slot=st.just(SlotId(0)),
    key=HASHES,
    parent=st.none() | HASHES,
    checksum=HASHES,
    written=st.integers(0, COUNTER_MAX),
    owner=HASHES,
)


def sealed(body):
    """Return `body` with the CRC that fits it: what only an attacker or a newer version writes."""
    body = body[: ENTRY_BYTES - 4]
    return body + struct.pack("<I", crc32(body))


WHOLE = BLOCKS.map(lambda block: encode_entry(block, BLOCK_BYTES))
LINES = (
    WHOLE
    | st.just(BLANK_ENTRY)
    | st.binary(min_size=ENTRY_BYTES, max_size=ENTRY_BYTES)
    | st.binary(min_size=ENTRY_BYTES, max_size=ENTRY_BYTES).map(sealed)
    | st.binary(min_size=ENTRY_BYTES, max_size=ENTRY_BYTES).map(
        lambda line: sealed(b"KVSENTR1" + line[8:])
    )
    | st.tuples(WHOLE, st.integers(0, ENTRY_BYTES * 8 - 1)).map(lambda pair: flipped(*pair))
    | st.tuples(WHOLE, WHOLE, st.integers(0, ENTRY_BYTES)).map(
        lambda three: three[0][: three[2]] + three[1][three[2] :]
    )
)


def flipped(data, bit):
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@given(line=st.binary(max_size=2 * ENTRY_BYTES) | LINES, slot=st.integers(0, 1 << 40))
def test_any_line_is_a_block_or_none(line, slot):
    found = decode_entry(line, SlotId(slot), BLOCK_BYTES)
    if found is not None:
        assert found.slot == slot
        assert 0 <= found.written <= COUNTER_MAX
        assert decode_entry(encode_entry(found, BLOCK_BYTES), SlotId(slot), BLOCK_BYTES) == found


@given(
    lines=st.lists(LINES, max_size=20),
    first=st.integers(0, 1 << 40),
    floor=st.integers(-1, COUNTER_MAX),
)
@example(lines=[], first=0, floor=-1)
@example(lines=[BLANK_ENTRY], first=0, floor=-1)
def test_many_lines_say_what_each_of_them_says(lines, first, floor):
    expected, torn = [], 0
    for place, line in enumerate(lines):
        if line == BLANK_ENTRY:
            continue
        block = decode_entry(line, SlotId(first + place), BLOCK_BYTES)
        torn += block is None
        if block is not None and block.written > floor:
            expected.append(block)
    assert decode_entries(b"".join(lines), first, BLOCK_BYTES, floor) == (expected, torn)


@given(page=st.binary(max_size=2 * PAGE_BYTES))
def test_any_page_is_refused_with_a_hint(page):
    with pytest.raises(ConfigError) as caught:
        SUPERBLOCK.check(page, "name", 1)
    assert caught.value.hint


@given(
    tail=st.binary(min_size=FLOOR_OFFSET - 16, max_size=FLOOR_OFFSET - 16),
    version=st.sampled_from([0, 1, 2, 1 << 31]),
)
def test_a_page_of_ours_in_all_but_its_content_is_refused(tail, version):
    body = (b"KVSTRATA" + struct.pack("<I", version) + tail)[: FLOOR_OFFSET - 4]
    page = (body + struct.pack("<I", crc32(body))).ljust(PAGE_BYTES, b"\0")
    with pytest.raises(ConfigError) as caught:
        SUPERBLOCK.check(page, "name", 1)
    assert caught.value.hint


@given(bit=st.integers(0, FLOOR_OFFSET * 8 - 1))
def test_every_flipped_bit_of_a_superblock_is_refused(bit):
    page = SUPERBLOCK.encode()
    SUPERBLOCK.check(page, "name", 1)
    with pytest.raises(ConfigError) as caught:
        SUPERBLOCK.check(flipped(page, bit), "name", 1)
    assert caught.value.hint


@given(record=st.binary(max_size=2 * FLOOR_BYTES))
def test_any_floor_is_a_counter_or_none(record):
    found = decode_floor(record)
    assert found is None or 0 <= found <= COUNTER_MAX


@given(written=st.integers(0, COUNTER_MAX), bit=st.integers(0, FLOOR_BYTES * 8 - 1))
def test_a_floor_comes_back_and_a_flipped_one_does_not(written, bit):
    record = encode_floor(written)
    assert decode_floor(record) == written
    assert decode_floor(flipped(record, bit)) is None


def test_counters_that_could_overflow_are_not_believed():
    block = StoredBlock(SlotId(0), SequenceHash(b"k" * 16), None, b"s" * 16, COUNTER_MAX + 1)
    line = encode_entry(block, BLOCK_BYTES)
    assert decode_entry(line, SlotId(0), BLOCK_BYTES) is None
    assert decode_entries(line, 0, BLOCK_BYTES) == ([], 1)
    assert decode_floor(encode_floor(COUNTER_MAX + 1)) is None
    assert decode_floor(encode_floor(COUNTER_MAX)) == COUNTER_MAX
