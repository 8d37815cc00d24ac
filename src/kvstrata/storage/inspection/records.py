"""What an inspection finds: blocks, and what became of each when it was read again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeVar

from kvstrata.core.ids import SequenceHash
from kvstrata.core.tenants import NO_TAG

__all__ = ["Checked", "FoundBlock", "Inspected", "Verdict", "side_by_side"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Verdict(Enum):
    """What is to be thought of one block."""

    GOOD = "good"
    """All of it was read, and is what its header or line says."""
    BAD = "bad"
    """A daemon that asks for it will find a miss: damaged, cut, torn, or another block's bytes."""
    STALE = "stale"
    """A slab's line that no daemon believes: its block was cleared, or stored again elsewhere."""
    UNREADABLE = "cannot be read"
    """The device or file system failed, or does not let this user; nothing is known of it."""
    UNCHECKABLE = "not checkable"
    """Its header is right; the payload needs a key, a codec or a version that is not here."""
    GONE = "gone"
    """It was listed and deleted before it was read."""


@dataclass(frozen=True, slots=True)
class FoundBlock:
    """One block, or what is in its place."""

    key: SequenceHash | None
    """Its key; None where a torn line does not tell."""
    place: str
    """Where it is in its store: a slot's number, or a name."""
    fingerprint: bytes
    """Fingerprint of its layout."""
    block_bytes: int
    """Length of the block itself; 0 if its header does not tell."""
    stored_bytes: int
    """What it takes in the store."""
    codec: str
    """Codec chain of its payload; empty if its header does not tell."""
    namespace: bytes = NO_TAG
    """Tag of its namespace; zeros if unknown."""
    tenant: bytes = NO_TAG
    """Tag of who is charged for it; zeros if nobody in particular."""
    written: int | None = None
    """Write counter of its slab; None where there is none."""
    used_s: float | None = None
    """When it was last written or used, by the store's clock; None for a slab."""
    fault: str = ""
    """Why its header or line is not to be believed; empty if it is."""


@dataclass(frozen=True, slots=True)
class Checked:
    """One block that was read again."""

    block: FoundBlock
    """Which one."""
    verdict: Verdict
    """What it is."""
    reason: str = ""
    """Why it is not good."""


class Inspected(Protocol):
    """One store that has been opened for looking: a slab, a stripe, or one layout's blocks."""

    name: str
    """Its place, for people; nothing secret."""
    kind: str
    """`slab`, `directory` or `object`."""
    fingerprint: bytes
    """Fingerprint of the layout of its blocks."""
    description: str
    """That layout in words."""
    total: int | None
    """How many blocks `verify`, once begun, has to look at; None if only a listing would tell."""

    def blocks(self) -> Iterator[FoundBlock]:
        """Stream what is there; payloads are not read."""

    def verify(self) -> Iterator[Checked]:
        """Read every block again; a slab must have been opened alone."""

    def quarantine(self, checked: Checked) -> None:
        """Do to a bad block what a daemon does that meets it: blank its line, or delete it."""

    def notes(self) -> list[str]:
        """Return what else there is to say after a stream has ended."""

    def close(self) -> None:
        """Give back what is open."""


def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """Yield `work(item)` in the order of `items`, several at a time and never far ahead."""
    with ThreadPoolExecutor(threads, thread_name_prefix="kvstrata-inspect") as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()
