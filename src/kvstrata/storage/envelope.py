"""The header of a block that lies alone, in a file or an object, under a name made from its key.

    magic 8 | version 2 | header 2 | flags 4 | key 16 | parent 16 | layout fingerprint 16
    | namespace tag 8 | tenant tag 8 | raw length 8 | stored length 8 | seal 16
    | codec chain 64, zero-padded ASCII | zeros | crc32 4            = 256 bytes, then the payload

All integers little-endian; the CRC covers everything before it. Nothing in a header is believed
because it is there: who asked for a key compares key, layout, lengths and seal.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from enum import Enum
from typing import Final
from zlib import crc32

from kvstrata.core.errors import ConfigError
from kvstrata.core.ids import HASH_BYTES, SequenceHash
from kvstrata.storage.seal import SEAL_BYTES

__all__ = [
    "CHAIN_BYTES_MAX",
    "HEADER_BYTES",
    "NO_TAG",
    "PLAIN",
    "STORED_BYTES_MAX",
    "TAG_BYTES",
    "Envelope",
    "Refusal",
    "decode_envelope",
    "encode_envelope",
]

HEADER_BYTES: Final = 256
"""Length of every header of this version."""
TAG_BYTES: Final = 8
"""Length of a namespace or tenant tag."""
NO_TAG: Final = bytes(TAG_BYTES)
"""The tag of an unknown namespace or tenant."""
PLAIN: Final = "none"
"""The codec chain of a payload that is stored as it is."""
CHAIN_BYTES_MAX: Final = 64
"""Longest codec chain that a header has room for."""
STORED_BYTES_MAX: Final = 1 << 31
"""No block, however encoded, is longer: a length above it is damage."""

_BODY: Final = struct.Struct("<8sHHI16s16s16s8s8sQQ16s64s")
_PREFIX: Final = struct.Struct("<8sH")
_CRC: Final = struct.Struct("<I")
_MAGIC: Final = b"KVSBLOCK"
_VERSION: Final = 1
_HAS_PARENT: Final = 1
_PADDING: Final = bytes(HEADER_BYTES - _BODY.size - _CRC.size)
_FINGERPRINT_BYTES: Final = 16
_NO_PARENT: Final = bytes(HASH_BYTES)
_CODEC: Final = r"[a-z0-9][a-z0-9_.-]*(?:@[0-9a-f]+)?"
_CHAIN: Final = re.compile(rf"{_CODEC}(?:\+{_CODEC})*")


class Refusal(Enum):
    """Why bytes are not taken for the block that was asked for."""

    SHORT = "cut short"
    LONG = "longer than a block of its kind can be"
    UNFIT = "of a length that no such block has"
    FOREIGN = "not written by kvstrata"
    NEWER = "written by a newer version"
    DAMAGED = "header damaged"
    OTHER_KEY = "another block's key"
    OTHER_LAYOUT = "another layout"
    OTHER_TENANT = "another namespace or tenant"
    OTHER_CODEC = "a codec or key that this reader does not have"
    OTHER_BYTES = "payload differs from its seal"


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a header says. Raises ConfigError for a field that no header can hold."""

    key: SequenceHash
    """The block's sequence hash."""
    parent: SequenceHash | None
    """The key of the block before it, None at the root."""
    fingerprint: bytes
    """Fingerprint of its layout, 16 bytes."""
    raw_bytes: int
    """Length of the block itself; at least 1."""
    stored_bytes: int
    """Length of the payload behind the header."""
    seal: bytes
    """Seal of the block as a reader gets it, after decoding; 16 bytes."""
    codec: str = PLAIN
    """Codec chain of the payload, first step first, as `zstd+aes@0011223344556677`."""
    namespace: bytes = NO_TAG
    """Eight bytes that tell namespaces apart; zeros if unknown."""
    tenant: bytes = NO_TAG
    """Eight bytes that tell tenants apart; zeros if unknown."""

    def __post_init__(self) -> None:
        if wrong := _fault(self):
            raise ConfigError(f"envelope: {wrong}", hint="this is a bug of the caller; report it")


