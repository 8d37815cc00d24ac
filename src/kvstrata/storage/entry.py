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
from collections.abc import Iterator
from functools import partial
from typing import Any, Final
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.storage.base import COUNTER_MAX, StoredBlock

__all__ = ["BLANK_ENTRY", "ENTRY_BYTES", "decode_entries", "decode_entry", "encode_entry"]

ENTRY_BYTES: Final = 128
"""Length of one line."""
BLANK_ENTRY: Final = bytes(ENTRY_BYTES)
"""The line of an empty slot."""

_BODY: Final = struct.Struct("<8sQ16s16s16sQI16s")
_CRC: Final = struct.Struct("<I")
_MAGIC: Final = b"KVSENTR1"
_HAS_PARENT: Final = 1
_PADDING: Final = bytes(ENTRY_BYTES - _BODY.size - _CRC.size)
_MAKE: Final = partial(tuple.__new__, StoredBlock)  # what `_make` does, without a call in between
_LINE: Final = np.dtype(
    [
        ("magic", "<u8"), ("written", "<u8"), ("key", "V16"), ("parent", "V16"), ("seal", "V16"),
        ("length", "<u8"), ("flags", "<u4"), ("owner", "V16"),
        ("zeros", f"V{len(_PADDING)}"), ("crc", "<u4"),
    ]
)  # fmt: skip


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
    if magic != _MAGIC or length != block_bytes or written > COUNTER_MAX:
        return None
    return StoredBlock(
        slot=slot,
        key=SequenceHash(key),
        parent=SequenceHash(parent) if flags & _HAS_PARENT else None,
        checksum=checksum,
        written=written,
        owner=owner,
    )


def decode_entries(
    lines: bytes, first: int, block_bytes: int, floor: int = -1
) -> tuple[list[StoredBlock], int]:
    """Return what the whole `lines` of slots from `first` on say, and how many are torn.

    The same as `decode_entry` says of each, without blocks written up to `floor`, at a tenth of
    its cost: what is compared is compared for all lines at once.
    """
    table = np.frombuffer(lines, _LINE)
    count = len(table)
    words = np.frombuffer(lines, "<u8").reshape(count, ENTRY_BYTES // 8)
    used = np.flatnonzero(words.any(axis=1))
    found = [crc32(lines[at : at + ENTRY_BYTES - 4]) for at in (used * ENTRY_BYTES).tolist()]
    used_lines = table[used]
    whole = (
        (used_lines["crc"] == np.array(found, np.uint32))
        & (used_lines["magic"] == int.from_bytes(_MAGIC, "little"))
        & (used_lines["length"] == block_bytes)
        & (used_lines["written"] <= COUNTER_MAX)
    )
    torn = len(used) - int(np.count_nonzero(whole))
    kept = used[whole & (used_lines["written"].astype(np.int64) > floor)]
    chosen = table[kept]
    parents: Iterator[bytes | None] = (
        parent if has else None
        for parent, has in zip(
            _column(chosen["parent"]), (chosen["flags"] & _HAS_PARENT).tolist(), strict=True
        )
    )
    rows = zip(
        (kept + first).tolist(),
        _column(chosen["key"]),
        parents,
        _column(chosen["seal"]),
        chosen["written"].tolist(),
        _column(chosen["owner"]),
        strict=True,
    )
    return list(map(_MAKE, rows)), torn


def _column(values: NDArray[Any]) -> list[bytes]:
    """Return a column of 16 bytes each; numpy's own conversion is many times slower."""
    joined = values.tobytes()
    return [joined[at : at + 16] for at in range(0, len(joined), 16)]
