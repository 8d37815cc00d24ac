"""Object stores: which layouts lie below a prefix."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar

from kvstrata.core.errors import ConfigError
from kvstrata.storage.location import Location, parse_location
from kvstrata.storage.marker import MARKER_BYTES_MAX, MARKER_NAME, decode_marker
from kvstrata.storage.objecterror import Kind, explain
from kvstrata.storage.objects import ObjectStore, make_client

__all__ = ["LayoutPrefix", "find_prefixes", "open_prefix", "remove_marker"]

Found = TypeVar("Found")
_LAYOUT: Final = re.compile(r"(?:.*/)?[0-9a-f]{32}")


class LayoutPrefix(NamedTuple):
    """A prefix with a marker of ours."""

    client: Any
    """obstore's client of its bucket."""
    prefix: str
    """Below which its blocks are; no slash at the end."""
    fingerprint: bytes
    """Fingerprint of the layout that its marker names."""
    description: str
    """That layout in words."""
    name: str
    """Its place for people; nothing secret."""


def find_prefixes(url: str, timeout_s: float) -> list[LayoutPrefix]:
    """Return the layouts below an object tier's URL, or the one whose own prefix this is.

    Prefixes without a marker are not ours and are left out. Raises ConfigError for a URL,
    credentials or a server that does not work, LayoutError for a marker that is damaged.
    """
    location = parse_location(url)
    try:
        import obstore

        client = make_client(location, timeout_s)
    except ImportError as error:
        raise ConfigError(
            "the object client is not installed", hint="pip install 'kvstrata[object]'"
        ) from error
    if (own := _marker(obstore, client, location, location.prefix)) is not None:
        return [own]
    listed = _ask(location, lambda: obstore.list_with_delimiter(client, location.prefix or None))
    names = sorted(each for each in listed["common_prefixes"] if _LAYOUT.fullmatch(each))
    found = [_marker(obstore, client, location, name) for name in names]
    return [each for each in found if each is not None]


def open_prefix(found: LayoutPrefix, timeout_s: float) -> ObjectStore:
    """Open one layout's blocks for looking and deleting; nothing is written."""
    return ObjectStore.open_found(found.client, found.prefix, timeout_s=timeout_s)


def remove_marker(found: LayoutPrefix) -> None:
    """Delete the marker of a layout whose blocks are gone."""
    import obstore

    where = parse_location(found.name)
    _ask(where, lambda: obstore.delete(found.client, f"{found.prefix}/{MARKER_NAME}"))


def _marker(obstore: Any, client: Any, location: Location, prefix: str) -> LayoutPrefix | None:
    name = f"{location.scheme}://{location.bucket}/{prefix}".rstrip("/")
    path = f"{prefix}/{MARKER_NAME}".lstrip("/")

    def get() -> bytes:
        answer = obstore.get(client, path)
        return b"" if answer.meta["size"] > MARKER_BYTES_MAX else bytes(answer.bytes())

    text = _ask(location, get, missing=None)
    if text is None:
        return None
    return LayoutPrefix(client, prefix, *decode_marker(text, repr(name)), name)


def _ask(location: Location, request: Callable[[], Found], missing: Any = ...) -> Any:
    """Send a request; raises ConfigError without the client's text, which may quote a secret."""
    from obstore.exceptions import BaseError

    try:
        return request()
    except (BaseError, OSError, NotImplementedError) as error:
        failure = explain(error)
        if failure.kind is Kind.MISSING and missing is not ...:
            return missing
        raise ConfigError(
            f"{location} cannot be read: {failure.text}",
            hint="check bucket, endpoint=... and the credentials in the environment",
        ) from None
