"""What comes over a socket or lies in a shared place may be anything: it is ours, or refused."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import get_args
from zlib import crc32

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.core.errors import CallRefusedError, KvstrataError, LayoutError
from kvstrata.core.ids import HASH_BYTES
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.runtime import messages as wire
from kvstrata.storage.marker import check_marker, decode_marker, encode_marker
from kvstrata.tokens import Namespace

LAYOUT = BlockLayout((Dimension("layer", 3), Dimension("channel", 1000)), "int8", 8, "test")
SPACE = Namespace("model", "weights", "numerics", "int8", LAYOUT.geometry, 8)
KEY = b"k" * HASH_BYTES

CALLS = [
    wire.Hello(wire.PROTOCOL_VERSION, [wire.Process(1, 2)], LAYOUT, SPACE),
    wire.Lookup("r", KEY, (0, 1), 1.5),
    wire.Acquire("r", KEY),
    wire.Lease("r", KEY, 3.0),
    wire.Release(["r", "s"]),
    wire.Reserve("r", KEY, b"l" * HASH_BYTES),
    wire.Seal("r", [1, 2]),
    wire.Forget(KEY),
]
ANSWERS = [
    wire.Refused("no", "hint"),
    wire.Done(),
    wire.Cleared(3),
    wire.Found(1, {"disk": 1}, 0, 1.0, "why"),
    wire.Acquired(1, [1], [2], {"host": 1}),
    wire.Reserved([0], [1], 0),
]
TAGS = [kind.__name__ for kind in (*get_args(wire.Call), *get_args(wire.Answer))]
FIELDS = sorted(
    {
        field
        for kind in (*get_args(wire.Call), *get_args(wire.Answer))
        for field in kind.__struct_fields__
    }
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=3 * HASH_BYTES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
BODIES = st.builds(
    lambda tag, fields: {"type": tag} | fields,
    st.sampled_from(TAGS),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5),
)


def read(decode, data) -> None:
    """Decode; what is taken must mean the same when it is said again."""
    try:
        found = decode(data)
    except (msgspec.MsgspecError, KvstrataError):
        return
    said = wire.encode(found)
    assert wire.encode(decode(said)) == said


@given(data=st.binary(max_size=300))
def test_any_bytes(data):
    read(wire.decode_envelope, data)
    read(wire.decode_reply, data)


@given(body=BODIES, session=VALUES)
def test_any_fields_of_any_call_or_answer(body, session):
    envelope = {"id": 1, "deadline": time.monotonic(), "session": session, "call": body}
    read(wire.decode_envelope, msgspec.msgpack.encode(envelope))
    read(wire.decode_reply, msgspec.msgpack.encode({"id": 1, "answer": body}))


@given(call=st.sampled_from(CALLS), data=st.data())
def test_a_call_that_was_changed_under_way(call, data):
    good = wire.encode(wire.Envelope(5, 1.0, 7, call))
    assert wire.decode_envelope(good).call == call
    spoilt = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        spoilt[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    read(wire.decode_envelope, bytes(spoilt))
    read(wire.decode_envelope, bytes(spoilt[: data.draw(st.integers(0, len(good)))]))


@given(joined=st.binary(max_size=5 * HASH_BYTES))
def test_any_hashes(joined):
    try:
        found = wire.split_hashes(joined)
    except CallRefusedError:
        return
    assert wire.join_hashes(found) == joined
    assert len(set(found)) == len(found)


@given(answer=st.sampled_from(ANSWERS), data=st.data())
def test_an_answer_that_was_changed_under_way(answer, data):
    good = wire.encode(wire.Reply(5, answer))
    assert wire.decode_reply(good).answer == answer
    at = data.draw(st.integers(0, len(good) - 1))
    read(wire.decode_reply, good[:at] + bytes([data.draw(st.integers(0, 255))]) + good[at + 1 :])


# -- the marker of a directory or a bucket ---------------------------------------------------------

MARKER = encode_marker(LAYOUT)
BODY = MARKER.rpartition(b"crc32 ")[0]


def sealed(body: bytes) -> bytes:
    """Return `body` with the checksum that fits it: what somebody wrote on purpose."""
    return body + b"crc32 %08x\n" % crc32(body)


@given(
    found=st.binary(max_size=200)
    | st.binary(max_size=200).map(sealed)
    | st.binary(max_size=200).map(lambda tail: sealed(BODY[:31] + tail))
    | st.text(max_size=60).map(lambda line: sealed(BODY[:31] + f"layout {line}\nx\n".encode()))
)
def test_any_marker_is_a_layout_or_refused(found):
    with pytest.raises(LayoutError) as caught:
        check_marker(found, LAYOUT, "here")
    assert caught.value.hint
    with suppress(LayoutError):
        fingerprint, _ = decode_marker(found, "here")
        assert len(fingerprint) == len(LAYOUT.fingerprint)


def test_a_marker_says_what_it_was_made_of():
    check_marker(MARKER, LAYOUT, "here")
    assert decode_marker(MARKER, "here") == (LAYOUT.fingerprint, LAYOUT.describe())
    with pytest.raises(LayoutError, match="damaged"):
        decode_marker(sealed(BODY[:31] + b"layout no-hex\nx\n"), "here")


@given(bit=st.integers(0, 8 * len(MARKER) - 1))
def test_every_flipped_bit_of_a_marker_is_refused(bit):
    spoilt = bytearray(MARKER)
    spoilt[bit // 8] ^= 1 << bit % 8
    with pytest.raises(LayoutError):
        decode_marker(bytes(spoilt), "here")
