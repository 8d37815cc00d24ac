"""What a server's answer means, and how to say it without repeating what it said.

Only the code word in front of a server's message is shown: the rest may quote names and values.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final, NamedTuple

from redis import exceptions

__all__ = ["Failure", "Kind", "explain"]


class Kind(Enum):
    """What kind of failure a request met."""

    LOST = "no answer in time"
    UNREACHABLE = "the server cannot be reached, or closed the connection"
    BUSY = "the server could not do this now"
    DENIED = "user or password are wrong or missing, or may not do this"
    FULL = "the server's memory is full (maxmemory)"
    REPLICA = "the server is a replica and takes no writes"
    CLUSTER = "the server is a node of a cluster"
    FOREIGN = "something that is no block has the block's name"
    OTHER = "the request failed"


class Failure(NamedTuple):
    """One failed request."""

    kind: Kind
    """What kind."""
    text: str
    """One sentence without secrets."""

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return self.kind in {Kind.LOST, Kind.UNREACHABLE, Kind.BUSY, Kind.REPLICA}


_CODE: Final = re.compile(r"([A-Z]{3,20})\b")
_CODES: Final = {
    "OOM": Kind.FULL,
    "NOAUTH": Kind.DENIED,
    "WRONGPASS": Kind.DENIED,
    "NOPERM": Kind.DENIED,
    "READONLY": Kind.REPLICA,
    "MOVED": Kind.CLUSTER,
    "ASK": Kind.CLUSTER,
    "CLUSTERDOWN": Kind.CLUSTER,
    "WRONGTYPE": Kind.FOREIGN,
    "LOADING": Kind.BUSY,
    "MISCONF": Kind.BUSY,
    "MASTERDOWN": Kind.BUSY,
    "BUSY": Kind.BUSY,
    "TRYAGAIN": Kind.BUSY,
}
# The client takes the code word off the messages of these. The first that fits counts.
_CLASSES: Final = (
    (exceptions.TimeoutError, Kind.LOST),
    (exceptions.BusyLoadingError, Kind.BUSY),
    (exceptions.AuthenticationError, Kind.DENIED),
    (exceptions.AuthorizationError, Kind.DENIED),
    (exceptions.NoPermissionError, Kind.DENIED),
    (exceptions.OutOfMemoryError, Kind.FULL),
    (exceptions.ReadOnlyError, Kind.REPLICA),
    (exceptions.MovedError, Kind.CLUSTER),
    (exceptions.AskError, Kind.CLUSTER),
    (exceptions.ClusterDownError, Kind.CLUSTER),
    (exceptions.MasterDownError, Kind.BUSY),
    (exceptions.TryAgainError, Kind.BUSY),
    (exceptions.ConnectionError, Kind.UNREACHABLE),
    (OSError, Kind.UNREACHABLE),
)


def explain(error: Exception) -> Failure:
    """Return what `error`, raised by the client, means."""
    found = _CODE.match(str(error))
    code = found[1] if found else ""
    kind = next((kind for family, kind in _CLASSES if isinstance(error, family)), None)
    if kind is None or (kind is Kind.UNREACHABLE and code in _CODES):
        kind = _CODES.get(code, Kind.OTHER)
    return Failure(kind, f"{kind.value} ({code})" if code in _CODES else kind.value)
