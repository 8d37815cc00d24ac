"""NIXL's storage plug-ins beside the movers that we have, in turns, on the same blocks.

    python bench/nixl_storage.py [--json FILE] [--quick] [--directory DIR]

Files: our NIXL backend with each queue of the POSIX plug-in, and that plug-in bare (all blocks in
one request, which our backend never sends, since a failed one does not say which block failed),
beside our threads; all past the page cache. Objects: the OBJ plug-in beside obstore alone,
against `rclone serve s3`; AZURE_BLOB beside obstore against `azurite-blob` if it is on the path.
MB/s are medians of the rounds; the order changes each round. What the object plug-ins do with a
read of twice an object's length is told as well.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import obstore
from obstore.store import AzureStore, S3Store

from kvstrata.storage.base import FileRegion, MemoryRegion
from kvstrata.testing.azure import CONTAINER, AzuriteServer, find_azurite
from kvstrata.testing.s3 import BUCKET, RcloneServer
from kvstrata.transfer.backends.nixl import NixlAgent, NixlBackend
from kvstrata.transfer.backends.nixl.binding import load_binding
from kvstrata.transfer.backends.posix import PosixBackend
from kvstrata.transfer.base import CopyOp, Outcome

FILE_BYTES = 64 << 20
MIB = 1 << 20
QUEUES = {
    "nixl aio": {"use_aio": "true"},
    "nixl io_uring": {"use_uring": "true"},
    "nixl posix aio": {"use_posix_aio": "true"},
}


def race(sides: Mapping[str, Callable[[], object]], rounds: int, moved: int) -> dict[str, float]:
    """Return the median MB/s of each side."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name in list(sides) if turn % 2 else list(reversed(sides)):
            begun = time.perf_counter()
            sides[name]()
            if turn:  # the first warms up
                rates[name].append(moved / (time.perf_counter() - begun) / 1e6)
    return {name: median(each) for name, each in rates.items()}


def shuffled(block_bytes: int) -> list[int]:
    """Return where the blocks of a file begin, in an order that is none."""
    places = list(range(0, FILE_BYTES, block_bytes))
    random.Random(3).shuffle(places)
    return places


def lines(what: str, rates: Mapping[str, float], ours: str, **more: object) -> list[dict]:
    """Return each side's rate and its ratio to the side `ours`."""
    return [
        {"name": f"{what}, {name}", **more, "mb_per_s": round(rate, 1),
         "ratio": round(rate / rates[ours], 3)}
        for name, rate in rates.items()
    ]  # fmt: skip


class RawNixl:
    """One plug-in of NIXL without our backend around it."""

    def __init__(self, plugin: str, parameters: dict[str, str], length: int) -> None:
        self.binding = binding = load_binding()
        config = binding.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, 1000
        config.syncMode = binding.NIXL_THREAD_SYNC_STRICT
        self.name = f"bench-{os.urandom(8).hex()}"
        self.raw = binding.nixlAgent(self.name, config)
        self.handle = self.raw.createBackend(plugin, parameters)
        self.memory = np.frombuffer(mmap.mmap(-1, length), np.uint8)
        self.memory[:] = np.frombuffer(random.Random(1).randbytes(length), np.uint8)
        self.address = self.memory.ctypes.data
        self.register(binding.DRAM_SEG, [(self.address, length, 0, "")])

    def register(self, kind: Any, rows: list[tuple[int, int, int, str]]) -> None:
        """Register with the plug-in."""
        self.raw.registerMem(self.binding.nixlRegDList(kind, rows), [self.handle])

    def post(self, near: list, far: list, kind: Any, *, write: bool) -> None:
        """Move rows of (address or offset, length, device) in one request, and wait."""
        binding = self.binding
        request = self.raw.createXferReq(
            binding.NIXL_WRITE if write else binding.NIXL_READ,
            binding.nixlXferDList(binding.DRAM_SEG, np.array(near, np.uint64)),
            binding.nixlXferDList(kind, np.array(far, np.uint64)),
            self.name,
            "",
            [self.handle],
        )
        status = self.raw.postXferReq(request)
        while status == binding.NIXL_IN_PROG:
            time.sleep(0.0001)
            status = self.raw.getXferStatus(request)
        self.raw.releaseXferReq(request)
        assert status == binding.NIXL_SUCCESS, status


class BareFile(RawNixl):
    """The POSIX plug-in, all blocks in one request."""

    def __init__(self, queue: dict[str, str], path: Path) -> None:
        super().__init__("POSIX", queue, FILE_BYTES)
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        os.posix_fallocate(self.descriptor, 0, FILE_BYTES)
        self.register(self.binding.FILE_SEG, [(0, FILE_BYTES, self.descriptor, "")])

    def move(self, block_bytes: int, *, write: bool) -> None:
        """Move the whole file in blocks, in the same order as the others."""
        near = [(self.address + at, block_bytes, 0) for at in shuffled(block_bytes)]
        far = [(at, block_bytes, self.descriptor) for at in shuffled(block_bytes)]
        self.post(near, far, self.binding.FILE_SEG, write=write)


