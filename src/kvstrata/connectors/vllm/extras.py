"""What a request's KV depends on besides its tokens, block by block."""

from __future__ import annotations

import struct

__all__ = ["request_extras"]


def request_extras(adapter_digest: str) -> dict[int, bytes]:
    """Return the extra of each block that has one, by the block's index.

    An adapter covers the whole request, so its first block says it and the chain carries it on.
    """
    return {0: _spell("lora", adapter_digest)} if adapter_digest else {}


def _spell(*fields: str | int) -> bytes:
    """Return the fields in bytes that no other list of fields spells."""
    plain = [str(field).encode() for field in fields]
    return b"".join(struct.pack("<I", len(field)) + field for field in plain)
