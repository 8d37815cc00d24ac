"""A store that keeps nothing: every put is refused as full, every get is a miss.

`store:null:null:1GiB` shows what a tier below the host costs before its first byte is moved; it is
found as plug-ins are, so it is also the shortest store that there can be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvstrata.core.errors import ConfigError
from kvstrata.core.ids import SequenceHash
from kvstrata.storage.keyed import (
    KeyedCounts,
    KeyedEntry,
    KeyedStatistics,
    PutAnswer,
    check_open,
    name_of_key,
)
from kvstrata.storage.plugged import StoreRequest

__all__ = ["NullStore"]


class NullStore:
    """Keeps nothing; all callers are told so."""

    exclusive = True
    """Nobody is ever told CREATED, so no two are."""
    capacity_bytes = None
    """There is nothing to bound."""

    def __init__(self, request: StoreRequest) -> None:
        """Take any request whose URL is `null`."""
        self.check(request.url)
        self._counts = KeyedCounts()
        self._closed = False

    @staticmethod
    def check(url: str) -> None:
        """Raise ConfigError for a URL that means something: it would be expected to keep it."""
        if url != "null":
            raise ConfigError(
                f"tiers.store: the null store keeps nothing, so {url!r} is no place of its",
                hint="write store:null:null:SIZE, or name another store",
            )

    def put(self, key: SequenceHash, header: bytes | memoryview, payload: memoryview) -> PutAnswer:
        """Refuse the block as one too many."""
        del header, payload
        check_open(self._closed, "null store")
        name_of_key(key)
        self._counts.add(full=1)
        return PutAnswer.FULL

    def get(self, key: SequenceHash, header: memoryview, payload: memoryview) -> int | None:
        """Miss."""
        del header, payload
        check_open(self._closed, "null store")
        name_of_key(key)
        self._counts.add(misses=1)
        return None

    def peek(self, key: SequenceHash) -> bytes | None:
        """Miss."""
        check_open(self._closed, "null store")
        name_of_key(key)
        self._counts.add(misses=1)
        return None

    def exists(self, keys: Sequence[SequenceHash]) -> list[bool]:
        """Say no to each."""
        check_open(self._closed, "null store")
        return [not name_of_key(key) for key in keys]

    def delete(self, keys: Sequence[SequenceHash]) -> None:
        """Do nothing: they are misses."""
        check_open(self._closed, "null store")
        self._counts.add(deleted=len(keys))

    def entries(self) -> Iterator[KeyedEntry]:
        """List nothing."""
        check_open(self._closed, "null store")
        return iter(())

    def statistics(self) -> KeyedStatistics:
        """Return the counters."""
        return self._counts.snapshot()

    def close(self) -> None:
        """Refuse everything from now on."""
        self._closed = True
