"""Blocks as objects of S3, Azure Blob or GCS, through obstore.

    PREFIX/<layout fingerprint>/KVSTRATA    the marker
    PREFIX/<layout fingerprint>/<key>       header 256 | payload

One prefix a layout: several models share a bucket, and a lifecycle rule can expire each of them.
An object is made by one conditional request (If-None-Match), so it is there whole or not at all
and the first writer wins; where the server ignores the condition, which is tried out at the
start, the last of several writers wins. Nothing is listed but by `entries`.

Concurrency: any thread may call; there is no lock and no thread of our own. Each call ends within
`timeout_s`: a request gets a third of it, and none is begun that could end later. So a request
may be sent three times, or, if the answer to a put was lost, sent, looked after, and sent again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np

from kvstrata.core.errors import ChecksumError, ConfigError, LayoutError, TransferError
from kvstrata.core.ids import SequenceHash
from kvstrata.layout import BlockLayout
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
from kvstrata.storage.location import Location, parse_location, region_of, s3_credentials
from kvstrata.storage.marker import MARKER_BYTES_MAX, MARKER_NAME, check_marker, encode_marker
from kvstrata.storage.objecterror import Failure, Kind, explain

__all__ = ["ATTEMPTS_MAX", "ObjectStore", "make_client"]

ATTEMPTS_MAX: Final = 3
"""Requests that one call may make for one object."""
_PAUSE_S: Final = 0.05
_SLACK_S: Final = 0.05  # what it takes to get to the first request
_DELETE_MAX: Final = 1000  # the limit of S3's batch
_HEADS_MAX: Final = 32
_SMALL: Final = {"min_chunk_size": HEADER_BYTES}  # the client waits for so much, not for all

T = TypeVar("T")


class _RequestError(TransferError):
    """A request failed; knows what its answer would have said."""

    def __init__(self, what: str, failure: Failure) -> None:
        super().__init__(f"{what}: {failure.text}", retryable=failure.retryable)
        self.failure = failure


class ObjectStore:
    """A `KeyedStore` of one layout's blocks below a prefix of a bucket."""

    capacity_bytes: int | None = None

    def __init__(self, client: Any, prefix: str, *, timeout_s: float, exclusive: bool) -> None:
        """Use a place that has been checked. Use `open`, or `open_client` for a client made."""
        import obstore
        from obstore.exceptions import BaseError

        self._obstore = obstore
        self._failures = (
            BaseError,
            OSError,
            NotImplementedError,
        )  # FileNotFoundError is an OSError
        self._client = client
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._exclusive = exclusive
        self._ranges = True
        self._counts = KeyedCounts()
        self._closed = False

    @classmethod
    def open(cls, url: str, layout: BlockLayout, *, timeout_s: float = 10.0) -> ObjectStore:
        """Open or make the place of `layout` at `url` (see `location.py`).

        Raises ConfigError within a few `timeout_s` for wrong credentials, a missing bucket, a dead
        or stalled endpoint; LayoutError for a place that is not ours.
        """
        location = parse_location(url)
        try:
            client = make_client(location, timeout_s)
        except ImportError as error:
            raise ConfigError(
                "tiers.object: the object client is not installed",
                hint="pip install 'kvstrata[object]'",
            ) from error
        return cls.open_client(client, location, layout, timeout_s=timeout_s)

    @classmethod
    def open_client(
        cls, client: Any, location: Location, layout: BlockLayout, *, timeout_s: float = 10.0
    ) -> ObjectStore:
        """Open the place of `layout` through a client of obstore's that exists already."""
        prefix = "/".join(filter(None, [location.prefix, layout.fingerprint.hex()]))
        store = cls(client, prefix, timeout_s=timeout_s, exclusive=True)
        try:
            store._exclusive = store._mark(layout, f"tiers.object: {location}")
            store._ranges = store._honours_ranges()
        except TransferError as error:
            failure = error.failure.kind if isinstance(error, _RequestError) else Kind.OTHER
            raise ConfigError(
                f"tiers.object: {location} cannot be used: {error}", hint=_HINTS[failure]
            ) from None
        return store

    @classmethod
    def open_found(cls, client: Any, prefix: str, *, timeout_s: float) -> ObjectStore:
        """Open one layout's prefix that has its marker, for looking and deleting; writes nothing.

        Raises TransferError if the server does not answer.
        """
        store = cls(client, prefix, timeout_s=timeout_s, exclusive=False)
        store._ranges = store._honours_ranges()
        return store

    @property
    def exclusive(self) -> bool:
        """Whether the server honours If-None-Match."""
        return self._exclusive

    def put(self, key: SequenceHash, header: bytes | memoryview, payload: memoryview) -> PutAnswer:
        """Create the object; the answer of a request that was lost is found out."""
        check_open(self._closed, "this object store")
        path = self._path(key)
        if len(header) != HEADER_BYTES:
            raise TransferError(f"a header has {HEADER_BYTES} bytes", retryable=False)
        head = bytes(header)
        answer = self._put(path, head, payload)
        self._counts.add(**{answer.value: 1})
        return answer

    def get(self, key: SequenceHash, header: memoryview, payload: memoryview) -> int | None:
        """Fetch the object whole, after its length has been found right."""
        check_open(self._closed, "this object store")
        path = self._path(key)

        def fetch() -> Any:
            found = self._obstore.get(self._client, path)
            size = found.meta["size"]
            if not 0 <= size - HEADER_BYTES <= len(payload):  # before a byte of it is fetched
                raise ChecksumError(f"{path}: {size} bytes are not a block of its kind")
            data = found.bytes()
            if len(data) != size:
                raise _RequestError(f"get {path}", Failure(Kind.LOST, "the object came cut short"))
            return data

        try:
            data = self._insist(f"get {path}", fetch)
        except ChecksumError:
            self._counts.add(hits=1)
            raise
        except _RequestError as error:
            if error.failure.kind is not Kind.MISSING:
                raise self._counted(error) from None
            self._counts.add(misses=1)
            return None
        self._counts.add(hits=1)
        bytes_of = np.frombuffer(data, np.uint8)
        header[:] = bytes_of[:HEADER_BYTES].tobytes()
        length = len(bytes_of) - HEADER_BYTES
        # numpy lets other threads run while it copies; assigning to a slice does not
        np.copyto(np.frombuffer(payload, np.uint8, length), bytes_of[HEADER_BYTES:])
        return length

    def peek(self, key: SequenceHash) -> bytes | None:
        """Fetch the front of an object."""
        check_open(self._closed, "this object store")
        path = self._path(key)
        try:
            return self._insist(f"peek at {path}", partial(self._front, path))
        except _RequestError as error:
            if error.failure.kind is not Kind.MISSING:
                raise self._counted(error) from None
            self._counts.add(misses=1)
            return None

    def exists(self, keys: Sequence[SequenceHash]) -> list[bool]:
        """Ask for all of them, some at a time."""
        check_open(self._closed, "this object store")
        paths = [self._path(key) for key in keys]
        if len(paths) <= 1:
            return [self._size(path, self._until_s()) is not None for path in paths]
        try:
            return asyncio.run(_within(self._heads(paths), self._timeout_s))
        except (TransferError, TimeoutError) as error:
            raise self._counted(error, f"exists of {len(paths)} keys") from None

    def delete(self, keys: Sequence[SequenceHash]) -> None:
        """Delete in batches."""
        check_open(self._closed, "this object store")
        paths = [self._path(key) for key in keys]
        for start in range(0, len(paths), _DELETE_MAX):
            batch = paths[start : start + _DELETE_MAX]
            try:
                self._insist(f"delete {len(batch)} objects", partial(self._delete, batch))
            except _RequestError as error:
                raise self._counted(error) from None
            self._counts.add(deleted=len(batch))

    def entries(self) -> Iterator[KeyedEntry]:
        """List the prefix, page by page."""
        check_open(self._closed, "this object store")
        return self._entries()

    def statistics(self) -> KeyedStatistics:
        """Return the counters."""
        return self._counts.snapshot()

    def close(self) -> None:
        """Refuse later calls; connections end with the client."""
        self._closed = True

    # -- requests ------------------------------------------------------------------------------

    def _path(self, key: SequenceHash) -> str:
        return f"{self._prefix}/{name_of_key(key)}"

    def _put(self, path: str, header: bytes, payload: memoryview) -> PutAnswer:
        until_s = self._until_s()
        if not self._exclusive and self._size(path, until_s) is not None:
            return PutAnswer.EXISTED
        lost = False  # whether a request of ours may have arrived without our being told

        def create() -> PutAnswer:
            nonlocal lost
            if lost and (known := self._look(path, header, len(payload), until_s)) is not None:
                return known
            try:
                self._create(path, [header, payload], until_s)
            except _RequestError as error:
                if error.failure.kind is Kind.EXISTS:
                    known = self._look(path, header, len(payload), until_s) if lost else None
                    return known or PutAnswer.EXISTED
                lost = lost or error.retryable
                raise
            return PutAnswer.CREATED

        try:
            return self._insist(f"put {path}", create, until_s)
        except _RequestError as error:
            raise self._counted(error) from None

    def _create(self, path: str, parts: list[bytes | memoryview], until_s: float) -> None:
        mode = "create" if self._exclusive else "overwrite"
        put = partial(self._obstore.put, self._client, path, parts, use_multipart=False, mode=mode)
        self._once(f"put {path}", put, until_s)

    def _look(self, path: str, header: bytes, length: int, until_s: float) -> PutAnswer | None:
        """Return what a put of ours whose answer was lost has come to; None if nothing is there."""
        try:
            head = partial(self._obstore.head, self._client, path)
            size = self._once(f"head {path}", head, until_s)["size"]
        except _RequestError as error:
            if error.failure.kind is Kind.MISSING:
                return None
            raise
        self._counts.add(resolved=1)
        if size != HEADER_BYTES + length:
            return PutAnswer.EXISTED
        found = self._once(f"look at {path}", partial(self._front, path), until_s)
        return PutAnswer.CREATED if found == header else PutAnswer.EXISTED

    def _front(self, path: str) -> bytes:
        """Fetch the header; from a server that ignores ranges, the first piece of the object."""
        if self._ranges:
            part = self._obstore.get_range(self._client, path, start=0, length=HEADER_BYTES)
            return bytes(part)
        pieces = self._obstore.get(self._client, path).stream(**_SMALL)
        return bytes(next(iter(pieces), b""))[:HEADER_BYTES]

    def _honours_ranges(self) -> bool:
        """Try it out on the marker."""
        part = partial(
            self._obstore.get_range,
            self._client,
            f"{self._prefix}/{MARKER_NAME}",
            start=0,
            length=1,
        )
        try:
            return len(self._once("get a range", part, self._until_s())) == 1
        except _RequestError:
            return False

    def _size(self, path: str, until_s: float) -> int | None:
        try:
            head = partial(self._obstore.head, self._client, path)
            found = self._insist(f"head {path}", head, until_s)
        except _RequestError as error:
            if error.failure.kind is Kind.MISSING:
                return None
            raise self._counted(error) from None
        return int(found["size"])

    async def _heads(self, paths: list[str]) -> list[bool]:
        some = asyncio.Semaphore(_HEADS_MAX)

        async def one(path: str) -> bool:
            async with some:
                try:
                    await self._obstore.head_async(self._client, path)
                except self._failures as error:
                    failure = explain(error)
                    if failure.kind is not Kind.MISSING:
                        raise _RequestError(f"head {path}", failure) from None
                    return False
            return True

        return list(await asyncio.gather(*map(one, paths)))

    def _delete(self, paths: list[str]) -> None:
        try:
            self._once(
                "delete", partial(self._obstore.delete, self._client, paths), self._until_s()
            )
        except _RequestError as error:
            if error.failure.kind is not Kind.MISSING:
                raise
            if len(paths) > 1:  # a provider without batches stops at what is not there
                for path in paths:
                    self._delete([path])

    def _entries(self) -> Iterator[KeyedEntry]:
        listing = iter(self._obstore.list(self._client, self._prefix))
        while True:
            try:
                page = self._once(
                    f"list {self._prefix}", partial(next, listing, None), self._until_s()
                )
            except _RequestError as error:
                raise self._counted(error) from None
            if page is None:
                return
            for found in page:
                name = found["path"].removeprefix(f"{self._prefix}/")
                key = key_of_name(name)
                if key is None:
                    self._counts.add(foreign=name != MARKER_NAME)
                    continue
                yield KeyedEntry(key, found["size"], found["last_modified"].timestamp())

    def _mark(self, layout: BlockLayout, where: str) -> bool:
        """Check or make the marker; return whether the server honours conditions."""
        path, wanted = f"{self._prefix}/{MARKER_NAME}", encode_marker(layout)
        try:
            found = self._insist(f"get {path}", partial(self._fetch_small, path))
        except _RequestError as error:
            if error.failure.kind is not Kind.MISSING:
                raise
            if next(self._entries(), None) is not None or self._counts.snapshot().foreign:
                raise LayoutError(
                    f"{where} has no {MARKER_NAME} at {self._prefix} and is not empty",
                    hint="kvstrata never changes what it did not write: use another prefix",
                ) from None
        else:
            check_marker(found, layout, where)
        for _ in range(2):  # the first may make it, the second must then be refused
            try:
                self._create(path, [wanted], self._until_s())
            except _RequestError as error:
                if error.failure.kind in {Kind.EXISTS, Kind.UNABLE}:
                    return error.failure.kind is Kind.EXISTS
                raise
        return False

    def _fetch_small(self, path: str) -> bytes:
        found = self._obstore.get(self._client, path)
        if found.meta["size"] > MARKER_BYTES_MAX:
            return b""  # no marker is that long; `check_marker` says so
        return bytes(found.bytes())

    def _until_s(self) -> float:
        return time.monotonic() + self._timeout_s

    def _once(self, what: str, request: Callable[[], T], until_s: float) -> T:
        """Send one request, unless it could end too late; the client bounds how long it takes."""
        if time.monotonic() + self._timeout_s / ATTEMPTS_MAX > until_s + _SLACK_S:
            raise _RequestError(what, Failure(Kind.LOST, f"no answer in {self._timeout_s} s"))
        try:
            return request()
        except self._failures as error:
            raise _RequestError(what, explain(error)) from None  # its text may quote what is secret

    def _insist(self, what: str, request: Callable[[], T], until_s: float | None = None) -> T:
        """Send a request until it is answered, as often as bounds allow."""
        until_s = self._until_s() if until_s is None else until_s
        for attempt in range(1, ATTEMPTS_MAX + 1):
            try:
                return self._once(what, request, until_s)
            except _RequestError as error:
                pause_s = _PAUSE_S * attempt
                next_s = time.monotonic() + pause_s + self._timeout_s / ATTEMPTS_MAX
                if not error.retryable or attempt == ATTEMPTS_MAX or next_s > until_s:
                    raise
            self._counts.add(retries=1)
            time.sleep(pause_s)
        raise AssertionError("the loop returns or raises")

    def _counted(self, error: Exception, what: str = "") -> TransferError:
        self._counts.add(errors=1)
        if isinstance(error, TransferError):
            return error
        return TransferError(f"{what}: no answer within {self._timeout_s} s", retryable=True)


