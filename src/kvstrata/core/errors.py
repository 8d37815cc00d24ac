"""Everything kvstrata raises, as one tree.

* KvstrataError
  + ConfigError       the operator must change something; raised before the first block moves
    - LayoutError     bytes or caches whose geometry we do not know; refused, never guessed
  + CapacityError     no slot or arena space; carries `requested` and `available`
  + TransferError     one operation failed; carries `retryable`
    - ChecksumError   never retryable from the same copy
  + DaemonError       the node daemon did not do what was asked
    - DaemonGoneError     its process ended or cannot be reached
    - CallTimeoutError    no answer within the deadline
    - CallRefusedError    it answered that the call is not acceptable

Misses and throttles are return values, not errors. A refused operation changes nothing.
"""

from __future__ import annotations

__all__ = [
    "CallRefusedError",
    "CallTimeoutError",
    "CapacityError",
    "ChecksumError",
    "ConfigError",
    "DaemonError",
    "DaemonGoneError",
    "KvstrataError",
    "LayoutError",
    "TransferError",
]


class KvstrataError(Exception):
    """The root: catch this to catch everything that kvstrata raises on purpose."""


class ConfigError(KvstrataError):
    """The operator must change something; one sentence, and a hint that says what to do."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message


class LayoutError(ConfigError):
    """The geometry of a cache or of stored blocks is not one that we know how to read."""


class CapacityError(KvstrataError):
    """There is no room, and waiting will not make any."""

    def __init__(self, message: str, *, requested: int, available: int) -> None:
        super().__init__(message)
        self.requested = requested
        self.available = available


class TransferError(KvstrataError):
    """One operation on bytes failed."""

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class ChecksumError(TransferError):
    """Bytes are not the ones that were sealed; the copy at hand will never become right."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=False)


class DaemonError(KvstrataError):
    """The node daemon did not do what was asked; the caller goes on without the cache."""


class DaemonGoneError(DaemonError):
    """The daemon's process ended, or nothing listens at its address."""


class CallTimeoutError(DaemonError):
    """No answer came within the deadline; the session must be renewed before the next call."""


class CallRefusedError(DaemonError):
    """The daemon answered that the call is not acceptable; nothing was changed."""