def encode_envelope(envelope: Envelope) -> bytes:
    """Return the header, `HEADER_BYTES` long."""
    body = _BODY.pack(
        _MAGIC,
        _VERSION,
        HEADER_BYTES,
        0 if envelope.parent is None else _HAS_PARENT,
        envelope.key,
        envelope.parent or _NO_PARENT,
        envelope.fingerprint,
        envelope.namespace,
        envelope.tenant,
        envelope.raw_bytes,
        envelope.stored_bytes,
        envelope.seal,
        envelope.codec.encode("ascii"),
    )
    body += _PADDING
    return body + _CRC.pack(crc32(body))


def decode_envelope(header: bytes | bytearray | memoryview) -> Envelope | Refusal:
    """Return what the header says, or why it is none of ours; never raises for any bytes."""
    header = bytes(header)
    if refusal := _refusal(header):
        return refusal
    (
        _,
        version,
        length,
        flags,
        key,
        parent,
        fingerprint,
        namespace,
        tenant,
        raw,
        stored,
        seal,
        text,
    ) = _BODY.unpack_from(header)
    known = version == _VERSION and length == HEADER_BYTES and flags in {0, _HAS_PARENT}
    unused = header[_BODY.size : -_CRC.size]
    if not known or unused != _PADDING or (not flags and parent != _NO_PARENT):
        return Refusal.DAMAGED
    try:
        return Envelope(
            key=SequenceHash(key),
            parent=SequenceHash(parent) if flags else None,
            fingerprint=fingerprint,
            raw_bytes=raw,
            stored_bytes=stored,
            seal=seal,
            codec=text.rstrip(b"\0").decode("ascii", "replace"),
            namespace=namespace,
            tenant=tenant,
        )
    except ConfigError:
        return Refusal.DAMAGED


def _refusal(header: bytes) -> Refusal | None:
    """Return why these are not the bytes of a whole header of this version, None if they are."""
    if not header.startswith(_MAGIC):
        return Refusal.SHORT if _MAGIC.startswith(header) else Refusal.FOREIGN
    if len(header) >= _PREFIX.size and _PREFIX.unpack_from(header)[1] > _VERSION:
        return Refusal.NEWER  # its length and its CRC may lie elsewhere
    if len(header) != HEADER_BYTES:
        return Refusal.SHORT if len(header) < HEADER_BYTES else Refusal.LONG
    if _CRC.unpack_from(header, HEADER_BYTES - _CRC.size)[0] != crc32(header[: -_CRC.size]):
        return Refusal.DAMAGED
    return None


def _fault(envelope: Envelope) -> str:
    """Return what is wrong with the fields, empty if nothing is."""
    lengths = {
        "key": (envelope.key, HASH_BYTES),
        "parent": (envelope.parent or _NO_PARENT, HASH_BYTES),
        "layout fingerprint": (envelope.fingerprint, _FINGERPRINT_BYTES),
        "seal": (envelope.seal, SEAL_BYTES),
        "namespace tag": (envelope.namespace, TAG_BYTES),
        "tenant tag": (envelope.tenant, TAG_BYTES),
    }
    for name, (value, length) in lengths.items():
        if len(value) != length:
            return f"{name} of {len(value)} bytes, not {length}"
    if len(envelope.codec) > CHAIN_BYTES_MAX or not _CHAIN.fullmatch(envelope.codec):
        return f"codec chain {envelope.codec[: CHAIN_BYTES_MAX + 1]!r} has no place in a header"
    if not 1 <= envelope.raw_bytes <= STORED_BYTES_MAX:
        return f"a block of {envelope.raw_bytes} bytes"
    if not 0 <= envelope.stored_bytes <= STORED_BYTES_MAX:
        return f"a payload of {envelope.stored_bytes} bytes"
    if envelope.codec == PLAIN and envelope.stored_bytes != envelope.raw_bytes:
        return f"{envelope.stored_bytes} plain bytes for a block of {envelope.raw_bytes}"
    return ""
