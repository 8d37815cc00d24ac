"""Blocks to and from an object server: our mover beside the bare client, at the same concurrency.

Ours is `KeyedBackend` over `ObjectStore`: headers, seals computed on both ways, conditions where
the server honours them, bytes landing in the arena. The limit is obstore alone in one event loop:
payloads put, and fetched into objects of its own that are copied to the same memory. Rounds
alternate, and which side begins alternates too.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, Protocol

import numpy as np
import obstore

from kvstrata.apps.cli.bench.turns import PathRow, path_of, timed
from kvstrata.core.ids import SequenceHash
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.base import MemoryRegion
from kvstrata.storage.codecs import CodecSettings, make_chain
from kvstrata.storage.location import parse_location
from kvstrata.storage.objects import ObjectStore, make_client
from kvstrata.transfer.backends.keyed import KeyedBackend, KeyedEnd, KeyedOp
from kvstrata.transfer.base import Outcome

__all__ = ["measure_objects"]

TIMEOUT_S: Final = 60.0


class _Side(Protocol):
    def put(self, names: list[bytes]) -> None: ...

    def get(self, names: list[bytes]) -> None: ...

    def delete(self, names: list[bytes]) -> None: ...


class _Ours:
    """The product's own path."""

    def __init__(self, url: str, block_bytes: int, blocks: int, concurrency: int) -> None:
        layout = BlockLayout((Dimension("channel", block_bytes // 2),), "bfloat16", 64, "bench")
        location = parse_location(url)
        self.folder = location.prefix
        self.client = make_client(location, TIMEOUT_S)
        self.store = ObjectStore.open_client(self.client, location, layout, timeout_s=TIMEOUT_S)
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
        """End the threads and remove everything of this measurement."""
        self.backend.close()
        for page in obstore.list(self.client, self.folder):
            obstore.delete(self.client, [found["path"] for found in page])

    def _run(self, names: list[bytes], *, write: bool) -> None:
        end = KeyedEnd(self.store, self.chain, self.fingerprint)
        ops = [
            KeyedOp(SequenceHash(name), place * self.length, self.length, place)
            for place, name in enumerate(names)
        ]
        ends = (self.memory, end) if write else (end, self.memory)
        assert self.backend.submit(1, ops, *ends)  # type: ignore[arg-type]
        assert self.told.wait(TIMEOUT_S), "no completion"
        self.told.clear()
        found = self.backend.poll()
        assert found[0].outcome is Outcome.DONE, found


class _Bare:
    """The client alone."""

    def __init__(self, ours: _Ours, concurrency: int) -> None:
        self.client = ours.client  # the same connections for both sides
        self.concurrency = concurrency
        self.memory, self.length = mmap.mmap(-1, ours.length * ours.blocks), ours.length
        # rclone removes a directory that becomes empty, and meanwhile refuses puts into it.
        self.folder = f"{ours.folder}/bare"
        obstore.put(self.client, f"{self.folder}/stays", b"x")
        self.view, self.bytes = memoryview(self.memory), np.frombuffer(self.memory, np.uint8)

    def put(self, names: list[bytes]) -> None:
        """Put every block."""
        asyncio.run(self._all(self._put, names))

    def get(self, names: list[bytes]) -> None:
        """Get every block."""
        asyncio.run(self._all(self._get, names))

    def delete(self, names: list[bytes]) -> None:
        """Remove them."""
        obstore.delete(self.client, [f"{self.folder}/{name.hex()}" for name in names])

    async def _all(self, one: Callable[[int, str], Awaitable[None]], names: list[bytes]) -> None:
        some = asyncio.Semaphore(self.concurrency)

        async def bounded(place: int, name: bytes) -> None:
            async with some:
                await one(place * self.length, f"{self.folder}/{name.hex()}")

        await asyncio.gather(*(bounded(place, name) for place, name in enumerate(names)))

    async def _put(self, at: int, path: str) -> None:
        data = self.view[at : at + self.length]
        await obstore.put_async(self.client, path, data, use_multipart=False)

    async def _get(self, at: int, path: str) -> None:
        found = await obstore.get_async(self.client, path)
        data = np.frombuffer(await found.bytes_async(), np.uint8)
        np.copyto(self.bytes[at : at + self.length], data)


def measure_objects(
    url: str, block_bytes: int, blocks: int, concurrency: int, rounds: int
) -> list[PathRow]:
    """Return put and get at one concurrency; the first round warms up.

    Works in a prefix of its own below the URL's, and leaves nothing there.
    """
    place, _, options = url.partition("?")
    url = f"{place.rstrip('/')}/bench-{os.urandom(8).hex()}?{options}"
    ours = _Ours(url, block_bytes, blocks, concurrency)
    try:
        rates = _rates(ours, blocks, concurrency, rounds)
    finally:
        ours.close()
    tool = f"obstore alone, {concurrency} at once"
    return [
        path_of(
            f"object {verb}, {concurrency} at once",
            block_bytes,
            rates[verb, "ours"],
            rates[verb, "limit"],
            tool,
        )
        for verb in ("put", "get")
    ]


def _rates(
    ours: _Ours, blocks: int, concurrency: int, rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Return bytes per second of each verb and side."""
    bare = _Bare(ours, concurrency)
    size = ours.length * blocks
    ours.memory.view[:] = random.Random(1).randbytes(size)
    bare.view[:] = ours.memory.view
    sides: list[tuple[str, _Side]] = [("ours", ours), ("limit", bare)]
    rates: dict[tuple[str, str], list[float]] = {}
    luck = random.Random(2)
    for turn in range(rounds + 1):
        names = [luck.randbytes(16) for _ in range(blocks)]
        for verb in ("put", "get"):
            for name, side in sides:
                move: Callable[[list[bytes]], None] = getattr(side, verb)
                rate = timed(size, partial(move, names))
                if turn:
                    rates.setdefault((verb, name), []).append(rate)
        for _, side in sides:
            side.delete(names)
        sides.reverse()
    return rates
