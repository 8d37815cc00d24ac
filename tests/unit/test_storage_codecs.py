"""Chains of codecs: what they read, what they refuse, what is lost, and keys that never repeat."""

from __future__ import annotations

import dataclasses
import os
import random
from importlib.metadata import EntryPoint

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvstrata.core.errors import ChecksumError, ConfigError, TransferError
from kvstrata.storage.codecs import CodecSettings, chain, make_chain
from kvstrata.storage.envelope import Refusal
from kvstrata.testing.contracts.codec import block_facts

pytest.importorskip("zstandard", reason="no zstandard installed (kvstrata[codecs])")
pytest.importorskip("cryptography", reason="no cryptography installed (kvstrata[codecs])")
ml_dtypes = pytest.importorskip("ml_dtypes", reason="no ml_dtypes installed (kvstrata[codecs])")

from kvstrata.storage.codecs.aes import AesCodec  # noqa: E402
from kvstrata.storage.codecs.fp8 import RELATIVE_ERROR_MAX, Fp8Codec, measure_error  # noqa: E402
from kvstrata.storage.codecs.zstd import ZstdCodec  # noqa: E402

SETTINGS = CodecSettings("bfloat16", bytes(range(32)))
KV = (
    np.random.default_rng(1).standard_normal(32_768).astype(ml_dtypes.bfloat16).view(np.uint8)
).tobytes()
FACTS = block_facts(len(KV))
CHAINS = ["none", "zstd", "aes", "zstd+aes", "fp8", "fp8+zstd", "fp8+zstd+aes"]


def stored(text, facts=FACTS, raw=KV, settings=SETTINGS):
    made = make_chain(text, settings)
    return made.label(facts), memoryview(bytes(made.encode(memoryview(raw), facts)))


def read(text, label, data, facts=FACTS, settings=SETTINGS):
    into = bytearray(facts.raw_bytes)
    refusal = make_chain(text, settings).decode(label, data, memoryview(into), facts)
    return refusal or bytes(into)


class TestChains:
    @pytest.mark.parametrize("text", CHAINS)
    def test_what_a_chain_wrote_it_reads(self, text):
        label, data = stored(text)
        made = make_chain(text, SETTINGS)
        assert made.lossy is ("fp8" in text)
        assert len(data) <= made.stored_bytes_max(len(KV))
        back = read(text, label, data)
        if made.lossy:
            assert read(text, *stored(text, raw=back)) is not None
            assert np.allclose(
                np.frombuffer(back, ml_dtypes.bfloat16).astype(float),
                np.frombuffer(KV, ml_dtypes.bfloat16).astype(float),
                rtol=RELATIVE_ERROR_MAX,
                atol=0.01,
            )
        else:
            assert back == KV

    @pytest.mark.parametrize("writer", CHAINS)
    @pytest.mark.parametrize("reader", CHAINS)
    def test_who_reads_whom(self, writer, reader):
        """No reader that did not ask for loss gets it; none that encrypts reads plain bytes."""
        label, data = stored(writer)
        found = read(reader, label, data)
        allowed = ("fp8" not in writer or "fp8" in reader) and (
            "aes" not in reader or "aes" in writer
        )
        assert (found is not Refusal.OTHER_CODEC) is allowed
        if allowed and "fp8" not in writer:
            assert found == KV

    def test_labels_are_what_the_header_has_room_for(self):
        assert make_chain("zstd", SETTINGS).label(FACTS) == "zstd"
        label = make_chain("fp8+zstd+aes", SETTINGS).label(FACTS)
        assert label.startswith("fp8+zstd+aes@")
        assert len(label) <= 64

    @pytest.mark.parametrize("label", ["lzma", "zstd+lzma", "zstd+zstd", "aes@00", "aes", "", "+"])
    def test_unknown_labels_are_refused(self, label):
        assert read("none", label, memoryview(KV)) is Refusal.OTHER_CODEC

    def test_plain_bytes_of_another_length_are_refused(self):
        assert read("none", "none", memoryview(KV)[:-1]) is Refusal.OTHER_BYTES

    @pytest.mark.parametrize("text", ["", "zstd+zstd", "zstd+fp8", "aes+zstd", "zstd+none", "gzip"])
    def test_chains_that_make_no_sense(self, text):
        with pytest.raises(ConfigError, match="codec") as caught:
            make_chain(text, SETTINGS)
        assert caught.value.hint

    def test_what_cannot_be_made_says_what_to_do(self, monkeypatch):
        with pytest.raises(ConfigError, match="32 bytes"):
            make_chain("aes", CodecSettings("bfloat16"))
        with pytest.raises(ConfigError, match="gain nothing"):
            make_chain("fp8", CodecSettings("int8"))
        for name, module in (("zstd", "zstandard"), ("fp8", "ml_dtypes"), ("aes", "cryptography")):
            monkeypatch.setitem(__import__("sys").modules, module, None)
            monkeypatch.setitem(__import__("sys").modules, f"{module}.exceptions", None)
            with pytest.raises(ConfigError, match="not installed") as caught:
                make_chain(name, SETTINGS)
            assert "kvstrata[codecs]" in caught.value.hint
        assert make_chain("none", SETTINGS).plain

    def test_secrets_are_not_shown(self):
        assert "\\x1f" not in repr(SETTINGS)
        assert repr(SETTINGS.secret)[2:20] not in repr(SETTINGS)


