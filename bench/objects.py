"""Blocks to and from an object server: our mover beside the bare client, at the same concurrency.

    python bench/objects.py [--json FILE] [--quick] [--block-bytes N] [--url s3://...]

Ours is `KeyedBackend` over `ObjectStore`: headers, seals computed on both ways, conditions where
the server honours them, bytes landing in the arena. The limit is obstore alone in one event loop:
payloads put, and fetched into objects of its own that are copied to the same memory. Without --url
a server is started (`rclone serve s3`), which shares this machine's cores with both sides.

Rounds alternate, and which side begins alternates too; MB/s are medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import mmap
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import obstore

from kvstrata.core.ids import SequenceHash
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.base import MemoryRegion
from kvstrata.storage.codecs import CodecSettings, make_chain
from kvstrata.storage.objects import ObjectStore
from kvstrata.testing.s3 import RcloneServer
from kvstrata.transfer.backends.keyed import KeyedBackend, KeyedEnd, KeyedOp
from kvstrata.transfer.base import Outcome


class Ours:
    """The product's own path."""

    def __init__(self, url: str, block_bytes: int, blocks: int, concurrency: int) -> None:
        layout = BlockLayout((Dimension("channel", block_bytes // 2),), "bfloat16", 64, "bench")
        self.store = ObjectStore.open(url, layout, timeout_s=60.0)
        self.chain = make_chain("none", CodecSettings("bfloat16"))
        self.fingerprint = layout.fingerprint
        self.told = threading.Event()
        self.backend = KeyedBackend(threads=concurrency, notify=self.told.set)
        self.memory = MemoryRegion(memoryview(mmap.mmap(-1, block_bytes * blocks)))
        self.length, self.blocks = block_bytes, blocks

    def put(self, names: list[bytes]) -> None:
        """Write every block under these names."""
        self._run(names, write=True)

    def get(self, names: list[bytes]) -> None:
        """Read them back."""
        self._run(names, write=False)

    def delete(self, names: list[bytes]) -> None:
        """Remove them."""
        self.store.delete([SequenceHash(name) for name in names])

    def close(self) -> None:
        """End the threads."""
        self.backend.close()

    def _run(self, names: list[bytes], *, write: bool) -> None:
        end = KeyedEnd(self.store, self.chain, self.fingerprint)
        ops = [
            KeyedOp(SequenceHash(name), place * self.length, self.length, place)
            for place, name in enumerate(names)
        ]
        ends = (self.memory, end) if write else (end, self.memory)
        assert self.backend.submit(1, ops, *ends)  # type: ignore[arg-type]
        assert self.told.wait(60)
        self.told.clear()
        found = self.backend.poll()
        assert found[0].outcome is Outcome.DONE, found


class Bare:
    """The client alone."""

    def __init__(self, ours: Ours, concurrency: int) -> None:
        self.client = ours.store._client  # noqa: SLF001  the same connections for both sides
        self.concurrency = concurrency
        self.memory, self.length = mmap.mmap(-1, ours.length * ours.blocks), ours.length
        # rclone removes a directory that becomes empty, and meanwhile refuses puts into it.
        obstore.put(self.client, "bare/stays", b"x")
        self.view, self.bytes = memoryview(self.memory), np.frombuffer(self.memory, np.uint8)

    def put(self, names: list[bytes]) -> None:
        """Put every block."""
        asyncio.run(self._all(self._put, names))

    def get(self, names: list[bytes]) -> None:
        """Get every block."""
        asyncio.run(self._all(self._get, names))

    def delete(self, names: list[bytes]) -> None:
        """Remove them."""
        obstore.delete(self.client, [f"bare/{name.hex()}" for name in names])

    async def _all(self, one: Callable, names: list[bytes]) -> None:
        some = asyncio.Semaphore(self.concurrency)

        async def bounded(place: int, name: bytes) -> None:
            async with some:
                await one(place * self.length, f"bare/{name.hex()}")

        await asyncio.gather(*(bounded(place, name) for place, name in enumerate(names)))

    async def _put(self, at: int, path: str) -> None:
        data = self.view[at : at + self.length]
        await obstore.put_async(self.client, path, data, use_multipart=False)

    async def _get(self, at: int, path: str) -> None:
        found = await obstore.get_async(self.client, path)
        data = np.frombuffer(await found.bytes_async(), np.uint8)
        np.copyto(self.bytes[at : at + self.length], data)


def measure(url: str, block_bytes: int, blocks: int, concurrency: int, rounds: int) -> list[dict]:
    """Return put and get at one concurrency."""
    ours = Ours(url, block_bytes, blocks, concurrency)
    sides = {"ours": ours, "limit": Bare(ours, concurrency)}
    ours.memory.view[:] = random.Random(1).randbytes(block_bytes * blocks)
    sides["limit"].view[:] = ours.memory.view
    rates: dict[tuple[str, str], list[float]] = {}
    luck = random.Random(2)
    for turn in range(rounds + 1):
        names = [luck.randbytes(16) for _ in range(blocks)]
        order = list(sides) if turn % 2 else list(reversed(sides))
        for verb in ("put", "get"):
            for side in order:
                begun = time.perf_counter()
                getattr(sides[side], verb)(names)
                rate = block_bytes * blocks / (time.perf_counter() - begun) / 1e6
                if turn:  # the first warms up
                    rates.setdefault((verb, side), []).append(rate)
        for each in sides.values():
            each.delete(names)
    ours.close()
    lines = []
    for verb in ("put", "get"):
        mine, limit = (median(rates[verb, side]) for side in ("ours", "limit"))
        lines.append(
            {
                "name": f"object {verb}, {concurrency} at once",
                "block_bytes": block_bytes,
                "ours": round(mine, 1),
                "limit": round(limit, 1),
                "ratio": round(mine / limit, 3),
            }
        )
    return lines


@contextlib.contextmanager
def server(url: str | None) -> Iterator[str]:
    """Yield the URL of a server: the one given, or one of our own in memory."""
    if url is not None:
        yield url
        return
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108  the disk is not asked
    with tempfile.TemporaryDirectory(dir=place) as folder, RcloneServer(Path(folder)) as running:
        os.environ.update(running.environment)
        yield running.url


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one round; only shows that it works")
    parser.add_argument("--block-bytes", type=int, default=1 << 20)
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--url")
    options = parser.parse_args()
    paths = []
    with server(options.url) as url:
        for concurrency in (8, 32):
            rounds = 1 if options.quick else 9
            paths += measure(url, options.block_bytes, options.blocks, concurrency, rounds)
    for line in paths:
        print(
            f"{line['name']:26} {line['block_bytes']:>9} bytes  ours {line['ours']:7.1f} MB/s  "
            f"limit {line['limit']:7.1f} MB/s  ratio {line['ratio']:.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps({"paths": paths}, indent=1) + "\n")


if __name__ == "__main__":
    main()