# -- files -----------------------------------------------------------------------------------------


class FileSide:
    """One mover, and its own direct file."""

    def __init__(self, make: Callable[..., Any], path: Path) -> None:
        self.told = threading.Event()
        self.backend = make(notify=self.told.set)
        self.plain = os.open(path, os.O_RDWR | os.O_CREAT)
        self.direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        os.posix_fallocate(self.plain, 0, FILE_BYTES)
        ours = isinstance(self.backend, PosixBackend)  # NIXL takes the descriptor as it is
        self.file = FileRegion(self.plain, self.direct) if ours else FileRegion(self.direct)
        self.memory = MemoryRegion(memoryview(mmap.mmap(-1, FILE_BYTES)), page_aligned=True)
        self.memory.view[:] = random.Random(1).randbytes(FILE_BYTES)

    def move(self, block_bytes: int, *, write: bool) -> None:
        """Move the whole file in blocks, in an order that is none."""
        ops = [CopyOp(at, at, block_bytes, nr) for nr, at in enumerate(shuffled(block_bytes))]
        ends = (self.memory, self.file) if write else (self.file, self.memory)
        self.told.clear()
        assert self.backend.submit(1, ops, *ends)
        while not (found := self.backend.poll()):
            assert self.told.wait(60), "no answer"
            self.told.clear()
        if found[0].outcome is not Outcome.DONE:
            raise OSError(found[0].reason)
        assert not self.file.health.direct_refusals


def measure_files(directory: Path, rounds: int) -> tuple[list[dict], dict[str, str]]:
    """Return reads and writes at three block sizes, and the queues that did not work."""
    makers: dict[str, Callable[..., Any]] = {
        f"threads {count}": lambda notify, count=count: PosixBackend(threads=count, notify=notify)
        for count in (4, 8)
    }
    for name, queue in QUEUES.items():
        makers[name] = lambda notify, queue=queue: NixlBackend(
            NixlAgent({"POSIX": queue}), timeout_s=30, notify=notify
        )
    sides, broken, found = {}, {}, []
    for name in [*makers, "bare aio", "bare io_uring"]:
        path = directory / name.replace(" ", "-")
        try:
            if name in makers:
                side: FileSide | BareFile = FileSide(makers[name], path)
            else:
                side = BareFile(QUEUES[name.replace("bare", "nixl")], path)
            side.move(MIB, write=True)
            sides[name] = side
        except Exception as error:  # noqa: BLE001  whatever it is, it is told
            broken[name] = str(error)
    for block in (256 << 10, MIB, 4 * MIB):
        for write in (True, False):
            calls = {
                name: lambda side=side, block=block, write=write: side.move(block, write=write)
                for name, side in sides.items()
            }
            what = f"{'write' if write else 'read'} {block >> 10} KiB"
            rates = race(calls, rounds, FILE_BYTES)
            found += lines(what, rates, "threads 8", block_bytes=block)
    for side in sides.values():
        if isinstance(side, FileSide):
            side.backend.close()
    return found, broken


# -- objects ---------------------------------------------------------------------------------------


class NixlObjects(RawNixl):
    """An object plug-in of NIXL, bare: one request of many moves."""

    def __init__(self, plugin: str, parameters: dict[str, str], names: list[str]) -> None:
        super().__init__(plugin, parameters, MIB * len(names))
        self.count = len(names)
        rows = [(0, 2 * MIB, number, name) for number, name in enumerate(names)]
        self.register(self.binding.OBJ_SEG, rows)

    def move(self, *, write: bool, at_once: int, length: int = MIB, count: int = 0) -> None:
        """Move every block, so many in a request as may be under way."""
        for first in range(0, count or self.count, at_once):
            numbers = range(first, min(first + at_once, count or self.count))
            near = [(self.address + number * MIB, length, 0) for number in numbers]
            far = [(0, length, number) for number in numbers]
            self.post(near, far, self.binding.OBJ_SEG, write=write)

    def tell_short_read(self) -> str:
        """Read twice an object's length."""
        self.memory[MIB : 2 * MIB] = 0xEE
        try:
            self.move(write=False, at_once=1, length=2 * MIB, count=1)
        except Exception as error:  # noqa: BLE001
            return f"refused: {error}"
        kept = bool((self.memory[MIB : 2 * MIB] == 0xEE).all())
        return "success, the rest of the buffer untouched" if kept else "success"


