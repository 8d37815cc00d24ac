"""What the daemon holds for SGLang between its question and its load."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvstrata.core.ids import LineageDigest

__all__ = ["Hold", "Holds"]

_HOLDS_MAX: Final = 64


@dataclass(slots=True)
class Hold:
    """Pages that were found, and not loaded yet."""

    name: str
    """The name under which the daemon holds them."""
    epoch: int
    """The session's epoch in which it does."""
    pages: set[LineageDigest]
    """Those that are still to be loaded."""


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

    def take(self, pages: Sequence[LineageDigest], epoch: int) -> list[Hold]:
        """Note that pages were loaded; return the holds that have none left, to be released.

        Holds of other epochs are void and only forgotten.
        """
        with self._lock:
            done = []
            for page in pages:
                name = self._by_page.get(page)
                if name is None:
                    continue
                hold = self._holds[name]
                hold.pages.discard(page)
                del self._by_page[page]
                if not hold.pages:
                    done.append(self._drop(name))
            return [hold for hold in done if hold.epoch == epoch]

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
