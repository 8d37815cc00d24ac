"""One line of a slab's index: 128 bytes that say which block a slot holds.

    magic 8 | written 8 | key 16 | parent 16 | seal 16 | length 8 | flags 4
    | namespace 8 | tenant 8 | zeros | crc32 4

The tags of namespace and tenant say who is charged for the block; zeros, as in lines of before
there were tenants, mean nobody. All integers little-endian; the CRC covers everything before it. A
line that is blank means an empty slot; one that is torn or of another version means the same, and
is counted.
"""

from __future__ import annotations

import struct
from typing import Final
from zlib import crc32

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.storage.base import StoredBlock

__all__ = ["BLANK_ENTRY", "ENTRY_BYTES", "decode_entry", "encode_entry"]

ENTRY_BYTES: Final = 128
"""Length of one line."""
BLANK_ENTRY: Final = bytes(ENTRY_BYTES)
"""The line of an empty slot."""

_BODY: Final = struct.Struct("<8sQ16s16s16sQI16s")
_CRC: Final = struct.Struct("<I")
_MAGIC: Final = b"KVSENTR1"
_HAS_PARENT: Final = 1
_PADDING: Final = bytes(ENTRY_BYTES - _BODY.size - _CRC.size)


def encode_entry(block: StoredBlock, block_bytes: int) -> bytes:
    """Return the line of `block`, whose payload is `block_bytes` long."""
    flags = 0 if block.parent is None else _HAS_PARENT
    body = _BODY.pack(
        _MAGIC,
        block.written,
        block.key,
        block.parent or b"",
        block.checksum,
        block_bytes,
        flags,
        block.owner,
    )
    body += _PADDING
    return body + _CRC.pack(crc32(body))


def decode_entry(line: bytes, slot: SlotId, block_bytes: int) -> StoredBlock | None:
    """Return what `line` says of `slot`, or None if it is blank, torn or not ours."""
    if len(line) != ENTRY_BYTES or _CRC.unpack_from(line, ENTRY_BYTES - 4)[0] != crc32(line[:-4]):
        return None
    magic, written, key, parent, checksum, length, flags, owner = _BODY.unpack_from(line)
    if magic != _MAGIC or length != block_bytes:
        return None
    return StoredBlock(
        slot=slot,
        key=SequenceHash(key),
        parent=SequenceHash(parent) if flags & _HAS_PARENT else None,
        checksum=checksum,
        written=written,
        owner=owner,
    )
