"""Identity types. Each is a plain value at run time, so hot paths pay nothing for them."""

from __future__ import annotations

from typing import NamedTuple, NewType

__all__ = [
    "HASH_BYTES",
    "Holder",
    "LineageDigest",
    "SequenceHash",
    "SessionId",
    "SlotId",
    "TransferId",
]

HASH_BYTES = 16
"""Length of a sequence hash. 128 bits: a collision among 2**40 blocks has odds below 2**-48."""

LineageDigest = NewType("LineageDigest", bytes)
"""SHA-256 over a block's tokens and its parent's digest (32 bytes); names a prefix to anyone."""

SequenceHash = NewType("SequenceHash", bytes)
"""The cache key (`HASH_BYTES` bytes): a lineage digest under a namespace key."""

SlotId = NewType("SlotId", int)
"""Index of a place in one tier that can hold one block."""

TransferId = NewType("TransferId", int)
"""Names one job from its submission to its single completion."""

SessionId = NewType("SessionId", int)
"""One client process's conversation with a daemon."""


class Holder(NamedTuple):
    """Who holds pins or reserved slots: one request of one session."""

    session: SessionId
    """The client process's session; when it ends, all its holds end."""
    request: str
    """The client's own name of the request; unique within the session."""
