"""The seam for stores that keep whole blocks under names made from their keys.

A directory or a bucket has no slots: a block is one file or one object, header (`envelope.py`)
in front of payload. Laws: docs/contracts/keyed-store.md.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Final, Protocol

from kvstrata.core.errors import TransferError
from kvstrata.core.ids import HASH_BYTES, SequenceHash

__all__ = [
    "KeyedCounts",
    "KeyedEntry",
    "KeyedStatistics",
    "KeyedStore",
    "PutAnswer",
    "check_open",
    "key_of_name",
    "name_of_key",
]


class PutAnswer(Enum):
    """What became of a block that was put."""

    CREATED = "created"
    EXISTED = "existed"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class KeyedEntry:
    """One block that a store lists."""

    key: SequenceHash
    """What its name says; its header may say otherwise."""
    stored_bytes: int
    """Bytes that it takes in the store, its header included."""
    used_s: float
    """When it was last written or known to be used, by the store's clock; a hint, no order."""


@dataclass(frozen=True, slots=True)
class KeyedStatistics:
    """Counters of one store since it was opened; they only rise, `used_bytes` apart."""

    created: int = 0
    """Puts that made a block."""
    existed: int = 0
    """Puts that found one."""
    full: int = 0
    """Puts refused for want of room."""
    hits: int = 0
    """Gets that found a block, whatever it turned out to hold."""
    misses: int = 0
    """Gets that found none."""
    deleted: int = 0
    """Names that were asked to go, whether they were there or not."""
    errors: int = 0
    """Calls that raised a TransferError."""
    invalid: int = 0
    """Answers of a plug-in that could not be ones, as of a wrong type or length; errors too."""
    late: int = 0
    """Calls of a plug-in that were given up at their deadline, or not begun; errors too."""
    retries: int = 0
    """Requests that were sent again."""
    resolved: int = 0
    """Puts whose answer was lost, and which a look at the store cleared up."""
    vanished: int = 0
    """Calls that found the store's own directory gone."""
    collected: int = 0
    """Blocks that our collector removed."""
    collected_bytes: int = 0
    """Bytes that they took."""
    foreign: int = 0
    """Names met while listing that are not ours; never touched."""
    used_bytes: int = 0
    """What the store is known to hold: the last count and what we wrote since."""


class KeyedStore(Protocol):
    """Keeps blocks under their keys; every call may block and may come from any thread.

    A block is there whole or not at all, also for other machines. A miss and a full store are
    answers; what fails raises TransferError, `retryable` if the same call may succeed later.
    """

    @property
    def exclusive(self) -> bool:
        """Whether of several writers of one new key exactly one is told CREATED."""

    @property
    def capacity_bytes(self) -> int | None:
        """Upper bound of the bytes that it keeps; None if someone else bounds it."""

    def put(self, key: SequenceHash, header: bytes | memoryview, payload: memoryview) -> PutAnswer:
        """Make the block; one that is there already stays as it is."""

    def get(self, key: SequenceHash, header: memoryview, payload: memoryview) -> int | None:
        """Fill `header`, then the front of `payload`; return the payload's length, None on a miss.

        Raises ChecksumError if what is stored is shorter than a header or longer than both views.
        What the views hold after an error or a miss is nobody's block.
        """

    def peek(self, key: SequenceHash) -> bytes | None:
        """Return the header alone, or what there is of it; None on a miss."""

    def exists(self, keys: Sequence[SequenceHash]) -> list[bool]:
        """Return for each key whether it was there; it may be gone by now."""

    def delete(self, keys: Sequence[SequenceHash]) -> None:
        """Make these keys misses; what is not there is no error."""

    def entries(self) -> Iterator[KeyedEntry]:
        """Stream what is there, in any order; for start-up, verify and collecting only."""

    def statistics(self) -> KeyedStatistics:
        """Return the counters."""

    def close(self) -> None:
        """Let running calls end and refuse later ones; twice is harmless."""


class KeyedCounts:
    """Counters that several threads raise; one lock guards them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = asdict(KeyedStatistics())

    def add(self, **more: int) -> None:
        """Raise the named counters."""
        with self._lock:
            for name, value in more.items():
                self._counts[name] += value

    def set_used(self, used_bytes: int, since: int | None = None) -> None:
        """Replace `used_bytes` by a fresh count; `since` is what it was when the count began.

        What was added meanwhile may or may not be in the count: it is added once more.
        """
        with self._lock:
            more = 0 if since is None else max(self._counts["used_bytes"] - since, 0)
            self._counts["used_bytes"] = used_bytes + more

    def snapshot(self) -> KeyedStatistics:
        """Return all of them as they are together."""
        with self._lock:
            return replace(KeyedStatistics(), **self._counts)


_NAME_LENGTH: Final = 2 * HASH_BYTES


def name_of_key(key: SequenceHash) -> str:
    """Return the key as the 32 characters that name it in files and objects."""
    if len(key) != HASH_BYTES:
        raise TransferError(f"a key has {HASH_BYTES} bytes, not {len(key)}", retryable=False)
    return key.hex()


def key_of_name(name: str) -> SequenceHash | None:
    """Return the key that has this name, None if no key has."""
    if len(name) != _NAME_LENGTH or name.strip("0123456789abcdef"):
        return None
    return SequenceHash(bytes.fromhex(name))


def check_open(closed: bool, what: str) -> None:  # noqa: FBT001  a state, not a switch
    """Raise TransferError if a store has been closed."""
    if closed:
        raise TransferError(f"{what} is closed", retryable=False)
