"""Blocks as strings of a Redis or Valkey server.

    PREFIX:<layout fingerprint>:KVSTRATA    the marker
    PREFIX:<layout fingerprint>:<key>       header 256 | payload

A block is made by one `SET NX`, so it is there whole or not at all and the first writer wins. A
server bounded by `maxmemory` answers FULL, or evicts, which is a miss. One server, or a primary
whose address moves; a Redis Cluster is not needed for blocks that may be lost, and is refused.

Concurrency: any thread may call; each uses a connection of its own from a pool, and no call waits
for another. A call makes at most two requests for one block, each of which waits at most a sixth
of `timeout_s` for the connection, for being let in, and for its answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvstrata.core.errors import ChecksumError, ConfigError, TransferError
from kvstrata.core.ids import SequenceHash
from kvstrata.storage.envelope import HEADER_BYTES
from kvstrata.storage.keyed import (
    KeyedCounts,
    KeyedEntry,
    KeyedStatistics,
    PutAnswer,
    check_open,
    key_of_name,
    name_of_key,
)
from kvstrata.storage.marker import MARKER_BYTES_MAX, MARKER_NAME, check_marker, encode_marker
from kvstrata.storage.plugged import StoreRequest
from kvstrata_redis.failure import Failure, Kind, explain
from kvstrata_redis.place import PASSWORD, USERNAME, Place, parse_place

__all__ = ["RedisStore"]

T = TypeVar("T")

_ATTEMPTS_MAX: Final = 2
_WAITS_EACH: Final = 3  # to be connected, to be let in, to be answered
_CONNECTIONS_MAX: Final = 128
_DELETE_MAX: Final = 1000
_SCAN_COUNT: Final = 500
_HINTS: Final = {
    Kind.LOST: "check that the server is not stopped or overloaded",
    Kind.UNREACHABLE: "check host, port or socket, and that the server runs",
    Kind.BUSY: "try again later; the server's log says why",
    Kind.DENIED: f"set {USERNAME} and {PASSWORD}, and check the user's rights",
    Kind.FULL: "raise maxmemory, or set maxmemory-policy allkeys-lru",
    Kind.REPLICA: "name the primary",
    Kind.CLUSTER: "name a server that is not part of a cluster",
    Kind.FOREIGN: "use another prefix",
    Kind.OTHER: "check the database's number; the server's log says more",
}


class _RequestError(TransferError):
    """A request failed; knows how."""

    def __init__(self, what: str, failure: Failure) -> None:
        super().__init__(f"{what}: {failure.text}", retryable=failure.retryable)
        self.failure = failure


class RedisStore:
    """A `KeyedStore` of one layout's blocks below a prefix of a server."""

    exclusive = True
    capacity_bytes: int | None = None

    def __init__(self, request: StoreRequest) -> None:
        """Connect and check the marker, or make it.

        Raises ConfigError within `timeout_s` for a server that cannot be used, LayoutError for a
        place that is not ours.
        """
        place = parse_place(request.url)
        self._prefix = f"{place.prefix}:{request.layout.fingerprint.hex()}:"
        self._timeout_s = request.timeout_s
        self._counts = KeyedCounts()
        self._closed = False
        self._pool = _make_pool(place, request.timeout_s / (_ATTEMPTS_MAX * _WAITS_EACH))
        self._client: Any = redis.Redis(connection_pool=self._pool)
        where = f"tiers.store: redis at {place}"
        try:
            self._mark(encode_marker(request.layout))
            found = self._marker()
        except _RequestError as error:
            self.close()
            raise ConfigError(
                f"{where} cannot be used: {error.failure.text}", hint=_HINTS[error.failure.kind]
            ) from None
        try:
            check_marker(found, request.layout, where)
        except ConfigError:
            self.close()
            raise

    @staticmethod
    def check(url: str) -> None:
        """Raise ConfigError for a URL that names no server; asks none."""
        parse_place(url)

    def put(self, key: SequenceHash, header: bytes | memoryview, payload: memoryview) -> PutAnswer:
        """Create the string; the answer of a request that was lost is found out."""
        check_open(self._closed, "this redis store")
        name = self._name(key)
        if len(header) != HEADER_BYTES:
            raise TransferError(f"a header has {HEADER_BYTES} bytes", retryable=False)
        block = b"".join([header, payload])
        lost = False  # whether a request of ours may have arrived without our being told

        def create() -> PutAnswer:
            nonlocal lost
            if lost and (known := self._look(name, block)) is not None:
                return known
            lost = True
            made = self._client.set(name, block, nx=True)
            return PutAnswer.CREATED if made else PutAnswer.EXISTED

        try:
            answer = self._insist("put", create)
        except _RequestError as error:
            if error.failure.kind is not Kind.FULL:
                raise self._counted(error) from None
            answer = PutAnswer.FULL
        self._counts.add(**{answer.value: 1})
        return answer

    def get(self, key: SequenceHash, header: memoryview, payload: memoryview) -> int | None:
        """Fetch the string, and not one byte more than there is room for, plus one to know."""
        check_open(self._closed, "this redis store")
        room = len(header) + len(payload)
        data = self._fetch(self._name(key), room + 1)
        if data is None:
            self._counts.add(misses=1)
            return None
        self._counts.add(hits=1)
        length = len(data) - len(header)
        if not 0 <= length <= len(payload):
            raise ChecksumError(f"{key.hex()}: {len(data)} bytes or more are not a block like it")
        view = memoryview(data)
        header[:] = view[: len(header)]
        payload[:length] = view[len(header) :]
        return length

    def peek(self, key: SequenceHash) -> bytes | None:
        """Fetch the front of the string."""
        check_open(self._closed, "this redis store")
        found = self._fetch(self._name(key), HEADER_BYTES)
        self._counts.add(misses=found is None)
        return found

    def exists(self, keys: Sequence[SequenceHash]) -> list[bool]:
        """Ask for all of them at once."""
        check_open(self._closed, "this redis store")
        names = [self._name(key) for key in keys]
        if not names:
            return []

        def ask() -> list[bool]:
            with self._client.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.exists(name)
                return [bool(each) for each in pipe.execute()]

        return self._tried("exists", ask)

    def delete(self, keys: Sequence[SequenceHash]) -> None:
        """Unlink in batches: the server frees the memory beside its other work."""
        check_open(self._closed, "this redis store")
        names = [self._name(key) for key in keys]
        for start in range(0, len(names), _DELETE_MAX):
            batch = names[start : start + _DELETE_MAX]
            self._tried("delete", partial(self._client.unlink, *batch))
            self._counts.add(deleted=len(batch))

    def entries(self) -> Iterator[KeyedEntry]:
        """Scan the database, page by page; the server may name a key twice, we do not."""
        check_open(self._closed, "this redis store")
        return self._entries()

    def statistics(self) -> KeyedStatistics:
        """Return the counters."""
        return self._counts.snapshot()

    def close(self) -> None:
        """Refuse later calls, and end the connections that nobody uses now."""
        self._closed = True
        self._pool.disconnect(inuse_connections=False)

    # -- requests ------------------------------------------------------------------------------

    def _name(self, key: SequenceHash) -> str:
        return self._prefix + name_of_key(key)

    def _fetch(self, name: str, length: int) -> bytes | None:
        """Return up to `length` bytes of the string's front; None if there is no string."""

        def fetch() -> bytes | None:
            front: bytes = self._client.getrange(name, 0, length - 1)
            if front:
                return front
            # A string that is not there and an empty one, which is no block, look alike; and it
            # may have been made just now.
            there = self._client.exists(name)
            return self._client.getrange(name, 0, length - 1) if there else None

        try:
            return self._insist("get", fetch)
        except _RequestError as error:
            if error.failure.kind is Kind.FOREIGN:
                self._counts.add(hits=1)
                raise ChecksumError(f"{name}: {error.failure.text}") from None
            raise self._counted(error) from None

    def _look(self, name: str, block: bytes) -> PutAnswer | None:
        """Return what a put of ours whose answer was lost has come to; None if nothing is there."""
        front = self._client.getrange(name, 0, HEADER_BYTES - 1)
        if not front:
            return None
        self._counts.add(resolved=1)
        same = front == block[:HEADER_BYTES] and self._client.strlen(name) == len(block)
        return PutAnswer.CREATED if same else PutAnswer.EXISTED

    def _mark(self, marker: bytes) -> None:
        if not self._marker():
            self._insist(
                "mark", lambda: self._client.set(self._prefix + MARKER_NAME, marker, nx=True)
            )

    def _marker(self) -> bytes:
        name = self._prefix + MARKER_NAME
        found: bytes = self._insist(
            "marker", lambda: self._client.getrange(name, 0, MARKER_BYTES_MAX)
        )
        return found

    def _entries(self) -> Iterator[KeyedEntry]:
        cursor, seen = 0, set()
        while True:
            scan = partial(self._client.scan, cursor, f"{self._prefix}*", _SCAN_COUNT)
            cursor, names = self._tried("list", scan)
            page: list[SequenceHash] = []
            for name in names:
                text = name.decode("utf-8", "replace").removeprefix(self._prefix)
                key = key_of_name(text)
                if key is None:
                    self._counts.add(foreign=text != MARKER_NAME)
                elif key not in seen:
                    seen.add(key)
                    page.append(key)
            yield from self._tried("list", partial(self._measure, page))
            if not cursor:
                return

    def _measure(self, keys: list[SequenceHash]) -> list[KeyedEntry]:
        """Return what is known of each key that is still there."""
        with self._client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.object("IDLETIME", self._name(key))  # first: asking the length counts as use
                pipe.strlen(self._name(key))
            answers = pipe.execute(raise_on_error=False)
        now_s = time.time()
        found = []
        for key, idle_s, length in zip(keys, answers[::2], answers[1::2], strict=True):
            if isinstance(length, int) and length:
                # A server that evicts by frequency knows no times.
                used_s = now_s - idle_s if isinstance(idle_s, int) else 0.0
                found.append(KeyedEntry(key, length, used_s))
        return found

    def _insist(self, what: str, request: Callable[[], T]) -> T:
        """Send a request, once more if it was lost: a server may just have been restarted."""
        until_s = time.monotonic() + self._timeout_s
        for attempt in range(1, _ATTEMPTS_MAX + 1):
            try:
                return request()
            except (redis.RedisError, OSError) as error:
                failure = explain(error)
                next_s = time.monotonic() + self._timeout_s / _ATTEMPTS_MAX
                lost = failure.kind in {Kind.LOST, Kind.UNREACHABLE}
                if not lost or attempt == _ATTEMPTS_MAX or next_s > until_s:
                    raise _RequestError(what, failure) from None  # its text may quote values
            self._counts.add(retries=1)
        raise AssertionError("the loop returns or raises")

    def _tried(self, what: str, request: Callable[[], T]) -> T:
        try:
            return self._insist(what, request)
        except _RequestError as error:
            raise self._counted(error) from None

    def _counted(self, error: _RequestError) -> _RequestError:
        self._counts.add(errors=1)
        return error


def _make_pool(place: Place, wait_s: float) -> redis.ConnectionPool:
    family: type[redis.Connection | redis.UnixDomainSocketConnection] = redis.Connection
    options = place.connection() | {"socket_timeout": wait_s}
    if place.socket:
        family = redis.UnixDomainSocketConnection
    else:
        family = redis.SSLConnection if place.tls else redis.Connection
        options["socket_connect_timeout"] = wait_s
    return redis.ConnectionPool(
        connection_class=family,
        max_connections=_CONNECTIONS_MAX,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        **options,
    )
