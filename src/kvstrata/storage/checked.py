"""Stands between a store that another package brings and all of ours; believes nothing it says.

- It never sees our memory: what it reads and writes is a buffer of the thread that calls it, so
  what it still does after its answer, or after it was given up, changes no block of ours.
- Its answers are checked for type and length; its errors, SystemExit among them, become
  TransferErrors; a call that is late is given up. All three are counted.
- What the owner of the daemon's thread asks (`exclusive`, `capacity_bytes`, `statistics`) is
  answered from memory: no code of the plug-in runs there.

That the right bytes came is for the reader to verify, as with every store. What nobody can bound
from the same process: a plug-in that keeps the interpreter's lock, or that crashes the process.

Concurrency: any thread may call; see `deadline.py` for the threads that do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Final, TypeVar

import numpy as np

from kvstrata.core.errors import ChecksumError, KvstrataError, TransferError
from kvstrata.core.ids import HASH_BYTES, SequenceHash
from kvstrata.core.plugins import said
from kvstrata.storage.deadline import HelperThreads, LateError
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

__all__ = ["CheckedStore"]

T = TypeVar("T")

_GRACE_S: Final = 1.0
"""How much longer than its own deadline a call may take."""
_ENTRIES_EACH: Final = 64
_BAD_ENTRIES_MAX: Final = 1000
_ASK_S: Final = 1.0
_NUMBER: Final = (int, float)
_THEIRS: Final = (
    "retries",
    "resolved",
    "vanished",
    "collected",
    "collected_bytes",
    "foreign",
    "used_bytes",
)
"""Counters that only the store itself can know."""


class _InvalidError(TransferError):
    """An answer that can be none."""


class CheckedStore:
    """A `KeyedStore` around one that is not trusted."""

    def __init__(
        self, store: KeyedStore, label: str, *, timeout_s: float, threads: HelperThreads
    ) -> None:
        """Wrap `store`, which `label` names in errors and which was promised `timeout_s` a call.

        Its properties are read here, once; the caller has checked them. `threads` are closed with
        us.
        """
        self.exclusive = store.exclusive
        self.capacity_bytes = store.capacity_bytes
        self._store, self._label = store, label
        self._timeout_s = timeout_s + _GRACE_S
        self._threads = threads
        self._counts = KeyedCounts()
        self._theirs: dict[str, int] = {}
        self._ask_s = 0.0
        self._closed = False

    def put(self, key: SequenceHash, header: bytes | memoryview, payload: memoryview) -> PutAnswer:
        """Put a copy, which the store may keep as long as it likes."""
        check_open(self._closed, self._label)
        name_of_key(key)
        if len(header) != HEADER_BYTES:
            raise TransferError(f"a header has {HEADER_BYTES} bytes", retryable=False)
        head = bytes(header)

        def check(answer: object, _: memoryview) -> PutAnswer:
            if not isinstance(answer, PutAnswer):
                raise _not_an_answer("put", answer)
            return answer

        answer = self._call(
            "put", lambda room: self._store.put(key, head, room.toreadonly()), check, payload
        )
        self._counts.add(**{answer.value: 1})
        return answer

    def get(self, key: SequenceHash, header: memoryview, payload: memoryview) -> int | None:
        """Get into a buffer of ours, and copy from there what it says has come."""
        check_open(self._closed, self._label)
        name_of_key(key)
        length_max = len(payload)

        def fetch(room: memoryview) -> object:
            return self._store.get(key, room[:HEADER_BYTES], room[HEADER_BYTES:])

        def check(answer: object, room: memoryview) -> int | None:
            if answer is None:
                return None
            if not isinstance(answer, int) or isinstance(answer, bool):
                raise _not_an_answer("get", answer)
            if not 0 <= answer <= length_max:
                raise _not_an_answer("get", answer)
            header[:] = room[:HEADER_BYTES]
            _copy(room[HEADER_BYTES : HEADER_BYTES + answer], payload[:answer])
            return answer

        try:
            found = self._call("get", fetch, check, HEADER_BYTES + length_max)
        except ChecksumError:
            self._counts.add(hits=1)
            raise
        self._counts.add(**{"misses" if found is None else "hits": 1})
        return found

    def peek(self, key: SequenceHash) -> bytes | None:
        """Peek, and take no more than a header for an answer."""
        check_open(self._closed, self._label)
        name_of_key(key)

        def check(answer: object, _: memoryview) -> bytes | None:
            if answer is None or (isinstance(answer, bytes) and len(answer) <= HEADER_BYTES):
                return answer
            raise _not_an_answer("peek", answer)

        found = self._call("peek", lambda _: self._store.peek(key), check)
        self._counts.add(misses=found is None)
        return found

    def exists(self, keys: Sequence[SequenceHash]) -> list[bool]:
        """Ask, and take only as many answers as there were questions."""
        check_open(self._closed, self._label)
        asked = [SequenceHash(bytes(key)) for key in keys if name_of_key(key)]

        def check(answer: object, _: memoryview) -> list[bool]:
            if not isinstance(answer, list) or len(answer) != len(asked):
                raise _not_an_answer("exists", answer)
            if any(not isinstance(each, bool) for each in answer):
                raise _not_an_answer("exists", answer)
            return list(answer)

        return self._call("exists", lambda _: self._store.exists(asked), check)

    def delete(self, keys: Sequence[SequenceHash]) -> None:
        """Hand the wish on."""
        check_open(self._closed, self._label)
        asked = [SequenceHash(bytes(key)) for key in keys if name_of_key(key)]
        self._call("delete", lambda _: self._store.delete(asked), lambda _answer, _room: None)
        self._counts.add(deleted=len(asked))

    def entries(self) -> Iterator[KeyedEntry]:
        """List what is one; the others are counted, and too many of them end the listing."""
        check_open(self._closed, self._label)
        return self._entries()

    def statistics(self) -> KeyedStatistics:
        """Return our own counters, and of the store's what it last said and only it can know."""
        return replace(self._counts.snapshot(), **self._theirs)

    def close(self) -> None:
        """Close the store, if it lets itself be closed in time."""
        if self._closed:
            return
        self._closed = True
        try:
            with self._threads.one() as helper:
                helper.call(self._store.close, self._timeout_s)
        except BaseException as error:  # whatever it raises: we are done with it
            if isinstance(error, KeyboardInterrupt):
                raise
            self._counts.add(errors=1, late=isinstance(error, LateError))
        finally:
            self._threads.close()

    # -- private -------------------------------------------------------------------------------

    def _entries(self) -> Iterator[KeyedEntry]:
        iterator = self._call("entries", lambda _: iter(self._store.entries()), _as_it_is)
        bad = 0
        while True:
            page = self._call("entries", lambda _: list(islice(iterator, _ENTRIES_EACH)), _as_it_is)
            for each in page:
                if _is_entry(each):
                    yield each
                    continue
                bad += 1
                self._counts.add(invalid=1)
                if bad > _BAD_ENTRIES_MAX:
                    self._counts.add(errors=1)
                    raise TransferError(
                        f"{self._label}: entries: {bad} of them are none", retryable=False
                    )
            if not page:
                return

    def _call(
        self,
        what: str,
        request: Callable[[memoryview], Any],
        check: Callable[[Any, memoryview], T],
        room: int | memoryview = 0,
    ) -> T:
        """Make a call with a buffer of so many bytes, or with a copy of these; check its answer."""
        try:
            with self._threads.one() as helper:
                length = room if isinstance(room, int) else len(room)
                buffer = helper.room(length)
                if not isinstance(room, int):
                    _copy(room, buffer)
                answer = helper.call(lambda: self._ask(request, buffer), self._timeout_s)
                return check(answer, buffer)
        except BaseException as error:  # noqa: BLE001  # SystemExit must not end a worker
            raise self._told(what, error) from None

    def _ask(self, request: Callable[[memoryview], Any], buffer: memoryview) -> Any:
        """Make the request, on the helper's thread; now and then ask for its counters as well."""
        answer = request(buffer)
        now_s = time.monotonic()
        if now_s >= self._ask_s:
            self._ask_s = now_s + _ASK_S
            self._theirs = _counters(self._store)
        return answer

    def _told(self, what: str, error: BaseException) -> BaseException:
        """Return what our side is told of `error`, and count it."""
        where = f"{self._label}: {what}"
        if isinstance(error, LateError):
            self._counts.add(errors=1, late=1)
            return TransferError(f"{where}: {error}", retryable=True)
        if isinstance(error, _InvalidError):
            self._counts.add(errors=1, invalid=1)
            return TransferError(f"{where}: {error}", retryable=True)
        if isinstance(error, ChecksumError):
            return ChecksumError(f"{where}: {said(error)}")
        self._counts.add(errors=1)
        ours = isinstance(error, KvstrataError)
        # What is not meant to be raised says nothing about the block: it may be there still.
        lasting = ours and getattr(error, "retryable", True) is False
        return TransferError(f"{where}: {said(error)}", retryable=not lasting)


