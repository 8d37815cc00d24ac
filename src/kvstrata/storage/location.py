"""Where an object tier is: one URL, and never a credential in it.

    s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME]
    az://CONTAINER[/PREFIX][?account=NAME&endpoint=URL]
    gs://BUCKET[/PREFIX][?endpoint=URL]

Credentials come from the environment or the provider's standard file: AWS_ACCESS_KEY_ID and the
like, or the shared credentials file with AWS_PROFILE; AZURE_STORAGE_*; for GCS the file that
GOOGLE_APPLICATION_CREDENTIALS names.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from kvstrata.core.errors import ConfigError

__all__ = ["Location", "parse_location", "region_of", "s3_credentials"]

_OPTIONS: Final = {
    "s3": frozenset({"endpoint", "region"}),
    "az": frozenset({"endpoint", "account"}),
    "gs": frozenset({"endpoint"}),
}
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,221}")
_PREFIX: Final = re.compile(r"[A-Za-z0-9._/=-]*")
_SYNTAX: Final = (
    "write s3://BUCKET/PREFIX?endpoint=URL&region=NAME, az://CONTAINER/PREFIX or gs://..."
)
_REGION: Final = "us-east-1"


@dataclass(frozen=True, slots=True)
class Location:
    """A prefix of a bucket; holds nothing secret, so it may be shown."""

    scheme: str
    """`s3`, `az` or `gs`."""
    bucket: str
    """Bucket or container."""
    prefix: str
    """Below which our objects are; no slash at either end, empty for the whole bucket."""
    endpoint: str = ""
    """Address of the server; empty for the provider's own."""
    options: tuple[tuple[str, str], ...] = ()
    """`region` or `account`, if given."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}".rstrip("/")


def parse_location(url: str) -> Location:
    """Return what `url` says; raises ConfigError, which never repeats what might be a secret."""
    parts = urlsplit(url)
    if parts.scheme not in _OPTIONS:
        raise ConfigError(f"tiers.object: unknown scheme {parts.scheme!r}", hint=_SYNTAX)
    if "@" in parts.netloc or parts.fragment:
        raise ConfigError(
            "tiers.object: the URL carries a user, a password or a fragment",
            hint="put credentials into the environment, such as AWS_ACCESS_KEY_ID",
        )
    prefix = parts.path.strip("/")
    if not _BUCKET.fullmatch(parts.netloc) or not _PREFIX.fullmatch(prefix) or "//" in prefix:
        raise ConfigError("tiers.object: bucket or prefix is missing or misspelt", hint=_SYNTAX)
    if any(part in {".", ".."} for part in prefix.split("/")):
        raise ConfigError("tiers.object: a prefix has no . or .. in it", hint=_SYNTAX)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := set(options) - _OPTIONS[parts.scheme]:
        names = ", ".join(sorted(unknown))
        known = ", ".join(sorted(_OPTIONS[parts.scheme]))
        raise ConfigError(
            f"tiers.object: {parts.scheme}:// has no option {names}",
            hint=f"known are {known}; credentials belong into the environment",
        )
    endpoint = options.pop("endpoint", "")
    found = urlsplit(endpoint)
    if endpoint and (
        found.scheme not in {"http", "https"} or not found.hostname or "@" in endpoint
    ):
        raise ConfigError(
            "tiers.object: the endpoint is not an address",
            hint="write endpoint=http://HOST:PORT or endpoint=https://HOST, without a user",
        )
    return Location(parts.scheme, parts.netloc, prefix, endpoint, tuple(sorted(options.items())))


def s3_credentials(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return the options with which S3 is opened for the credentials in the standard file.

    Empty if the environment names a key itself, or there is no file or no such profile in it: then
    the client looks in the environment and at the machine's own role. Raises ConfigError for a
    file that cannot be read.
    """
    if "AWS_ACCESS_KEY_ID" in environment:
        return {}
    home = environment.get("HOME", "~")
    path = Path(environment.get("AWS_SHARED_CREDENTIALS_FILE") or f"{home}/.aws/credentials")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path.expanduser())
    except (configparser.Error, UnicodeDecodeError):  # its text would quote the file's lines
        raise ConfigError(
            f"tiers.object: {str(path)!r} is not a credentials file",
            hint="write [default], aws_access_key_id = ..., aws_secret_access_key = ...",
        ) from None
    profile = environment.get("AWS_PROFILE", "default")
    if not parser.has_option(profile, "aws_access_key_id"):
        return {}
    names = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
    }
    return {ours: parser[profile][name] for name, ours in names.items() if name in parser[profile]}


def region_of(location: Location, environment: Mapping[str, str] = os.environ) -> str:
    """Return the region to sign for: the URL's, the environment's, or AWS's first."""
    named = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    return dict(location.options).get("region") or named or _REGION
