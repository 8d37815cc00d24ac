"""The laws of `Codec`; docs/contracts/codec.md says them in words."""

from __future__ import annotations

import random
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvstrata.core.errors import ChecksumError
from kvstrata.core.ids import SequenceHash
from kvstrata.storage.codecs.base import BlockFacts, Codec

__all__ = ["CodecContract", "block_facts"]

_LABEL = re.compile(r"[a-z0-9][a-z0-9_.-]*(@[0-9a-f]+)?")


def block_facts(raw_bytes: int, number: int = 1) -> BlockFacts:
    """Return the facts of a block of this length; others for other numbers."""
    luck = random.Random(number)
    return BlockFacts(
        SequenceHash(luck.randbytes(16)), luck.randbytes(16), b"n" * 8, b"t" * 8, raw_bytes
    )


class CodecContract:
    """Subclass and provide `codec`, which is made for elements of `item_bytes`."""

    item_bytes = 2
    """Size of the elements that the codec was made for."""

    @pytest.fixture
    def codec(self) -> Codec:
        """Return the codec under test."""
        raise NotImplementedError("a contract suite is given its subject by a subclass")

    def blocks(self) -> list[bytes]:
        """Return blocks of whole elements: noise, zeros, numbers as KV has them, one element.

        The noise has no element whose bits are all ones, which some float formats read as NaN.
        """
        normal = (
            np.random.default_rng(1).standard_normal(8192).astype(f"f{max(2, self.item_bytes)}")
        )
        noise = bytes(each & 0x3F for each in random.Random(2).randbytes(30_000 * self.item_bytes))
        return [noise, bytes(4096), normal.tobytes()[: 8192 * self.item_bytes], noise[:8]]

    def test_law_1_what_was_encoded_comes_back(self, codec: Codec) -> None:
        """Exactly, or for a lossy codec the same approximation each time."""
        for raw in self.blocks():
            facts = block_facts(len(raw))
            back = _round(codec, raw, self.item_bytes, facts)
            if not codec.lossy:
                assert back == raw
            assert _round(codec, raw, self.item_bytes, facts) == back
            assert len(back) == len(raw)

    def test_law_2_the_bound_on_length_holds(self, codec: Codec) -> None:
        """Buffers are made by it before anything is encoded."""
        for raw in self.blocks():
            stored = codec.encode(memoryview(raw), self.item_bytes, block_facts(len(raw)))
            assert len(stored) <= codec.stored_bytes_max(len(raw))

    def test_law_3_any_bytes_are_survived(self, codec: Codec) -> None:
        """Damage is ChecksumError, or bytes that fit and that the seal will not accept."""
        luck = random.Random(3)
        raw = self.blocks()[2]
        facts = block_facts(len(raw))
        whole = bytes(codec.encode(memoryview(raw), self.item_bytes, facts))
        for turn in range(300):
            spoilt = bytearray(whole)
            match turn % 4:
                case 0:
                    del spoilt[luck.randrange(len(spoilt)) :]
                case 1:
                    spoilt[luck.randrange(len(spoilt))] ^= 1 << luck.randrange(8)
                case 2:
                    spoilt += luck.randbytes(luck.randint(1, 50))
                case _:
                    spoilt = bytearray(luck.randbytes(luck.randrange(len(whole))))
            into = bytearray(len(raw) + 64)
            try:
                length = codec.decode(memoryview(spoilt), memoryview(into)[: len(raw)], facts)
            except ChecksumError:
                length = -1
            assert length == -1 or (0 <= length <= len(raw) and not codec.authentic)
            assert bytes(into[len(raw) :]) == bytes(64)

    def test_law_4_its_label_fits_a_header_and_is_read(self, codec: Codec) -> None:
        """The name is in front, and another codec's label is not read."""
        facts = block_facts(1000)
        label = codec.label(facts)
        assert _LABEL.fullmatch(label)
        assert label.partition("@")[0] == codec.name
        assert codec.reads(label, facts)
        assert not codec.reads(f"no-{label}", facts)
        assert codec.label(block_facts(1000, 2)) == label, "the same tenant, another block"

    def test_law_5_authentic_bytes_belong_to_one_block(self, codec: Codec) -> None:
        """Moved to another key, layout or length they are refused."""
        raw = self.blocks()[2]
        facts = block_facts(len(raw))
        stored = codec.encode(memoryview(raw), self.item_bytes, facts)
        into = memoryview(bytearray(len(raw)))
        assert codec.decode(memoryview(stored), into, facts) == len(raw)
        if codec.authentic:
            with pytest.raises(ChecksumError):
                codec.decode(memoryview(stored), into, block_facts(len(raw), 2))

    def test_law_6_many_threads_may_call(self, codec: Codec) -> None:
        """At once, with different blocks."""
        blocks = [self.blocks()[2][: 2048 * number] for number in range(1, 9)]
        expected = [_round(codec, raw, self.item_bytes, block_facts(len(raw))) for raw in blocks]

        def work(number: int) -> bool:
            raw = blocks[number % 8]
            return (
                _round(codec, raw, self.item_bytes, block_facts(len(raw))) == expected[number % 8]
            )

        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(work, range(200)))

    def test_law_7_memory_need_not_be_aligned(self, codec: Codec) -> None:
        """Views may begin at any byte."""
        raw = self.blocks()[2]
        facts = block_facts(len(raw))
        moved = memoryview(bytearray(b"x" + raw))[1:]
        stored = memoryview(bytearray(b"x" + codec.encode(moved, self.item_bytes, facts)))[1:]
        into = memoryview(bytearray(len(raw) + 1))[1:]
        assert codec.decode(stored, into, facts) == len(raw)
        assert bytes(into) == _round(codec, raw, self.item_bytes, facts)


def _round(codec: Codec, raw: bytes, item_bytes: int, facts: BlockFacts) -> bytes:
    into = bytearray(len(raw))
    stored = codec.encode(memoryview(raw), item_bytes, facts)
    assert codec.decode(memoryview(stored), memoryview(into), facts) == len(raw)
    return bytes(into)
