"""The header of blocks that lie alone: round trips, every flip noticed, any bytes survived."""

from __future__ import annotations

import dataclasses
import struct
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.core.errors import ConfigError
from kvstrata.storage.envelope import (
    CHAIN_BYTES_MAX,
    HEADER_BYTES,
    STORED_BYTES_MAX,
    Envelope,
    Refusal,
    decode_envelope,
    encode_envelope,
)

CODECS = st.sampled_from(["none", "zstd", "zstd+aes@0011223344556677", "fp8+zstd", "a.b-c_9"])
LENGTHS = st.integers(1, STORED_BYTES_MAX)


def fixed(length):
    return st.binary(min_size=length, max_size=length)


@st.composite
def envelopes(draw):
    codec, raw = draw(CODECS), draw(LENGTHS)
    return Envelope(
        key=draw(fixed(16)),
        parent=draw(st.none() | fixed(16)),
        fingerprint=draw(fixed(16)),
        raw_bytes=raw,
        stored_bytes=raw if codec == "none" else draw(st.integers(0, STORED_BYTES_MAX)),
        seal=draw(fixed(16)),
        codec=codec,
        namespace=draw(fixed(8)),
        tenant=draw(fixed(8)),
    )


SAMPLE = Envelope(b"k" * 16, b"p" * 16, b"f" * 16, 4096, 1000, b"s" * 16, "zstd", b"n" * 8)


def sign(body):
    """Return a header whose CRC is right, whatever its fields say."""
    return body + struct.pack("<I", crc32(body))


@given(envelopes())
def test_round_trip(envelope):
    header = encode_envelope(envelope)
    assert len(header) == HEADER_BYTES
    assert decode_envelope(header) == envelope
    assert decode_envelope(memoryview(bytearray(header))) == envelope


def test_root_and_a_parent_of_zeros_are_told_apart():
    for parent in (None, bytes(16)):
        envelope = dataclasses.replace(SAMPLE, parent=parent)
        assert decode_envelope(encode_envelope(envelope)) == envelope


def test_every_single_flipped_bit_is_noticed():
    header = encode_envelope(SAMPLE)
    for bit in range(8 * HEADER_BYTES):
        spoilt = bytearray(header)
        spoilt[bit // 8] ^= 1 << bit % 8
        assert isinstance(decode_envelope(spoilt), Refusal), f"bit {bit} was not noticed"


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_any_bytes_are_refused(data):
    assert isinstance(decode_envelope(data), Refusal)


@given(st.data())
def test_any_signed_fields_are_refused_or_encode_to_the_same_header(data):
    """Past the CRC every field is still checked: what is accepted is exactly what we write."""
    body = bytearray(encode_envelope(data.draw(envelopes()))[:-4])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(8, len(body) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=8))
        body[at : at + len(piece)] = piece
    header = sign(bytes(body[: HEADER_BYTES - 4]).ljust(HEADER_BYTES - 4, b"\0"))
    found = decode_envelope(header)
    assert isinstance(found, Refusal) or encode_envelope(found) == header


@pytest.mark.parametrize("length", range(HEADER_BYTES))
def test_short_headers_say_so(length):
    assert decode_envelope(encode_envelope(SAMPLE)[:length]) is Refusal.SHORT


def test_each_refusal_has_its_reason():
    header = encode_envelope(SAMPLE)
    newer = header[:8] + struct.pack("<H", 2) + header[10:]
    assert decode_envelope(header + b"\0") is Refusal.LONG
    assert decode_envelope(b"PK\x03\x04" + header) is Refusal.FOREIGN
    assert decode_envelope(bytes(HEADER_BYTES)) is Refusal.FOREIGN
    assert decode_envelope(newer) is Refusal.NEWER
    assert decode_envelope(newer + bytes(1000)) is Refusal.NEWER
    assert decode_envelope(header[:-1] + bytes([header[-1] ^ 1])) is Refusal.DAMAGED


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("key", b"short"),
        ("parent", b"p" * 17),
        ("fingerprint", b""),
        ("seal", b"s" * 15),
        ("namespace", b"n" * 9),
        ("tenant", b""),
        ("codec", ""),
        ("codec", "none none"),
        ("codec", "zstd+"),
        ("codec", "zstd@"),
        ("codec", "zstd\n"),
        ("codec", "Ä"),
        ("codec", "z" * (CHAIN_BYTES_MAX + 1)),
        ("raw_bytes", 0),
        ("raw_bytes", STORED_BYTES_MAX + 1),
        ("stored_bytes", -1),
        ("stored_bytes", STORED_BYTES_MAX + 1),
    ],
)
def test_fields_that_no_header_can_hold_are_refused(field, value):
    with pytest.raises(ConfigError, match="envelope"):
        dataclasses.replace(SAMPLE, **{field: value})


def test_plain_bytes_are_as_long_as_the_block():
    with pytest.raises(ConfigError, match="plain"):
        dataclasses.replace(SAMPLE, codec="none")
