"""An Azure Blob server for tests: `azurite-blob` (npm `azurite`), in memory, one container."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import urllib.request
from email.utils import formatdate
from pathlib import Path

from kvstrata.testing.server import ServerProcess, free_port

__all__ = ["CONTAINER", "AzuriteServer", "find_azurite"]

CONTAINER = "kvstrata-test"
"""The container that is there from the start."""
_ACCOUNT = "kvstratatest"
_VERSION = "2021-12-02"


def find_azurite() -> str | None:
    """Return the program; None if there is none on the path."""
    return shutil.which("azurite-blob")


class AzuriteServer(ServerProcess):
    """A running server with an account key of its own; a context manager that ends it.

    Raises RuntimeError if it does not come up.
    """

    def __init__(self, folder: Path) -> None:
        """Start it; `folder` is its working directory, where it keeps nothing."""
        program = find_azurite()
        if program is None:
            raise RuntimeError("no azurite-blob: npm install -g azurite")
        self._key = os.urandom(32)
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}/{_ACCOUNT}"
        command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--silent"]
        command += ["--skipApiVersionCheck", "--inMemoryPersistence", "--disableTelemetry"]
        key = base64.b64encode(self._key).decode()
        self.environment = {
            "AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": key,
        }
        super().__init__(command, self.port, folder, {"AZURITE_ACCOUNTS": f"{_ACCOUNT}:{key}"})
        self._make_container()

    @property
    def url(self) -> str:
        """The container as an object tier's URL."""
        return f"az://{CONTAINER}?endpoint={self.endpoint}"

    def _make_container(self) -> None:
        """Make it by a request signed with the shared key, which no client of ours can send."""
        date = formatdate(usegmt=True)
        signed = "\n".join(
            [
                "PUT",
                *[""] * 11,
                f"x-ms-date:{date}",
                f"x-ms-version:{_VERSION}",
                f"/{_ACCOUNT}/{_ACCOUNT}/{CONTAINER}",
                "restype:container",
            ]
        )
        digest = hmac.new(self._key, signed.encode(), hashlib.sha256).digest()
        request = urllib.request.Request(  # noqa: S310  our own address
            f"{self.endpoint}/{CONTAINER}?restype=container", method="PUT"
        )
        request.add_header("x-ms-date", date)
        request.add_header("x-ms-version", _VERSION)
        signature = base64.b64encode(digest).decode()
        request.add_header("Authorization", f"SharedKey {_ACCOUNT}:{signature}")
        with urllib.request.urlopen(request, timeout=10):  # noqa: S310
            pass
