"""The laws of `KeyedStore`; docs/contracts/keyed-store.md says them in words.

Of a store that is installed as a plug-in they can be tried without a line of code:

    KVSTRATA_STORE=NAME=URL pytest --pyargs kvstrata.testing.contracts.keyed_store
"""

from __future__ import annotations

import os
import random
import threading
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import pytest

from kvstrata.core.errors import ChecksumError, ConfigError, TransferError
from kvstrata.core.ids import SequenceHash
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.envelope import HEADER_BYTES
from kvstrata.storage.keyed import KeyedStore, PutAnswer
from kvstrata.storage.plugged import StoreRequest, check_plugged, open_unchecked

__all__ = [
    "VARIABLE",
    "KeyedStoreContract",
    "OpenKeyedStore",
    "TestInstalledStore",
    "fresh_request",
]

T = TypeVar("T")
_TRIES: Final = 20

OpenKeyedStore = Callable[[], KeyedStore]
"""Opens the store under test; the same place at each call."""

VARIABLE: Final = "KVSTRATA_STORE"
"""Names the installed store that `TestInstalledStore` tries, as NAME=URL."""

_LENGTH = 70_001  # neither pages nor a power of two
_WRITERS = 8


class KeyedStoreContract:
    """Subclass and provide `open_store`; the place is empty before each test."""

    durable = True
    """Whether a store opened at the same place sees what an earlier or another one wrote."""

    @pytest.fixture
    def open_store(self) -> OpenKeyedStore:
        """Return the function that opens the store under test."""
        raise NotImplementedError("a contract suite is given its subject by a subclass")

    @pytest.fixture
    def store(self, open_store: OpenKeyedStore) -> Iterable[KeyedStore]:
        """Return an open store; it is closed by the suite."""
        opened = open_store()
        yield opened
        opened.close()

    def test_law_1_what_was_put_comes_back(self, store: KeyedStore) -> None:
        """Header and payload, byte by byte, at any length, and nothing behind them."""
        for number, length in enumerate((1, 255, 4096, _LENGTH, 1 << 20)):
            header, payload = _block(number, length)
            assert store.put(_key(number), header, payload) is PutAnswer.CREATED
            assert _read(store, number, length) == (header, bytes(payload))
            assert _read(store, number, length + 5000) == (header, bytes(payload))

    def test_law_2_the_first_block_of_a_key_stays(self, store: KeyedStore) -> None:
        """A second put is told so and changes nothing."""
        header, payload = _block(1)
        assert store.put(_key(1), header, payload) is PutAnswer.CREATED
        assert store.put(_key(1), *_block(2)) is PutAnswer.EXISTED
        assert _read(store, 1, _LENGTH) == (header, bytes(payload))
        found = store.statistics()
        assert (found.created, found.existed) == (1, 1)

    def test_law_3_a_miss_is_an_answer(self, store: KeyedStore) -> None:
        """Of get and of exists, each key for itself, in the order asked."""
        store.put(_key(1), *_block(1))
        store.put(_key(4), *_block(4))
        assert _read(store, 2, _LENGTH) is None
        asked = [_key(number) for number in (4, 2, 1, 3, 4)]
        assert store.exists(asked) == [True, False, True, False, True]
        assert store.exists([]) == []
        assert store.statistics().misses == 1
        assert store.peek(_key(2)) is None
        assert store.peek(_key(4)) == _block(4)[0], "the header alone, not a byte of the payload"

    def test_law_4_what_is_deleted_is_a_miss(self, store: KeyedStore) -> None:
        """What is not there is no error, and a key may come back with other bytes."""
        for number in range(6):
            store.put(_key(number), *_block(number))
        store.delete([_key(number) for number in (0, 3, 99, 3)])
        store.delete([])
        assert store.exists([_key(n) for n in range(6)]) == [False, True, True, False, True, True]
        assert store.put(_key(3), *_block(7)) is PutAnswer.CREATED
        assert _read(store, 3, _LENGTH) == _expected(7)

    def test_law_5_a_block_that_does_not_fit_is_damage(self, store: KeyedStore) -> None:
        """Never a silent cut: a buffer too small is told, and the store goes on."""
        store.put(_key(1), *_block(1))
        for length in (0, 1, _LENGTH - 1):
            with pytest.raises(ChecksumError) as caught:
                _read(store, 1, length)
            assert not caught.value.retryable
        assert _read(store, 1, _LENGTH) == _expected(1)

    def test_law_6_a_block_is_there_whole_or_not_at_all(self, open_store: OpenKeyedStore) -> None:
        """However many write one key and however often it is looked at meanwhile."""
        stores = [open_store() for _ in range(2)] if self.durable else [open_store()]
        known = [_expected(number) for number in range(_WRITERS)]
        barrier = threading.Barrier(2 * _WRITERS)

        def write(number: int) -> PutAnswer:
            block = _block(number)
            barrier.wait()
            return _insist(lambda: stores[number % len(stores)].put(_key(0), *block))

        def look(number: int) -> bool:
            barrier.wait()
            store = stores[number % len(stores)]
            found = [_insist(lambda: _read(store, 0, _LENGTH)) for _ in range(20)]
            return all(each is None or each in known for each in found)

        with ThreadPoolExecutor(2 * _WRITERS) as threads:
            looks = [threads.submit(look, number) for number in range(_WRITERS)]
            answers = list(threads.map(write, range(_WRITERS)))
            assert all(each.result() for each in looks)
        created = answers.count(PutAnswer.CREATED)
        assert created == 1 if stores[0].exclusive else created >= 1
        assert _read(stores[0], 0, _LENGTH) in known
        for each in stores:
            each.close()

    def test_law_7_listing_streams_what_is_there(self, store: KeyedStore) -> None:
        """Each key once, with the bytes that it takes."""
        assert list(store.entries()) == []
        for number in range(20):
            store.put(_key(number), *_block(number, 1000 + number))
        store.delete([_key(5)])
        found = {entry.key: entry for entry in store.entries()}
        assert set(found) == {_key(number) for number in range(20) if number != 5}
        for number in (0, 19):
            taken = found[_key(number)].stored_bytes
            assert HEADER_BYTES + 1000 + number <= taken <= HEADER_BYTES + 1000 + number + 8192

    def test_law_8_a_store_opened_again_has_what_was_put(
        self, store: KeyedStore, open_store: OpenKeyedStore
    ) -> None:
        """Also while the first is still open: several daemons share one place."""
        if not self.durable:
            return
        store.put(_key(1), *_block(1))
        other = open_store()
        assert _read(other, 1, _LENGTH) == _expected(1)
        assert other.put(_key(1), *_block(2)) is PutAnswer.EXISTED
        other.put(_key(2), *_block(2))
        assert _read(store, 2, _LENGTH) == _expected(2)
        other.close()

    def test_law_9_closed_answers_nothing(self, store: KeyedStore) -> None:
        """Closing twice is harmless; a call after it is refused, not hung and not a miss."""
        store.put(_key(1), *_block(1))
        store.close()
        store.close()
        for call in (
            lambda: store.put(_key(2), *_block(2)),
            lambda: _read(store, 1, _LENGTH),
            lambda: store.exists([_key(1)]),
            lambda: store.delete([_key(1)]),
            lambda: list(store.entries()),
        ):
            with pytest.raises(TransferError) as caught:
                call()
            assert not caught.value.retryable
        assert store.statistics().created == 1

    def test_law_10_many_threads_may_call(self, store: KeyedStore) -> None:
        """Each gets its own block, and the counters add up."""

        def walk(number: int) -> bool:
            answers = [
                store.put(_key(number * 100 + step), *_block(step, 5000)) for step in range(5)
            ]
            found = [_read(store, number * 100 + step, 5000) for step in range(5)]
            store.delete([_key(number * 100)])
            right = [_expected(step, 5000) for step in range(5)]
            return answers == [PutAnswer.CREATED] * 5 and found == right

        with ThreadPoolExecutor(_WRITERS) as threads:
            assert all(threads.map(walk, range(_WRITERS)))
        found = store.statistics()
        assert (found.created, found.hits, found.deleted) == (5 * _WRITERS, 5 * _WRITERS, _WRITERS)
        assert (found.errors, found.misses) == (0, 0)

    def test_law_11_a_refused_call_changes_nothing(self, store: KeyedStore) -> None:
        """A key or a header that is none: told at once, nothing stored."""
        header, payload = _block(1)
        for key, head in ((SequenceHash(b"short"), header), (_key(1), header[:-1])):
            with pytest.raises(TransferError) as caught:
                store.put(key, head, payload)
            assert not caught.value.retryable
        assert list(store.entries()) == []


