"""Blocks between two processes: our peer path beside bare NIXL, same memory, same descriptors.

Bare NIXL makes one request of all descriptors, posts it and spins until it is done; ours goes
through the backend's queue, thread and completion. Both run in the same pair of processes, in
turns. The other process is this module, started with `--serve`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import numpy as np

from kvstrata.apps.cli.bench.turns import PathRow, path_of, take_turns, timed
from kvstrata.core.ids import TransferId
from kvstrata.storage.base import MemoryRegion
from kvstrata.transfer.backends.nixl import NixlAgent, NixlBackend, PeerMemory, load_binding
from kvstrata.transfer.backends.nixl.invitation import decode_invitation
from kvstrata.transfer.base import CopyOp, Outcome

__all__ = ["LENGTH", "SIZES", "allocate", "measure_peer", "peer_invitation", "peer_memory"]

BLOCKS: Final = 64
SIZES: Final = (256 << 10, 1 << 20, 4 << 20)
"""Lengths of blocks that fit the memory of both processes."""
LENGTH: Final = BLOCKS * max(SIZES)
TIMEOUT_S: Final = 30.0


def _serve() -> None:
    """Be the other process: export memory full of numbers until stdin ends."""
    agent = NixlAgent()
    region, array = allocate()
    array[:] = np.random.default_rng(1).integers(0, 256, LENGTH, np.uint8)
    print(agent.export({"arena": region}).hex(), flush=True)
    sys.stdin.read()
    os._exit(0)


def allocate() -> tuple[MemoryRegion, np.ndarray[Any, Any]]:
    """Return memory that is really there."""
    mapped = mmap.mmap(-1, LENGTH)
    array = np.frombuffer(mapped, np.uint8)
    array[:] = 0
    return MemoryRegion(memoryview(mapped)), array


@contextlib.contextmanager
def peer_invitation() -> Iterator[bytes]:
    """Start the other process; yield how to reach its memory, and kill it afterwards."""
    child = subprocess.Popen(
        [sys.executable, "-m", "kvstrata.apps.cli.bench.peer", "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None, "it was asked for"
        yield bytes.fromhex(child.stdout.readline().decode())
    finally:
        child.kill()
        child.wait()


@contextlib.contextmanager
def peer_memory(backend: NixlBackend) -> Iterator[PeerMemory]:
    """Start the other process; yield its memory as `backend` reaches it."""
    with peer_invitation() as invitation:
        yield backend.agent.connect(invitation)["arena"]


class _Bare:
    """NIXL's binding with nothing around it."""

    def __init__(self, region: MemoryRegion, there: PeerMemory, metadata: bytes) -> None:
        self.binding = binding = load_binding()
        config = binding.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, 5000
        config.syncMode = binding.NIXL_THREAD_SYNC_STRICT
        self.agent = binding.nixlAgent("bare", config)
        self.handle = self.agent.createBackend("UCX", {})
        self.base = np.frombuffer(region.view, np.uint8).ctypes.data
        listed = binding.nixlRegDList(binding.DRAM_SEG, [(self.base, LENGTH, 0, "")])
        self.agent.registerMem(listed, [self.handle])
        self.agent.loadRemoteMD(metadata)
        self.there = there

    def move(self, ops: list[CopyOp], *, read: bool) -> int:
        """Move all ops in one request; return how many."""
        binding, agent = self.binding, self.agent
        local = np.array([(op.target_offset, op.length, 0) for op in ops], np.uint64)
        far = np.array([(op.source_offset, op.length, 0) for op in ops], np.uint64)
        local[:, 0] += np.uint64(self.base)
        far[:, 0] += np.uint64(self.there.address)
        request = agent.createXferReq(
            binding.NIXL_READ if read else binding.NIXL_WRITE,
            binding.nixlXferDList(binding.DRAM_SEG, local),
            binding.nixlXferDList(binding.DRAM_SEG, far),
            self.there.peer,
            "",
            [self.handle],
        )
        status = agent.postXferReq(request)
        while status == binding.NIXL_IN_PROG:
            status = agent.getXferStatus(request)
        agent.releaseXferReq(request)
        return len(ops)


class _Ours:
    """The backend, as the executor uses it: submit, be woken, poll."""

    def __init__(self, region: MemoryRegion, backend: NixlBackend, there: PeerMemory) -> None:
        self.region, self.backend, self.there = region, backend, there
        self.backend.agent.hold(region)  # as an arena is, for good
        self.name = 0

    def move(self, ops: list[CopyOp], told: threading.Event, *, read: bool) -> int:
        """Move all ops in one transfer; return how many arrived."""
        self.name += 1
        told.clear()
        ends = (self.there, self.region) if read else (self.region, self.there)
        turned = (
            ops if read else [CopyOp(op.target_offset, op.source_offset, op.length) for op in ops]
        )
        assert self.backend.submit(TransferId(self.name), turned, *ends)
        assert told.wait(TIMEOUT_S), "no completion"
        (completion,) = self.backend.poll()
        assert completion.outcome is Outcome.DONE, completion
        return len(ops)


def measure_peer(rounds: int, sizes: Sequence[int] = (1 << 20,)) -> list[PathRow]:
    """Start the other process; return a line for each direction and block size.

    Raises ConfigError where NIXL is not installed.
    """
    load_binding()
    told = threading.Event()
    backend = NixlBackend(notify=told.set, timeout_s=TIMEOUT_S)
    with contextlib.closing(backend), peer_invitation() as invitation:
        there = backend.agent.connect(invitation)["arena"]
        region, array = allocate()
        bare = _Bare(region, there, decode_invitation(invitation).metadata)
        ours = _Ours(region, backend, there)
        paths = []
        for block_bytes in sizes:
            places = np.random.default_rng(2).permutation(BLOCKS)
            ops = [
                CopyOp(int(place) * block_bytes, index * block_bytes, block_bytes, index)
                for index, place in enumerate(places)
            ]
            for read in (True, False):
                both: dict[str, Callable[[], int]] = {
                    "ours": partial(ours.move, ops, told, read=read),
                    "limit": partial(bare.move, ops, read=read),
                }
                if read:
                    _check(both, array, ops)
                size = block_bytes * BLOCKS
                samples = take_turns(
                    {name: partial(timed, size, move) for name, move in both.items()}, rounds
                )
                name = f"peer {'pull' if read else 'push'}, {BLOCKS} blocks"
                paths.append(
                    path_of(name, block_bytes, samples["ours"], samples["limit"], "raw NIXL, UCX")
                )
        return paths


def _check(
    both: dict[str, Callable[[], int]], array: np.ndarray[Any, Any], ops: list[CopyOp]
) -> None:
    """Both must bring the same bytes, and not by leaving them there."""
    found = []
    for move in both.values():
        array[:] = 0
        move()
        found.append([array[op.target_offset :][: op.length].copy() for op in ops])
    for one, other in zip(*found, strict=True):
        assert one.any()
        assert (one == other).all()


if __name__ == "__main__":
    _serve()
