"""A hold on registered blocks by code of this process: no expiry, released by its holder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from kvstrata.core.ids import SlotId

__all__ = ["Pin"]


class Pin:
    """Keeps `slots` from eviction until released; releasing twice is harmless."""

    __slots__ = ("_release", "slots")

    def __init__(
        self, slots: Sequence[SlotId], release: Callable[[Sequence[SlotId]], None]
    ) -> None:
        self.slots = slots
        self._release: Callable[[Sequence[SlotId]], None] | None = release

    def release(self) -> None:
        """Give the slots back to the pool's idle order."""
        release, self._release = self._release, None
        if release:
            release(self.slots)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
