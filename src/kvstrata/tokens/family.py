"""The family of a prompt: what its first block has in common over all namespaces and salts.

Sequence hashes of one prompt in two namespaces have nothing in common, on purpose. So that a miss
can be explained ("stored under another model revision"), a client that stores a prompt's first
block also sends, under a key that the daemon gives it,

    prompt tag = BLAKE3(key = family key, lineage digest of the block)    8 bytes
    salt tag   = BLAKE3(key = family key, salt, and tenant if it has one) 8 bytes

Neither finds a block. The family key comes from the cluster secret; without it nobody can tell
which prompt or salt a tag stands for.
"""

from __future__ import annotations

from typing import Final, NamedTuple, NewType

from blake3 import blake3

from kvstrata.core.ids import LineageDigest
from kvstrata.core.tenants import TAG_BYTES

__all__ = ["FAMILY_BYTES", "Family", "FamilyKey", "family_key", "family_of"]

FamilyKey = NewType("FamilyKey", bytes)
"""32 bytes under which tags of prompts and salts are made."""

FAMILY_BYTES: Final = 2 * TAG_BYTES
"""Length of a family on the wire."""


class Family(NamedTuple):
    """The tags of a prompt's first block."""

    prompt: bytes
    """`TAG_BYTES`: equal for equal tokens."""
    salt: bytes
    """`TAG_BYTES`: equal for equal salts of one tenant."""


def family_key(secret: bytes) -> FamilyKey:
    """Return the key of a cluster with this secret of 32 bytes."""
    return FamilyKey(blake3(b"kvstrata families", key=secret).digest())


def family_of(key: FamilyKey, digest: LineageDigest, salt: str, tenant: str = "") -> Family:
    """Return the family of a prompt whose first block has this digest, under this salt."""
    named = b"tenant" + len(salt).to_bytes(4, "little") if tenant else b"salt"
    return Family(
        blake3(b"prompt" + digest, key=key).digest(TAG_BYTES),
        blake3(named + salt.encode() + tenant.encode(), key=key).digest(TAG_BYTES),
    )
