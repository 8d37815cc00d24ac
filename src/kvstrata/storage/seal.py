"""The seal of a block: one checksum that binds bytes, key and layout together.

    seal = XXH3-128(key (16 bytes) || layout fingerprint (16 bytes) || payload)

A block that is whole but belongs to another prefix, model or layout fails just as a damaged one.
XXH3 runs at the speed of memory (docs/adr/0002); it guards against accidents, not against an
attacker who can write to our files.
"""

from __future__ import annotations

from typing import Final

from xxhash import xxh3_128

__all__ = ["SEAL_BYTES", "seal"]

SEAL_BYTES: Final = 16
"""Length of a seal."""


def seal(binding: bytes, payload: memoryview | bytes) -> bytes:
    """Return the seal of `payload` under `binding`, which is key and layout fingerprint."""
    state = xxh3_128(binding)
    state.update(payload)
    return state.digest()