async def _within(work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    return await asyncio.wait_for(work, timeout_s)


_HINTS: Final = {
    **dict.fromkeys(Kind, "check bucket, endpoint and credentials"),
    Kind.NO_BUCKET: "create it, or check its name and the endpoint",
    Kind.MISSING: "create the bucket, or check its name and the endpoint",
    Kind.DENIED: "set the credentials in the environment (AWS_*, AZURE_STORAGE_*, GOOGLE_*)",
    Kind.LOST: "check endpoint=..., and that this machine reaches it",
    Kind.BUSY: "try again later",
}


def make_client(location: Location, timeout_s: float) -> Any:
    """Return obstore's client of a bucket, whose requests end within a share of `timeout_s`.

    Raises ConfigError for a place that it cannot be set up for, ImportError without obstore.
    """
    from obstore import store as stores
    from obstore.exceptions import BaseError

    share = f"{max(1, int(1000 * timeout_s / ATTEMPTS_MAX))}ms"
    options: dict[str, Any] = {
        "client_options": {
            "timeout": share,
            "connect_timeout": share,
            "allow_http": location.endpoint.startswith("http://"),
        },
        "retry_config": {"max_retries": 0},
    }
    if location.endpoint:
        options["base_url" if location.scheme == "gs" else "endpoint"] = location.endpoint
    try:
        if location.scheme == "s3":
            options |= {"region": region_of(location), **s3_credentials()}
            return stores.S3Store(location.bucket, **options)
        if location.scheme == "az":
            if account := dict(location.options).get("account"):
                options["account_name"] = account
            return stores.AzureStore(location.bucket, **options)
        return stores.GCSStore(location.bucket, **options)
    except (BaseError, OSError):
        raise ConfigError(  # without the client's text, which may quote a setting
            f"tiers.object: {location}: the client cannot be set up for it",
            hint=f"{_HINTS[Kind.DENIED]}; Azure also needs account=NAME",
        ) from None