def _not_an_answer(what: str, answer: object) -> _InvalidError:
    kind = type(answer).__name__
    size = f" of {len(answer)}" if isinstance(answer, bytes | list | tuple | str) else ""
    value = f" {answer}" if type(answer) is int else ""
    return _InvalidError(f"{what} answered with {kind}{size}{value}", retryable=True)


def _copy(source: memoryview, target: memoryview) -> None:
    # numpy lets other threads run while it copies; assigning to a slice does not
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def _as_it_is(answer: Any, _: memoryview) -> Any:
    return answer


def _is_entry(each: object) -> bool:
    if not isinstance(each, KeyedEntry):
        return False
    key: Any = each.key
    size: Any = each.stored_bytes
    if not isinstance(key, bytes) or len(key) != HASH_BYTES or not isinstance(each.used_s, _NUMBER):
        return False
    return isinstance(size, int) and size >= 0


def _counters(store: KeyedStore) -> dict[str, int]:
    """Return what the store says of itself, as far as it can be true."""
    try:
        found = store.statistics()
    except Exception:  # noqa: BLE001  # counters are a courtesy: without them the rest still works
        return {}
    values = {name: getattr(found, name, 0) for name in _THEIRS}
    return {name: n for name, n in values.items() if type(n) is int and n >= 0}
