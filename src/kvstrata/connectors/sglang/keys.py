"""SGLang's page keys: hex SHA-256 chain digests, which are our lineage digests (ADR 0001)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from kvstrata.core.ids import LineageDigest

__all__ = ["page_digests"]

_DIGEST: Final = re.compile("[0-9a-f]{64}")


def page_digests(keys: Sequence[str]) -> list[LineageDigest]:
    """Return the digest behind each of a chain's keys, up to the first that cannot be one.

    A key that is no digest, or comes twice, ends the list: it is a page that we cannot name.
    """
    digests: dict[LineageDigest, None] = {}
    for key in keys:
        if not _DIGEST.fullmatch(str(key)):
            break
        digest = LineageDigest(bytes.fromhex(key))
        if digest in digests:
            break
        digests[digest] = None
    return list(digests)