def fresh_request(url: str, timeout_s: float = 10.0) -> StoreRequest:
    """Return a request for a layout that nobody has used, so that its place at `url` is empty."""
    layout = BlockLayout((Dimension(f"try_{uuid.uuid4().hex}", _LENGTH),), "int8", 16, "suite")
    return StoreRequest(url, layout, 1 << 30, timeout_s)


class TestInstalledStore(KeyedStoreContract):
    """The store that `VARIABLE` names, opened as a daemon opens it.

    Each test has a layout of its own and deletes what it wrote: what else is at the URL stays.
    """

    @pytest.fixture
    def name_and_url(self) -> tuple[str, str]:
        """Return what `VARIABLE` says."""
        name, equals, url = os.environ.get(VARIABLE, "").partition("=")
        if not equals:
            pytest.fail(f"{VARIABLE} names no store: write {VARIABLE}=NAME=URL", pytrace=False)
        return name, url

    @pytest.fixture
    def open_store(self, name_and_url: tuple[str, str]) -> Iterable[OpenKeyedStore]:
        """Return the function that opens it; what it holds in the end is deleted."""
        name, url = name_and_url
        request = fresh_request(url)
        opened: list[KeyedStore] = []

        def open_one() -> KeyedStore:
            opened.append(_open_installed(name, request))
            return opened[-1]

        yield open_one
        if opened:
            left = _open_installed(name, request)
            left.delete([entry.key for entry in left.entries()])
            left.close()

    def test_law_12_layouts_are_kept_apart(self, name_and_url: tuple[str, str]) -> None:
        """A block of one layout is a miss in another, at the same URL."""
        name, url = name_and_url
        one, other = (_open_installed(name, fresh_request(url)) for _ in range(2))
        one.put(_key(1), *_block(1))
        assert other.exists([_key(1)]) == [False]
        assert _read(other, 1, _LENGTH) is None
        assert list(other.entries()) == []
        other.delete([_key(1)])
        assert _read(one, 1, _LENGTH) == _expected(1)
        one.delete([_key(1)])
        one.close()
        other.close()


