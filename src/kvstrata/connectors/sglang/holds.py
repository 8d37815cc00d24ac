"""What the daemon holds for SGLang between its question and its load."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from kvstrata.core.ids import LineageDigest

__all__ = ["Hold", "Holds"]

_HOLDS_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class Hold:
    """Pages that were found, and not loaded yet."""

    name: str
    """The name under which the daemon holds them."""
    epoch: int
    """The session's epoch in which it does."""
    pages: frozenset[LineageDigest]
    """Which pages."""


class Holds:
    """The latest holds; any thread may call.

    SGLang names no request in its calls, so a hold is found by its pages. One that is never loaded
    (too short to be worth it to SGLang, or its request is gone) makes room for later ones, and the
    daemon ends it by time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holds: OrderedDict[str, Hold] = OrderedDict()
        self._by_page: dict[LineageDigest, str] = {}

    def __len__(self) -> int:
        return len(self._holds)

    def add(self, hold: Hold) -> list[Hold]:
        """Remember a hold; return those that made room for it, to be released."""
        with self._lock:
            self._holds[hold.name] = hold
            self._by_page.update(dict.fromkeys(hold.pages, hold.name))
            return [
                self._drop(next(iter(self._holds))) for _ in range(len(self._holds) - _HOLDS_MAX)
            ]

    def take(self, page: LineageDigest) -> Hold | None:
        """Return the latest hold of a page and forget it; None if there is none.

        SGLang loads in the same batches in which it asks, so a hold is loaded at once or never.
        """
        with self._lock:
            name = self._by_page.get(page)
            return None if name is None else self._drop(name)

    def drop_all(self) -> None:
        """Forget all of them: what they held was cleared."""
        with self._lock:
            self._holds.clear()
            self._by_page.clear()

    def _drop(self, name: str) -> Hold:
        hold = self._holds.pop(name)
        for page in hold.pages:
            if self._by_page.get(page) == name:
                del self._by_page[page]
        return hold
