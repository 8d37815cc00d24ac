"""Every shipped codec under the laws of the seam."""

from __future__ import annotations

import pytest

from kvstrata.storage.codecs import CodecSettings
from kvstrata.testing.contracts.codec import CodecContract

SECRET = bytes(range(32))


class TestZstd(CodecContract):
    @pytest.fixture
    def codec(self):
        pytest.importorskip("zstandard", reason="no zstandard installed (kvstrata[codecs])")
        from kvstrata.storage.codecs.zstd import ZstdCodec

        return ZstdCodec(CodecSettings("bfloat16"))


class TestZstdOfWideFloats(TestZstd):
    item_bytes = 4


class TestZstdOfBytes(TestZstd):
    item_bytes = 1


class TestFp8(CodecContract):
    @pytest.fixture
    def codec(self):
        pytest.importorskip("ml_dtypes", reason="no ml_dtypes installed (kvstrata[codecs])")
        from kvstrata.storage.codecs.fp8 import Fp8Codec

        return Fp8Codec(CodecSettings("float16"))


class TestFp8OfWideFloats(TestFp8):
    item_bytes = 4

    @pytest.fixture
    def codec(self):
        pytest.importorskip("ml_dtypes", reason="no ml_dtypes installed (kvstrata[codecs])")
        from kvstrata.storage.codecs.fp8 import Fp8Codec

        return Fp8Codec(CodecSettings("float32"))


class TestAes(CodecContract):
    @pytest.fixture
    def codec(self):
        pytest.importorskip("cryptography", reason="no cryptography installed (kvstrata[codecs])")
        from kvstrata.storage.codecs.aes import AesCodec

        return AesCodec(CodecSettings("bfloat16", SECRET))
