"""The lineage digest: a SHA-256 chain over a sequence's full blocks.

    digest_0 = SHA256(tokens_0)        digest_i = SHA256(digest_(i-1) || tokens_i)

with tokens as little-endian uint32, which is the scheme of SGLang's page keys
(`get_hash_str` in its hicache storage), so that a storage seam that is handed only keys speaks
the same language. What tokens do not say (an adapter, an image) is an *extra* of the blocks that
it covers and is mixed in as

    digest_i = SHA256(EXTRA_MARK || plain digest_i || extra)

The mark spells token ids above `TOKEN_ID_MAX`, so no plain block has the same input.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from kvstrata.core.ids import LineageDigest

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TOKEN_ID_MAX", "PromptLineage", "TokenIds", "lineage_digests"]

TokenIds: TypeAlias = "Sequence[int] | NDArray[np.integer]"

TOKEN_ID_MAX: Final = 2**31 - 1
"""Largest token id accepted; ids above it are reserved for marks."""

_EXTRA_MARK: Final = b"\xff" * 16


def lineage_digests(
    tokens: TokenIds,
    block_tokens: int,
    *,
    parent: LineageDigest | None = None,
    extras: Mapping[int, bytes] | None = None,
) -> list[LineageDigest]:
    """Return one digest for each full block of `tokens`; a rest shorter than a block has none.

    `parent` is the digest of the block before `tokens[0]`. `extras` maps a block's index within
    `tokens` to the bytes that it depends on besides its tokens.
    Raises ValueError for a token id outside 0 to `TOKEN_ID_MAX` or a block size below 1.
    """
    if block_tokens < 1:
        raise ValueError(f"block_tokens must be at least 1, not {block_tokens}")
    blocks = len(tokens) // block_tokens
    data = _token_bytes(tokens, blocks * block_tokens)
    step = 4 * block_tokens
    last = parent or b""
    digests = []
    for index in range(blocks):
        last = sha256(last + data[index * step : (index + 1) * step]).digest()
        if extras and index in extras:
            last = sha256(_EXTRA_MARK + last + extras[index]).digest()
        digests.append(LineageDigest(last))
    return digests


def _token_bytes(tokens: TokenIds, count: int) -> bytes:
    """Return the first `count` ids as little-endian uint32."""
    if count == 0:
        return b""
    ids = _as_array(tokens[:count])
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise ValueError(f"tokens must be one row of integers, not {ids.dtype} {ids.shape}")
    if int(ids.min()) < 0 or int(ids.max()) > TOKEN_ID_MAX:
        raise ValueError(f"token ids must lie in 0 to {TOKEN_ID_MAX}")
    return ids.astype("<u4", copy=False).tobytes()


def _as_array(tokens: TokenIds) -> NDArray[np.integer]:
    if isinstance(tokens, np.ndarray):
        return tokens
    if isinstance(tokens, bytes | bytearray):  # array would take them as machine words
        tokens = list(tokens)
    try:  # four times as fast as numpy's own conversion of a list, and the engine has lists
        return np.frombuffer(array("I", tokens), np.uintc)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"token ids must be integers in 0 to {TOKEN_ID_MAX}: {error}") from error


class PromptLineage:
    """The digests of one growing sequence; each call hashes only the blocks that are new.

    `extras` maps a block's index in the sequence to what it depends on besides its tokens.
    """

    def __init__(self, block_tokens: int, extras: Mapping[int, bytes] | None = None) -> None:
        self.block_tokens = block_tokens
        self.extras = dict(extras or {})
        self.digests: list[LineageDigest] = []

    def extend_to(self, tokens: TokenIds) -> list[LineageDigest]:
        """Return the digests of the full blocks that `tokens` has beyond those already known.

        The caller guarantees that `tokens` starts with the tokens of every earlier call.
        """
        known = len(self.digests)
        if len(tokens) // self.block_tokens <= known:
            return []
        new = lineage_digests(
            tokens[known * self.block_tokens :],
            self.block_tokens,
            parent=self.digests[-1] if known else None,
            extras={block - known: extra for block, extra in self.extras.items()},
        )
        self.digests += new
        return new
