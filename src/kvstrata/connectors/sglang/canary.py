"""The canary: before any page of a prompt, a made-up one goes to the daemon and comes back."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from kvstrata.connectors.sglang.hostpages import Bytes, PageSpace
from kvstrata.connectors.sglang.kept import KeptPages
from kvstrata.core.errors import LayoutError
from kvstrata.core.ids import LineageDigest

__all__ = ["FlatReader", "fly_canary"]

log = logging.getLogger("kvstrata.sglang")


FlatReader: TypeAlias = Callable[[int], Bytes]
"""Reads a page as the engine itself does, flat: what we compare with."""


def fly_canary(
    kept: KeptPages, pages: PageSpace, page: int, block_bytes: int, engine: FlatReader
) -> bool:
    """Store made-up bytes from a scratch page, load them back, and compare bit for bit.

    `page` is ours to overwrite. Returns False if the daemon had no room for it or was not heard;
    raises LayoutError if what came back, or what the engine reads, is not what was written.
    """
    sent = np.frombuffer(secrets.token_bytes(block_bytes), np.uint8)
    digest = LineageDigest(secrets.token_bytes(32))
    pages.write(page, sent.copy())
    _compare(engine(page), sent, "SGLang reads other bytes from the page than we wrote to it")
    try:
        if not all(kept.save([digest], None, pages, [page])) or not kept.find([digest]):
            log.warning("kvstrata's canary was not stored: no room, or no answer in time")
            return False
        pages.write(page, np.zeros_like(sent))
        if not kept.load([digest], pages, [page]):
            log.warning("kvstrata's canary did not come back in time")
            return False
        _compare(engine(page), sent, "a page that was stored and loaded came back with other bytes")
    finally:
        kept.forget(digest)
    return True


def _compare(found: Any, sent: Bytes, what: str) -> None:
    if not np.array_equal(found, sent):
        raise LayoutError(
            f"canary: {what}",
            hint="this SGLang's host pool is not as kvstrata knows it; run without this backend",
        )