class Upside:
    """A plug-in: every byte the other way round."""

    name, lossy, authentic = "upside", False, False

    def __init__(self, settings):
        self.settings = settings

    def label(self, _facts):
        return self.name

    def reads(self, label, _facts):
        return label == self.name

    def stored_bytes_max(self, raw_bytes):
        return raw_bytes

    def encode(self, raw, _item_bytes, _facts):
        return bytes(255 - each for each in raw)

    def decode(self, data, into, _facts):
        into[: len(data)] = bytes(255 - each for each in data)
        return len(data)


class TestPlugIns:
    @pytest.fixture
    def offer(self, monkeypatch):
        def make(made, name="upside"):
            entry = EntryPoint(name, "somewhere:made", chain.ENTRY_POINTS)
            monkeypatch.setattr(chain, "entry_points", lambda **_group: [entry])
            monkeypatch.setattr(EntryPoint, "load", lambda _self: made)

        return make

    def test_one_is_used_by_name(self, offer):
        offer(Upside)
        label, data = stored("upside+aes")
        assert label.startswith("upside+aes@")
        assert read("upside+aes", label, data) == KV
        assert read("aes", label, data) is Refusal.OTHER_CODEC

    def test_one_that_is_no_codec_is_named(self, offer):
        offer(lambda _settings: object())
        with pytest.raises(ConfigError, match="lacks label"):
            make_chain("upside", SETTINGS)
        offer(Upside, "other")
        with pytest.raises(ConfigError, match="lacks its name"):
            make_chain("other", SETTINGS)

    def test_one_that_does_not_say_whether_it_loses_anything_is_named(self, offer):
        offer(type("Silent", (Upside,), {"lossy": None}))
        with pytest.raises(ConfigError, match="lacks lossy"):
            make_chain("upside", SETTINGS)

    def test_one_that_fails_is_named(self, offer):
        offer(lambda: None)
        with pytest.raises(ConfigError, match="cannot be made"):
            make_chain("upside", SETTINGS)


class TestZstd:
    def test_kv_gets_shorter_and_noise_hardly_longer(self):
        codec = ZstdCodec(SETTINGS)
        assert len(codec.encode(memoryview(KV), 2, FACTS)) < 0.8 * len(KV)
        noise = random.Random(1).randbytes(1 << 16)
        assert len(codec.encode(memoryview(noise), 2, FACTS)) < 1.01 * len(noise)

    def test_a_bomb_is_refused_before_it_is_unpacked(self):
        import zstandard

        bomb = b"\x01" + zstandard.ZstdCompressor().compress(bytes(1 << 28))
        with pytest.raises(ChecksumError, match="frame of"):
            ZstdCodec(SETTINGS).decode(memoryview(bomb), memoryview(bytearray(1000)), FACTS)

    def test_frames_that_do_not_say_their_length_or_go_on(self):
        import zstandard

        codec, into = ZstdCodec(SETTINGS), memoryview(bytearray(1000))
        silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))
        two = zstandard.ZstdCompressor().compress(bytes(500)) * 2
        with pytest.raises(ChecksumError, match="frame of"):
            codec.decode(memoryview(b"\x01" + silent), into, FACTS)
        with pytest.raises(ChecksumError):
            codec.decode(memoryview(b"\x01" + two), into, FACTS)


