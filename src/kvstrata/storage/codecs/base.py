"""The seam for codecs. Laws: docs/contracts/codec.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from kvstrata.core.ids import SequenceHash

__all__ = ["BlockFacts", "BytesLike", "Codec", "CodecSettings"]

BytesLike: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class CodecSettings:
    """What a codec is made with."""

    dtype: str
    """Element type of the blocks, a key of `layout.DTYPE_BYTES`."""
    secret: bytes | None = field(default=None, repr=False)
    """32 bytes from which encryption keys are derived; None where nothing is encrypted."""


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """Which block is being encoded or decoded; what a header says about it too."""

    key: SequenceHash
    """Its sequence hash."""
    fingerprint: bytes
    """Fingerprint of its layout."""
    namespace: bytes
    """Eight bytes; zeros if unknown."""
    tenant: bytes
    """Eight bytes; zeros if unknown."""
    raw_bytes: int
    """Length of the block itself."""


class Codec(Protocol):
    """One step between a block and its stored bytes; pure but for the nonce it may draw.

    Called from many threads at once. `decode(encode(x))` is x, or, if the codec is lossy, always
    the same approximation of x. Whatever bytes decode is given, it fills at most `into` or raises
    ChecksumError.
    """

    name: str
    """Lower-case letters, digits, dots, underscores, hyphens; unique."""
    lossy: bool
    """Whether what comes back may differ from what was given."""
    authentic: bool
    """Whether bytes that nobody with the key wrote are refused."""

    def label(self, facts: BlockFacts) -> str:
        """Return what a header records: the name, or the name, an @, and a key id in hex."""

    def reads(self, label: str, facts: BlockFacts) -> bool:
        """Return whether `decode` can read what was recorded as `label`."""

    def stored_bytes_max(self, raw_bytes: int) -> int:
        """Return how long the encoding of `raw_bytes` bytes can be at most."""

    def encode(self, raw: memoryview, item_bytes: int, facts: BlockFacts) -> BytesLike:
        """Return the encoding; `item_bytes` is the size of the elements that `raw` is made of.

        Raises TransferError, not retryable, for values that it cannot hold.
        """

    def decode(self, stored: memoryview, into: memoryview, facts: BlockFacts) -> int:
        """Fill the front of `into` and return how long it is; raises ChecksumError."""
