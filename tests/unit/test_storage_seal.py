"""The seal: one changed bit anywhere in key, layout or bytes gives another one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128

from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.seal import SEAL_BYTES, seal

KEY, FINGERPRINT = bytes(range(16)), bytes(range(100, 116))
PAYLOADS = st.binary(min_size=1, max_size=300)


def flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@given(payload=PAYLOADS)
def test_is_the_checksum_of_key_layout_and_bytes_in_this_order(payload):
    found = seal(KEY + FINGERPRINT, payload)
    assert len(found) == SEAL_BYTES
    assert found == xxh3_128(KEY + FINGERPRINT + payload).digest()


@given(payload=PAYLOADS)
def test_bytes_and_views_give_the_same_seal(payload):
    view = memoryview(bytearray(b"before" + payload + b"after"))[6:-5]
    assert seal(KEY + FINGERPRINT, view) == seal(KEY + FINGERPRINT, payload)


@given(payload=PAYLOADS, data=st.data())
def test_any_single_bit_of_the_payload_counts(payload, data):
    bit = data.draw(st.integers(0, len(payload) * 8 - 1))
    assert seal(KEY + FINGERPRINT, flipped(payload, bit)) != seal(KEY + FINGERPRINT, payload)


def test_every_single_bit_of_key_and_fingerprint_counts():
    binding = KEY + FINGERPRINT
    seals = {seal(flipped(binding, bit), b"payload") for bit in range(len(binding) * 8)}
    assert len(seals) == len(binding) * 8
    assert seal(binding, b"payload") not in seals


def test_the_same_bytes_of_another_layout_have_another_seal():
    layouts = [
        BlockLayout((Dimension("layer", 2), Dimension("channel", 8)), dtype, 4, "test")
        for dtype in ("float16", "bfloat16")
    ]
    assert layouts[0].block_bytes == layouts[1].block_bytes
    assert len({seal(KEY + layout.fingerprint, bytes(32)) for layout in layouts}) == 2
