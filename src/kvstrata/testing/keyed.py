"""Keyed stores for tests: one in memory, and wrappers that fail, spoil and delay on order."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvstrata.core.errors import ChecksumError, TransferError
from kvstrata.core.ids import SequenceHash
from kvstrata.storage.envelope import HEADER_BYTES
from kvstrata.storage.keyed import (
    KeyedCounts,
    KeyedEntry,
    KeyedStatistics,
    KeyedStore,
    PutAnswer,
    check_open,
    name_of_key,
)

__all__ = ["DelayedKeyedStore", "FaultyKeyedStore", "KeyedFaults", "MemoryKeyedStore"]


class MemoryKeyedStore:
    """A dict of blocks, bounded; what the other stores are compared with."""

    exclusive = True

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.blocks: dict[SequenceHash, bytes] = {}
        self._lock = threading.Lock()
        self._counts = KeyedCounts()
        self._closed = False

    def put(self, key: SequenceHash, header: bytes | memoryview, payload: memoryview) -> PutAnswer:
        """Keep a copy."""
        check_open(self._closed, "this store")
        name_of_key(key)
        if len(header) != HEADER_BYTES:
            raise TransferError(f"a header has {HEADER_BYTES} bytes", retryable=False)
        block = b"".join([header, payload])
        with self._lock:
            if key in self.blocks:
                self._counts.add(existed=1)
                return PutAnswer.EXISTED
            used = sum(map(len, self.blocks.values())) + len(block)
            if self.capacity_bytes is not None and used > self.capacity_bytes:
                self._counts.add(full=1)
                return PutAnswer.FULL
            self.blocks[key] = block
            self._counts.set_used(used)
        self._counts.add(created=1)
        return PutAnswer.CREATED

    def get(self, key: SequenceHash, header: memoryview, payload: memoryview) -> int | None:
        """Copy the block out."""
        check_open(self._closed, "this store")
        block = self.blocks.get(key)
        if block is None:
            self._counts.add(misses=1)
            return None
        self._counts.add(hits=1)
        length = len(block) - len(header)
        if not 0 <= length <= len(payload):
            raise ChecksumError(f"{key.hex()}: {len(block)} bytes are not a block of its kind")
        header[:] = block[: len(header)]
        payload[:length] = block[len(header) :]
        return length

    def peek(self, key: SequenceHash) -> bytes | None:
        """Copy the header out."""
        check_open(self._closed, "this store")
        block = self.blocks.get(key)
        if block is None:
            self._counts.add(misses=1)
        return None if block is None else block[:HEADER_BYTES]

    def exists(self, keys: Sequence[SequenceHash]) -> list[bool]:
        """Look each up."""
        check_open(self._closed, "this store")
        return [key in self.blocks for key in keys]

    def delete(self, keys: Sequence[SequenceHash]) -> None:
        """Drop each."""
        check_open(self._closed, "this store")
        with self._lock:
            for key in keys:
                self.blocks.pop(key, None)
        self._counts.add(deleted=len(keys))

    def entries(self) -> Iterator[KeyedEntry]:
        """Return what was there at the call."""
        check_open(self._closed, "this store")
        with self._lock:
            found = [KeyedEntry(key, len(block), 0.0) for key, block in self.blocks.items()]
        return iter(found)

    def statistics(self) -> KeyedStatistics:
        """Return the counters."""
        return self._counts.snapshot()

    def close(self) -> None:
        """Refuse everything from now on."""
        self._closed = True


@dataclass(frozen=True, slots=True)
class KeyedFaults:
    """How often each thing goes wrong, as a probability; the default is never."""

    fail: float = 0.0
    """A call raises a retryable TransferError and does nothing."""
    lose: float = 0.0
    """A put happens and its answer is lost: a retryable TransferError all the same."""
    flip: float = 0.0
    """One bit of what a get returns is flipped, header or payload, and nobody is told."""
    cut: float = 0.0
    """A get returns half of the payload as if that were all."""
    vanish: float = 0.0
    """A get misses what is there, as on a file system that shows things late."""


class FaultyKeyedStore:
    """Wraps a store; without faults it is that store and passes the same suite."""

    def __init__(self, inner: KeyedStore, faults: KeyedFaults, luck: random.Random) -> None:
        """Spoil what `inner` does, as `luck` has it; `faults` may be replaced at any time."""
        self.inner, self.faults = inner, faults
        self._luck = luck
        self._lock = threading.Lock()

    @property
    def exclusive(self) -> bool:
        """As the wrapped store says."""
        return self.inner.exclusive

    @property
    def capacity_bytes(self) -> int | None:
        """As the wrapped store says."""
        return self.inner.capacity_bytes

    def put(self, key: SequenceHash, header: bytes | memoryview, payload: memoryview) -> PutAnswer:
        """Put, or fail before or after it."""
        self._fail()
        answer = self.inner.put(key, header, payload)
        if self._happens(self.faults.lose):
            raise TransferError("the answer was lost, as ordered", retryable=True)
        return answer

    def get(self, key: SequenceHash, header: memoryview, payload: memoryview) -> int | None:
        """Get, and spoil what came."""
        self._fail()
        length = self.inner.get(key, header, payload)
        if length is None or self._happens(self.faults.vanish):
            return None
        if self._happens(self.faults.flip):
            with self._lock:
                bit = self._luck.randrange(8 * (len(header) + length))
            spoilt, at = (header, bit // 8) if bit < 8 * len(header) else (payload, 0)
            at = at if spoilt is header else bit // 8 - len(header)
            spoilt[at] ^= 1 << bit % 8
        return length // 2 if self._happens(self.faults.cut) else length

    def peek(self, key: SequenceHash) -> bytes | None:
        """Peek, and spoil what came."""
        self._fail()
        header = self.inner.peek(key)
        if header is None or self._happens(self.faults.vanish):
            return None
        return header[: len(header) // 2] if self._happens(self.faults.cut) else header

    def exists(self, keys: Sequence[SequenceHash]) -> list[bool]:
        """Ask the wrapped store."""
        self._fail()
        return self.inner.exists(keys)

    def delete(self, keys: Sequence[SequenceHash]) -> None:
        """Hand the wish on."""
        self._fail()
        self.inner.delete(keys)

    def entries(self) -> Iterator[KeyedEntry]:
        """List the wrapped store."""
        self._fail()
        return self.inner.entries()

    def statistics(self) -> KeyedStatistics:
        """Return the wrapped store's counters."""
        return self.inner.statistics()

    def close(self) -> None:
        """Close the wrapped store."""
        self.inner.close()

    def _happens(self, odds: float) -> bool:
        with self._lock:
            return self._luck.random() < odds

    def _fail(self) -> None:
        if self._happens(self.faults.fail):
            raise TransferError("a fault was ordered", retryable=True)


class DelayedKeyedStore(FaultyKeyedStore):
    """Wraps a store; every put and get takes up to `delay_s_max` longer."""

    def __init__(self, inner: KeyedStore, delay_s_max: float, luck: random.Random) -> None:
        super().__init__(inner, KeyedFaults(), luck)
        self._delay_s_max = delay_s_max

    def put(self, key: SequenceHash, header: bytes | memoryview, payload: memoryview) -> PutAnswer:
        """Put after a while."""
        self._wait()
        return super().put(key, header, payload)

    def get(self, key: SequenceHash, header: memoryview, payload: memoryview) -> int | None:
        """Get, and answer after a while."""
        length = super().get(key, header, payload)
        self._wait()
        return length

    def _wait(self) -> None:
        with self._lock:
            delay_s = self._luck.uniform(0, self._delay_s_max)
        time.sleep(delay_s)