class BareObjects:
    """obstore alone."""

    def __init__(self, client: Any, names: list[str]) -> None:
        self.client, self.names = client, names
        self.memory = mmap.mmap(-1, MIB * len(names))
        self.view = memoryview(self.memory)
        self.view[:] = random.Random(1).randbytes(len(self.view))
        self.bytes = np.frombuffer(self.memory, np.uint8)

    def move(self, *, write: bool, at_once: int) -> None:
        """Move every block, so many at once."""
        asyncio.run(self._all(self._put if write else self._get, at_once))

    async def _all(self, one: Callable, at_once: int) -> None:
        some = asyncio.Semaphore(at_once)

        async def bounded(place: int, name: str) -> None:
            async with some:
                await one(place * MIB, name)

        await asyncio.gather(*(bounded(place, name) for place, name in enumerate(self.names)))

    async def _put(self, at: int, name: str) -> None:
        part = self.view[at : at + MIB]
        await obstore.put_async(self.client, name, part, use_multipart=False)

    async def _get(self, at: int, name: str) -> None:
        found = await obstore.get_async(self.client, name)
        np.copyto(self.bytes[at : at + MIB], np.frombuffer(await found.bytes_async(), np.uint8))


def measure_objects(
    plugin: str, parameters: dict[str, str], client: Any, rounds: int
) -> tuple[list[dict], str]:
    """Return puts and gets at two concurrencies, and what a read too long comes to."""
    names = [f"nixl/{number}" for number in range(64)]
    told, found = "", []
    for at_once in (8, 32):
        nixl = NixlObjects(plugin, {**parameters, "num_threads": str(at_once)}, names)
        bare = BareObjects(client, [name.replace("nixl", "bare") for name in names])
        for write in (True, False):
            calls = {
                each: lambda side=side, write=write, at_once=at_once: side.move(
                    write=write, at_once=at_once
                )
                for each, side in (("obstore", bare), (plugin, nixl))
            }
            what = f"{plugin} {'put' if write else 'get'}, {at_once} at once"
            found += lines(what, race(calls, rounds, 64 * MIB), "obstore", block_bytes=MIB)
        told = nixl.tell_short_read()
    return found, told


def s3(folder: Path, rounds: int) -> tuple[list[dict], str]:
    """Measure OBJ against a server of our own."""
    with RcloneServer(folder) as server:
        keys = {"access_key_id": server.access_key, "secret_access_key": server.secret_key}
        client = S3Store(
            BUCKET, endpoint=server.endpoint, region="us-east-1", **keys,
            virtual_hosted_style_request=False, client_options={"allow_http": True},
        )  # fmt: skip
        parameters = {
            "access_key": server.access_key, "secret_key": server.secret_key, "bucket": BUCKET,
            "endpoint_override": server.endpoint, "scheme": "http", "region": "us-east-1",
            "use_virtual_addressing": "false", "req_checksum": "required",
        }  # fmt: skip
        return measure_objects("OBJ", parameters, client, rounds)


def azure(folder: Path, rounds: int) -> tuple[list[dict], str]:
    """Measure AZURE_BLOB against a server of our own."""
    with AzuriteServer(folder) as server:
        account = server.environment["AZURE_STORAGE_ACCOUNT_NAME"]
        key = server.environment["AZURE_STORAGE_ACCOUNT_KEY"]
        client = AzureStore(
            CONTAINER, endpoint=server.endpoint, account_name=account, account_key=key,
            client_options={"allow_http": True},
        )  # fmt: skip
        joined = (
            f"DefaultEndpointsProtocol=http;AccountName={account};AccountKey={key};"
            f"BlobEndpoint={server.endpoint};"
        )
        parameters = {"connection_string": joined, "container_name": CONTAINER}
        return measure_objects("AZURE_BLOB", parameters, client, rounds)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one round; only shows that it works")
    parser.add_argument("--directory", type=Path, help="where files go; on a disk, not in memory")
    options = parser.parse_args()
    os.environ.setdefault("AWS_RETRY_MODE", "standard")  # else NIXL waits 25 s for a dead server
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "2")
    rounds = 1 if options.quick else 7
    notes: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        paths, notes["queues that do not work"] = measure_files(Path(folder), rounds)
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108  the disk is not asked
    for name, measure in (("OBJ", s3), ("AZURE_BLOB", azure)):
        if name == "AZURE_BLOB" and find_azurite() is None:
            notes[name] = "not measured: no azurite-blob on the path"
            continue
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=place))
            try:
                found, notes[f"{name}, a read of twice an object's length"] = measure(
                    Path(folder), rounds
                )
                paths += found
            except Exception as error:  # noqa: BLE001  whatever it is, it is told
                notes[name] = f"{type(error).__name__}: {error}"
    for line in paths:
        print(f"{line['name']:40} {line['mb_per_s']:8.1f} MB/s  ratio {line['ratio']:.2f}")
    print(json.dumps(notes, indent=1))
    if options.json:
        options.json.write_text(json.dumps({"paths": paths, "notes": notes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
