"""The marker of a keyed store: which format and layout the blocks beside it have.

A directory or a prefix of a bucket that holds anything of ours holds this text. It is checked
before the first block is touched, so that what somebody else put there is refused, not guessed.
"""

from __future__ import annotations

import re
from typing import Final
from zlib import crc32

from kvstrata.core.errors import LayoutError
from kvstrata.layout import BlockLayout

__all__ = [
    "MARKER_BYTES_MAX",
    "MARKER_NAME",
    "check_marker",
    "decode_marker",
    "encode_marker",
    "is_marker_begun",
]

MARKER_NAME: Final = "KVSTRATA"
"""Name of the marker in its directory or prefix; no key is spelled like it."""
MARKER_BYTES_MAX: Final = 4096
"""No marker is longer."""

_FIRST: Final = "kvstrata keyed store"
_VERSION: Final = 1
_LINES: Final = 4  # above the checksum's
_FINGERPRINT: Final = re.compile("layout ([0-9a-f]{32})")
_KEEP: Final = "kvstrata never changes it: use another place, or move what is there away"


def encode_marker(layout: BlockLayout) -> bytes:
    """Return the marker of blocks of `layout`."""
    body = f"{_FIRST}\nversion {_VERSION}\nlayout {layout.fingerprint.hex()}\n{layout.describe()}\n"
    return body.encode() + b"crc32 %08x\n" % crc32(body.encode())


def check_marker(found: bytes, layout: BlockLayout, where: str) -> None:
    """Raise LayoutError unless `found` is the marker that `encode_marker` makes."""
    if found == encode_marker(layout):
        return
    _check_format(found, where)
    raise LayoutError(
        f"{where}: its {MARKER_NAME} is damaged or of another layout than {layout.describe()!r}",
        hint=_KEEP,
    )


def decode_marker(found: bytes, where: str) -> tuple[bytes, str]:
    """Return fingerprint and description of the layout that a marker names.

    Raises LayoutError unless it is a whole marker of this version.
    """
    _check_format(found, where)
    body, _, crc = found.rpartition(b"crc32 ")
    lines = body.decode("utf-8", "replace").splitlines()
    named = _FINGERPRINT.fullmatch(lines[2]) if len(lines) == _LINES else None
    if crc != b"%08x\n" % crc32(body) or named is None:
        raise LayoutError(f"{where}: its {MARKER_NAME} is damaged", hint=_KEEP)
    return bytes.fromhex(named[1]), lines[3]


def is_marker_begun(found: bytes) -> bool:
    """Return whether `found` is the front of a marker, or nothing yet."""
    first = _FIRST.encode()
    return found.startswith(first) or first.startswith(found)


def _check_format(found: bytes, where: str) -> None:
    lines = found.decode("utf-8", "replace").splitlines()
    if not lines or lines[0] != _FIRST:
        raise LayoutError(f"{where}: its {MARKER_NAME} is not kvstrata's", hint=_KEEP)
    version = lines[1] if len(lines) > 1 else ""
    if version != f"version {_VERSION}":
        raise LayoutError(
            f"{where}: it was written by another format ({version!r}), this is version {_VERSION}",
            hint=_KEEP,
        )
