"""Invitations and what is done where NIXL is absent: no NIXL needed."""

from __future__ import annotations

import importlib.util

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvstrata.core.errors import ConfigError, TransferError
from kvstrata.transfer.backends.nixl import binding
from kvstrata.transfer.backends.nixl.invitation import (
    INVITATION_BYTES_MAX,
    Invitation,
    PeerMemory,
    decode_invitation,
    encode_invitation,
)
from kvstrata.transfer.backends.nixl.probe import probe_plugins

PLAIN = Invitation("kvstrata-1", [PeerMemory("kvstrata-1", "arena", 4096, 8192)], b"opaque" * 50)
ENCODED = encode_invitation(PLAIN)


def test_it_comes_back():
    assert decode_invitation(ENCODED) == PLAIN
    assert decode_invitation(encode_invitation(PLAIN, b"k" * 32), b"k" * 32) == PLAIN


@given(st.binary(max_size=2000))
def test_any_bytes_are_refused(data):
    with pytest.raises(TransferError, match="invitation refused"):
        decode_invitation(data)


@given(st.binary(max_size=200))
def test_any_bytes_behind_the_right_beginning_are_refused(data):
    with pytest.raises(TransferError, match="invitation refused"):
        decode_invitation(ENCODED[:40] + data)


@given(st.integers(0, len(ENCODED) - 1), st.integers(1, 255))
def test_one_changed_byte_is_refused(place, change):
    damaged = bytearray(ENCODED)
    damaged[place] ^= change
    with pytest.raises(TransferError, match="invitation refused"):
        decode_invitation(bytes(damaged))


@given(st.integers(0, len(ENCODED) - 1), st.binary(min_size=1, max_size=8))
def test_a_cut_and_an_addition_are_refused(place, more):
    for damaged in (ENCODED[:place], ENCODED + more):
        with pytest.raises(TransferError, match="invitation refused"):
            decode_invitation(damaged)


@given(st.binary(max_size=300))
@example(b"\x93\xa8\x00\x00\x00\x00\x00\x00\x00\x80")  # a name that is no text
def test_a_body_that_was_signed_and_is_none_is_refused(body):
    """Whoever holds the secret may still be another program."""
    from kvstrata.transfer.backends.nixl import invitation

    data = ENCODED[:8] + invitation._digest(body, None) + body
    with pytest.raises(TransferError, match="invitation refused"):
        decode_invitation(data)


def test_memory_of_others_and_behind_the_last_address_is_refused():
    for region in (PeerMemory("other", "a", 0, 1), PeerMemory("me", "a", (1 << 64) - 10, 11)):
        with pytest.raises(TransferError, match="invitation refused"):
            decode_invitation(encode_invitation(Invitation("me", [region], b"")))


def test_lengths_are_bounded_on_both_sides():
    with pytest.raises(TransferError, match="too long"):
        encode_invitation(Invitation("me", [], bytes(INVITATION_BYTES_MAX)))
    with pytest.raises(TransferError, match="longer than any"):
        decode_invitation(bytes(INVITATION_BYTES_MAX + 1))


@pytest.fixture
def no_nixl(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith("nixl") else find(name)
    )


@pytest.mark.usefixtures("no_nixl")
def test_absent_nixl_is_told_with_a_remedy():
    assert binding.nixl_version() is None
    with pytest.raises(ConfigError, match="not installed") as refusal:
        binding.load_binding()
    assert "pip install --no-deps" in refusal.value.hint
    for probe in probe_plugins():
        assert not probe.usable
        assert probe.remedy == binding.INSTALL_HINT


def test_an_old_nixl_is_refused():
    with pytest.raises(ConfigError, match=r"older than 1\.5\.1"):
        binding._check_version("1.4.9")
    for fine in ("1.5.1", "1.10.0", "2.0.0", "unknown"):
        binding._check_version(fine)
