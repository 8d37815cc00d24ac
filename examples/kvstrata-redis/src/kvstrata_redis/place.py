"""Where a server is: one URL, and never a password in it.

    redis://HOST[:PORT][/DATABASE][?prefix=NAME]
    rediss://HOST[:PORT][/DATABASE][?prefix=NAME]      the same through TLS
    unix:///PATH/TO/SOCKET[?prefix=NAME&db=DATABASE]

User and password come from KVSTRATA_REDIS_USERNAME and KVSTRATA_REDIS_PASSWORD.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from kvstrata.core.errors import ConfigError

__all__ = ["PASSWORD", "USERNAME", "Place", "parse_place"]

USERNAME: Final = "KVSTRATA_REDIS_USERNAME"
"""Variable with the user; without it the server's default user."""
PASSWORD: Final = "KVSTRATA_REDIS_PASSWORD"  # noqa: S105  # a variable's name
"""Variable with the password; without it none is sent."""

_SYNTAX: Final = (
    "write redis://HOST:PORT/DATABASE?prefix=NAME, rediss://... or unix:///SOCKET?prefix=NAME"
)
# No `*`, `?`, `[` or `\`: the prefix is part of the pattern of a scan.
_PREFIX: Final = re.compile(r"[A-Za-z0-9._/-]{1,200}")
_PREFIX_DEFAULT: Final = "kvstrata"
_PORT_DEFAULT: Final = 6379
_OPTIONS: Final = {
    "redis": frozenset({"prefix"}),
    "rediss": frozenset({"prefix"}),
    "unix": frozenset({"prefix", "db"}),
}


@dataclass(frozen=True, slots=True)
class Place:
    """A server, a database on it, and a prefix; holds nothing secret, so it may be shown."""

    prefix: str
    """What our names begin with."""
    database: int
    """Number of the database."""
    host: str = ""
    """Host; empty for a socket."""
    port: int = _PORT_DEFAULT
    """Port of the host."""
    tls: bool = False
    """Whether to speak TLS."""
    socket: str = ""
    """Path of a Unix socket; empty for a host."""

    def __str__(self) -> str:
        where = self.socket or f"{self.host}:{self.port}"
        return f"{where}, database {self.database}, prefix {self.prefix}"

    def connection(self, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
        """Return how to connect, with what `environment` says of user and password."""
        secrets = {
            "username": environment.get(USERNAME) or None,
            "password": environment.get(PASSWORD) or None,
        }
        if self.socket:
            return {"path": self.socket, "db": self.database, **secrets}
        return {"host": self.host, "port": self.port, "db": self.database, **secrets}


def parse_place(url: str) -> Place:
    """Return what `url` says; raises ConfigError, which never repeats what might be a secret."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or _PORT_DEFAULT
    except ValueError:
        raise ConfigError("tiers.store: the server's URL is none", hint=_SYNTAX) from None
    if parts.scheme not in _OPTIONS:
        raise ConfigError(f"tiers.store: unknown scheme {parts.scheme!r}", hint=_SYNTAX)
    if "@" in parts.netloc or parts.fragment:
        raise ConfigError(
            "tiers.store: the URL carries a user, a password or a fragment",
            hint=f"put them into {USERNAME} and {PASSWORD}",
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := set(options) - _OPTIONS[parts.scheme]:
        known = ", ".join(sorted(_OPTIONS[parts.scheme]))
        raise ConfigError(
            f"tiers.store: {parts.scheme}:// has no option {', '.join(sorted(unknown))}",
            hint=f"known are {known}; user and password belong into {USERNAME} and {PASSWORD}",
        )
    prefix = options.get("prefix", _PREFIX_DEFAULT)
    if not _PREFIX.fullmatch(prefix):
        raise ConfigError(
            "tiers.store: the prefix is empty, too long or has odd characters",
            hint="use letters, digits and . _ / -",
        )
    unix = parts.scheme == "unix"
    number = (options.get("db") if unix else parts.path.strip("/")) or "0"
    if not number.isdecimal() or not (parts.path if unix else host):
        raise ConfigError("tiers.store: host, socket or database is misspelt", hint=_SYNTAX)
    if unix:
        return Place(prefix, int(number), socket=parts.path)
    return Place(prefix, int(number), host, port, tls=parts.scheme == "rediss")
