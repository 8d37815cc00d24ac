"""What an object server's answer means, and how to say it without repeating a secret.

The client's own messages quote addresses, headers and the server's body, where signed queries and
keys may stand; ours are made of the status and the error code alone.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final, NamedTuple

__all__ = ["Failure", "Kind", "explain"]


class Kind(Enum):
    """What kind of failure a request met."""

    MISSING = "no such object"
    EXISTS = "there already"
    NO_BUCKET = "no such bucket or container"
    DENIED = "the credentials are wrong, missing or may not do this"
    UNABLE = "the server cannot do this"
    BUSY = "the server could not do this now"
    LOST = "no answer: the endpoint is dead, stalled or cut the connection"
    OTHER = "the request failed"


class Failure(NamedTuple):
    """One failed request."""

    kind: Kind
    """What kind."""
    text: str
    """One sentence without secrets."""

    @property
    def retryable(self) -> bool:
        """Return whether the same request may succeed later."""
        return self.kind in {Kind.BUSY, Kind.LOST}


_STATUS: Final = re.compile(r"status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>(\w{1,60})</Code>")
_NO_BUCKET: Final = frozenset({"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted"})
_CLASSES: Final = {
    "AlreadyExistsError": Kind.EXISTS,
    "PreconditionError": Kind.EXISTS,
    "NotFoundError": Kind.MISSING,
    "FileNotFoundError": Kind.MISSING,
    "PermissionDeniedError": Kind.DENIED,
    "UnauthenticatedError": Kind.DENIED,
    "NotSupportedError": Kind.UNABLE,
    "NotImplementedError": Kind.UNABLE,
    "TimeoutError": Kind.LOST,
}
_STATUSES: Final = {401: Kind.DENIED, 403: Kind.DENIED, 404: Kind.MISSING, 409: Kind.EXISTS,
                    412: Kind.EXISTS, 501: Kind.UNABLE, 408: Kind.BUSY, 429: Kind.BUSY}  # fmt: skip
_SERVER_ERRORS: Final = range(500, 600)


def explain(error: Exception) -> Failure:
    """Return what `error`, raised by the client, means."""
    text = str(error).partition("Debug source")[0]
    status = int(found[1]) if (found := _STATUS.search(text)) else 0
    code = found[1] if (found := _CODE.search(text)) else ""
    kind = _kind(type(error).__name__, status, code, text)
    detail = " ".join(filter(None, [str(status) if status else "", code]))
    return Failure(kind, f"{kind.value} ({detail})" if detail else kind.value)


def _kind(name: str, status: int, code: str, text: str) -> Kind:
    if code in _NO_BUCKET:
        return Kind.NO_BUCKET
    if name in _CLASSES:
        return _CLASSES[name]
    if status in _STATUSES:
        return _STATUSES[status]
    # Some servers answer a range with a whole object while that is just being replaced.
    if status in _SERVER_ERRORS or "non-partial response" in text:
        return Kind.BUSY
    if not status and any(word in text for word in ("HTTP error", "request or response body")):
        return Kind.LOST
    return Kind.OTHER