class TestFp8:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    @given(data=st.data())
    def test_the_stated_bound_holds_for_any_numbers(self, dtype, data):
        kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        largest = float(ml_dtypes.finfo(kind).max)
        values = data.draw(
            arrays(
                np.float32,
                st.integers(1, 300),
                elements=st.floats(-largest, largest, width=32)
                | st.floats(-10, 10, width=32)
                | st.floats(0, 2.0**-20, width=32),
            )
        )
        with np.errstate(over="ignore"):
            raw = np.clip(values, -largest, largest).astype(kind).view(np.uint8).tobytes()
        found = measure_error(
            Fp8Codec(CodecSettings(dtype)), memoryview(raw), block_facts(len(raw))
        )
        assert found.within_bound, str(found)
        assert found.relative_max <= RELATIVE_ERROR_MAX

    def test_subnormal_elements_are_rounded_by_their_own_type_too(self):
        raw = np.array([2.0**-6, 12 * 2.0**-24], np.float16).tobytes()
        codec = Fp8Codec(CodecSettings("float16"))
        found = measure_error(codec, memoryview(raw), block_facts(len(raw)))
        assert found.within_bound, str(found)

    def test_the_measurement_says_what_was_lost(self):
        found = measure_error(Fp8Codec(SETTINGS), memoryview(KV), FACTS)
        assert 0.03 < found.relative_max <= RELATIVE_ERROR_MAX
        assert 0.01 < found.root_mean_square < 0.04
        assert "within" in str(found)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_what_is_no_number_is_not_stored(self, value):
        values = np.ones(200, np.float32)
        values[150] = value
        raw = values.astype(ml_dtypes.bfloat16).view(np.uint8).tobytes()
        with pytest.raises(TransferError, match="NaN or infinity") as caught:
            make_chain("fp8", SETTINGS).encode(memoryview(raw), block_facts(len(raw)))
        assert not caught.value.retryable

    def test_half_the_size(self):
        assert len(stored("fp8")[1]) < 0.52 * len(KV)


class TestAes:
    def test_a_tenant_cannot_read_another(self):
        label, data = stored("aes")
        other = dataclasses.replace(FACTS, tenant=b"somebody")
        assert read("aes", label, data, other) is Refusal.OTHER_CODEC
        with pytest.raises(ChecksumError):
            AesCodec(SETTINGS).decode(data, memoryview(bytearray(len(KV))), other)

    def test_a_wrong_secret_is_another_key_and_not_damage(self):
        label, data = stored("zstd+aes")
        wrong = CodecSettings("bfloat16", bytes(32))
        assert read("zstd+aes", label, data, settings=wrong) is Refusal.OTHER_CODEC

    def test_nothing_of_the_plain_bytes_is_in_the_stored_ones(self):
        raw = b"secret KV " * 1000
        _, data = stored("aes", block_facts(len(raw)), raw)
        assert b"secret" not in bytes(data)

    def test_nonces_never_repeat(self):
        codec = AesCodec(SETTINGS)
        seen = {bytes(codec.encode(memoryview(b"x"), 1, FACTS))[:28] for _ in range(2000)}
        seen |= {
            bytes(AesCodec(SETTINGS).encode(memoryview(b"x"), 1, FACTS))[:28] for _ in range(9)
        }
        assert len(seen) == 2009

    def test_nonces_never_repeat_after_a_fork(self):
        codec = AesCodec(SETTINGS)
        first = codec.encode(memoryview(b"x"), 1, FACTS)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, bytes(codec.encode(memoryview(b"x"), 1, FACTS)))
            os._exit(0)
        os.waitpid(child, 0)
        theirs = os.read(reader, 100)
        ours = codec.encode(memoryview(b"x"), 1, FACTS)
        os.close(reader)
        os.close(writer)
        incarnations = {bytes(each)[:16] for each in (first, ours)}
        assert len(incarnations) == 1
        assert theirs[:16] not in incarnations
        into = bytearray(1)
        assert codec.decode(memoryview(theirs), memoryview(into), FACTS) == 1

    @pytest.mark.parametrize("field", ["key", "fingerprint", "namespace", "tenant"])
    def test_a_block_under_another_name_is_refused(self, field):
        value = getattr(FACTS, field)
        other = dataclasses.replace(FACTS, **{field: bytes(len(value))})
        _, data = stored("aes")
        with pytest.raises(ChecksumError):
            AesCodec(SETTINGS).decode(data, memoryview(bytearray(len(KV))), other)

    def test_every_flipped_bit_is_noticed(self):
        raw = bytes(20)
        _, data = stored("aes", block_facts(20), raw)
        codec = AesCodec(SETTINGS)
        for bit in range(8 * len(data)):
            spoilt = bytearray(data)
            spoilt[bit // 8] ^= 1 << bit % 8
            with pytest.raises(ChecksumError):
                codec.decode(memoryview(spoilt), memoryview(bytearray(20)), block_facts(20))
