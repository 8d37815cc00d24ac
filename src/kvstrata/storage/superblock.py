"""The first page of a slab: what it holds, and up to where it was cleared. Pure: bytes and values.

    | magic version fingerprint slots stride block text | zeros | crc32 | floor: last 512 bytes |

All integers little-endian. Any bytes are either a page of ours or a refusal that says why.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final
from zlib import crc32

from kvstrata.core.errors import ConfigError, LayoutError
from kvstrata.storage.base import COUNTER_MAX, PAGE_BYTES, align
from kvstrata.storage.entry import ENTRY_BYTES

__all__ = [
    "FLOOR_BYTES",
    "FLOOR_OFFSET",
    "Superblock",
    "decode_floor",
    "decode_superblock",
    "encode_floor",
    "is_marked",
]

_VERSION: Final = 1
_MAGIC: Final = b"KVSTRATA"
_HEAD: Final = struct.Struct("<8sI16sQQQH")  # magic version fingerprint slots stride block text
_FLOOR: Final = struct.Struct("<QI")  # write counter, crc32 of it
_KEEP: Final = (
    "kvstrata never reads or deletes it: move it away, or use another directory or device"
)

FLOOR_OFFSET: Final = PAGE_BYTES - 512
"""Where the floor lies: a sector of its own, so that a torn one harms nothing else."""
FLOOR_BYTES: Final = _FLOOR.size
"""Length of the floor's record."""


@dataclass(frozen=True, slots=True)
class Superblock:
    """What a slab says about itself."""

    fingerprint: bytes
    """Fingerprint of the blocks' layout."""
    slots: int
    """Number of slots."""
    stride_bytes: int
    """Distance between neighbouring slots."""
    block_bytes: int
    """Length of a block."""
    description: str
    """The layout in words, for the message when another one is asked for."""

    @property
    def index_end(self) -> int:
        """Where the index ends and slot 0 begins."""
        return align(PAGE_BYTES + self.slots * ENTRY_BYTES)

    @property
    def length_bytes(self) -> int:
        """Length of the whole slab."""
        return self.index_end + self.slots * self.stride_bytes

    def encode(self) -> bytes:
        """Return the page, with a floor of 0."""
        text = self.description.encode()[: FLOOR_OFFSET - _HEAD.size - 4]
        head = _HEAD.pack(
            _MAGIC,
            _VERSION,
            self.fingerprint,
            self.slots,
            self.stride_bytes,
            self.block_bytes,
            len(text),
        )
        body = (head + text).ljust(FLOOR_OFFSET - 4, b"\0")
        return (body + struct.pack("<I", crc32(body)) + encode_floor(0)).ljust(PAGE_BYTES, b"\0")

    def check(self, page: bytes, name: str, capacity_bytes: int) -> None:
        """Raise LayoutError or ConfigError unless `page` is the first one of such a slab.

        `name` and `capacity_bytes` are for the message.
        """
        found = decode_superblock(page, name)
        if (found.fingerprint, found.stride_bytes, found.block_bytes) != (
            self.fingerprint,
            self.stride_bytes,
            self.block_bytes,
        ):
            raise LayoutError(
                f"tiers.disk: {name!r} holds blocks of another layout: {found.description!r}, "
                f"not {self.description!r}",
                hint=_KEEP,
            )
        if found.slots != self.slots:
            raise ConfigError(
                f"tiers.disk: {name!r} has {found.slots} slots, a size of {capacity_bytes} bytes "
                f"means {self.slots}",
                hint="keep the size that it was made with, or move the slab away",
            )

    def check_length(self, found_bytes: int, name: str) -> None:
        """Raise LayoutError if a slab of `found_bytes` has lost its end."""
        if found_bytes < self.length_bytes:
            raise LayoutError(f"tiers.disk: {name!r} has been cut short", hint=_KEEP)


def decode_superblock(page: bytes, name: str) -> Superblock:
    """Return what the first page of the slab `name` says.

    Raises LayoutError for a page that is not ours, of another version, or damaged.
    """
    if len(page) < PAGE_BYTES or not is_marked(page):
        raise LayoutError(f"tiers.disk: {name!r} is not a kvstrata slab", hint=_KEEP)
    _, version, fingerprint, slots, stride, block, text = _HEAD.unpack_from(page)
    if version != _VERSION:
        raise LayoutError(
            f"tiers.disk: {name!r} was written by slab version {version}, this is {_VERSION}",
            hint=_KEEP,
        )
    body = page[:FLOOR_OFFSET]
    if struct.unpack("<I", body[-4:])[0] != crc32(body[:-4]):
        raise LayoutError(f"tiers.disk: the superblock of {name!r} is damaged", hint=_KEEP)
    description = body[_HEAD.size : _HEAD.size + text].decode(errors="replace")
    return Superblock(fingerprint, slots, stride, block, description)


def is_marked(page: bytes) -> bool:
    """Return whether `page` begins as a slab of any version does."""
    return page.startswith(_MAGIC)


def encode_floor(written: int) -> bytes:
    """Return the record that says that all up to write counter `written` was cleared."""
    return _FLOOR.pack(written, crc32(written.to_bytes(8, "little")))


def decode_floor(record: bytes) -> int | None:
    """Return the write counter that `record` says, None if it is damaged."""
    if len(record) != FLOOR_BYTES:
        return None
    written: int
    written, crc = _FLOOR.unpack(record)
    return written if crc == crc32(record[:8]) and written <= COUNTER_MAX else None