def _open_installed(name: str, request: StoreRequest) -> KeyedStore:
    """Open it as a daemon does, but for the wrapper that would hide what it does wrong."""
    try:
        check_plugged(name, request.url)
        return open_unchecked(name, request)
    except ConfigError as error:
        refusal = str(error)
    pytest.fail(refusal, pytrace=False)


def _key(number: int) -> SequenceHash:
    """Return keys that differ in their first bytes, as hashes do."""
    return SequenceHash(random.Random(number).randbytes(16))


def _block(number: int, length: int = _LENGTH) -> tuple[bytes, memoryview]:
    luck = random.Random(1000 + number)
    return luck.randbytes(HEADER_BYTES), memoryview(luck.randbytes(length))


def _expected(number: int, length: int = _LENGTH) -> tuple[bytes, bytes]:
    header, payload = _block(number, length)
    return header, bytes(payload)


def _insist(request: Callable[[], T]) -> T:
    """Ask again while the answer is "not now": a server may, while others write the same key."""
    for _ in range(_TRIES - 1):
        try:
            return request()
        except TransferError as error:
            if not error.retryable:
                raise
    return request()


def _read(store: KeyedStore, number: int, length: int) -> tuple[bytes, bytes] | None:
    header, payload = bytearray(HEADER_BYTES), bytearray(length)
    found = store.get(_key(number), memoryview(header), memoryview(payload))
    return None if found is None else (bytes(header), bytes(payload[:found]))
