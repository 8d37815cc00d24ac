"""Lossless: the bytes of each element are laid out in planes, then compressed by zstd.

    item size 1 | one zstd frame of plane 0, plane 1, ...

Of a float's bytes those with sign and exponent repeat and the others hardly do; apart, the first
compress well and the others are recognised as noise quickly. Level 1 is both the fastest and, on
KV, the densest (docs/adr/0010); blosc2 packs as densely, slower, and brings an HTTP client along.
"""

from __future__ import annotations

import threading
from typing import Any, Final

import numpy as np

from kvstrata.core.errors import ChecksumError, ConfigError
from kvstrata.storage.codecs.base import BlockFacts, BytesLike, CodecSettings

__all__ = ["ZstdCodec"]

_LEVEL: Final = 1
_ITEMS: Final = (1, 2, 4, 8)


class ZstdCodec:
    """Byte planes and zstd."""

    name = "zstd"
    lossy = False
    authentic = False

    def __init__(self, settings: CodecSettings) -> None:
        """Raise ConfigError if the library is missing."""
        del settings
        try:
            import zstandard
        except ImportError as error:
            raise ConfigError(
                "codec zstd: zstandard is not installed", hint="pip install 'kvstrata[codecs]'"
            ) from error
        self._library: Any = zstandard
        self._own = threading.local()

    def label(self, facts: BlockFacts) -> str:
        """Return the name: nothing else needs to be known."""
        del facts
        return self.name

    def reads(self, label: str, facts: BlockFacts) -> bool:
        """Return whether it is the name."""
        del facts
        return label == self.name

    def stored_bytes_max(self, raw_bytes: int) -> int:
        """Return zstd's own bound and our byte."""
        return raw_bytes + (raw_bytes >> 8) + 256

    def encode(self, raw: memoryview, item_bytes: int, facts: BlockFacts) -> BytesLike:
        """Return planes, compressed."""
        del facts
        item = item_bytes if item_bytes in _ITEMS and len(raw) % item_bytes == 0 else 1
        compressor = getattr(self._own, "compressor", None)
        if compressor is None:  # neither compressor nor decompressor may be shared by threads
            compressor = self._own.compressor = self._library.ZstdCompressor(level=_LEVEL)
        frame: bytes = compressor.compress(_planes(raw, item))
        return bytes([item]) + frame

    def decode(self, stored: memoryview, into: memoryview, facts: BlockFacts) -> int:
        """Decompress and put the planes back together."""
        del facts
        item = stored[0] if len(stored) else 0
        if item not in _ITEMS:
            raise ChecksumError("zstd: not an encoding of ours")
        decompressor = getattr(self._own, "decompressor", None)
        if decompressor is None:
            decompressor = self._own.decompressor = self._library.ZstdDecompressor()
        try:
            # The frame is asked how much it holds before any of it is unpacked.
            length: int = self._library.frame_content_size(stored[1:])
            if not 0 <= length <= len(into) or length % item:
                raise ChecksumError(f"zstd: a frame of {length} bytes for {len(into)}")
            target = into[:length] if item == 1 else memoryview(bytearray(length))
            with decompressor.stream_reader(stored[1:]) as reader:
                done = _fill(reader, target)
                if done != length or reader.read(1):
                    raise ChecksumError(f"zstd: {done} bytes of {length}, or more behind them")
        except self._library.ZstdError as error:
            raise ChecksumError(f"zstd: {error}") from error
        if item > 1:
            _join(target, item, into[:length])
        return length


def _fill(reader: Any, target: memoryview) -> int:
    done = 0
    while done < len(target):
        moved: int = reader.readinto(target[done:])
        if not moved:
            break
        done += moved
    return done


def _planes(raw: memoryview, item: int) -> Any:
    """Return plane after plane; shifts of whole elements run several times as fast as a transpose.

    Bytes that are not aligned to the element take the transpose.
    """
    whole = np.frombuffer(raw, np.uint8)
    if item == 1:
        return whole
    if whole.ctypes.data % item:
        return np.ascontiguousarray(whole.reshape(-1, item).T)
    elements = whole.view(f"<u{item}")
    planes = np.empty((item, len(elements)), np.uint8)
    for place in range(item):
        np.right_shift(elements, 8 * place, out=planes[place], casting="unsafe")
    return planes


def _join(planes: memoryview, item: int, into: memoryview) -> None:
    """Put the planes' bytes back into elements."""
    rows = np.frombuffer(planes, np.uint8).reshape(item, -1)
    target = np.frombuffer(into, np.uint8)
    if target.ctypes.data % item:
        target.reshape(-1, item)[:] = rows.T
        return
    elements = target.view(f"<u{item}")
    np.copyto(elements, rows[item - 1])
    for place in reversed(range(item - 1)):
        np.left_shift(elements, 8, out=elements)
        np.bitwise_or(elements, rows[place], out=elements)
