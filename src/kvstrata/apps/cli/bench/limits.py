"""What a disk gives to anybody: fio where it is installed, plain system calls where it is not."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import random
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Final, Protocol

from kvstrata.core.errors import ConfigError

__all__ = ["FIO_HINT", "DiskLimit", "fio_version", "make_limit"]

FIO_HINT: Final = "no fio here: the limit is a loop of preadv and pwritev; apt-get install fio"
_FIO_TIMEOUT_S: Final = 120.0


class DiskLimit(Protocol):
    """A file beside the slab, written and read by somebody else."""

    tool: str
    """What does it."""

    def run(self, way: str) -> float:
        """Write or read the whole file once in random order; return bytes per second."""


def fio_version() -> str | None:
    """Return fio's version, None if it is not installed."""
    program = shutil.which("fio")
    if program is None:
        return None
    done = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=False, timeout=10
    )
    return done.stdout.strip() or None


def make_limit(directory: Path, block_bytes: int, blocks: int, depth: int) -> DiskLimit:
    """Return fio, or the loop of system calls, its file laid out."""
    if fio_version() is not None:
        return _Fio(directory, block_bytes, blocks, depth)
    return _Calls(directory, block_bytes, blocks, depth)


class _Fio:
    """fio with libaio and O_DIRECT."""

    def __init__(self, directory: Path, block_bytes: int, blocks: int, depth: int) -> None:
        self._command = [
            str(shutil.which("fio")),
            "--name=limit",
            f"--filename={directory / 'fio.bin'}",
            f"--size={blocks * block_bytes}",
            f"--bs={block_bytes}",
            "--ioengine=libaio",
            "--direct=1",
            f"--iodepth={depth}",
            "--overwrite=1",
            "--output-format=json",
        ]
        self.tool = f"{fio_version()}, libaio, O_DIRECT, depth {depth}"
        self.run("write")  # lays the file out

    def run(self, way: str) -> float:
        """Run it once."""
        done = subprocess.run(
            [*self._command, f"--rw=rand{way}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_FIO_TIMEOUT_S,
        )
        if done.returncode:
            raise ConfigError(
                f"fio failed: {(done.stderr or done.stdout).strip()[-200:]}",
                hint="name another place with --directory",
            )
        report = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][way]
        return float(report["bw_bytes"])


class _Calls:
    """As many threads as fio would have requests, each with one buffer of its own."""

    def __init__(self, directory: Path, block_bytes: int, blocks: int, depth: int) -> None:
        self._blocks, self._block_bytes, self._depth = blocks, block_bytes, depth
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        path = directory / "calls.bin"
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, 0o600)
            way = "O_DIRECT"
        except OSError:
            self._descriptor = os.open(path, flags, 0o600)
            way = "through the page cache"
        self.tool = f"preadv and pwritev, {way}, {depth} threads (no fio here)"
        self._buffers = [mmap.mmap(-1, block_bytes) for _ in range(depth)]
        for each in self._buffers:
            each[:] = random.randbytes(block_bytes)
        self.run("write")

    def run(self, way: str) -> float:
        """Move each block once."""
        order = random.sample(range(self._blocks), self._blocks)
        turns = itertools.count()
        call = os.pwritev if way == "write" else os.preadv
        short: list[int] = []

        def work(buffer: mmap.mmap) -> None:
            while (turn := next(turns)) < self._blocks:
                moved = call(self._descriptor, [buffer], order[turn] * self._block_bytes)
                if moved != self._block_bytes:
                    short.append(moved)

        threads = [threading.Thread(target=work, args=(each,)) for each in self._buffers]
        began = time.perf_counter()
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        seconds = time.perf_counter() - began
        assert not short, "a short transfer"
        return self._blocks * self._block_bytes / seconds

    def __del__(self) -> None:
        os.close(self._descriptor)
