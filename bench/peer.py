"""Blocks between two processes: our peer path beside bare NIXL, same memory, same descriptors.

    python bench/peer.py [--json FILE] [--tcp] [--rounds 15]

Bare NIXL makes one request of all descriptors, posts it and spins until it is done; ours goes
through the backend's queue, thread and completion. Both run in the same pair of processes, in
turns. `ours` and `limit` are GB/s by the median round, `ratio` is ours over the limit.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from interleave import interleave

from kvstrata.core.ids import TransferId
from kvstrata.storage.base import MemoryRegion
from kvstrata.transfer.backends.nixl import NixlAgent, NixlBackend, PeerMemory, load_binding
from kvstrata.transfer.base import CopyOp, Outcome

BLOCKS = 64
SIZES = (256 << 10, 1 << 20, 4 << 20)
LENGTH = BLOCKS * max(SIZES)
TIMEOUT_S = 30.0


def serve() -> None:
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


class Bare:
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


class Ours:
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


def measure(rounds: int) -> list[dict[str, Any]]:
    """Start the other process; return one line per direction and block size."""
    told = threading.Event()
    backend = NixlBackend(notify=told.set, timeout_s=TIMEOUT_S)
    child = subprocess.Popen(
        [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    from kvstrata.transfer.backends.nixl.invitation import decode_invitation

    invitation = bytes.fromhex(child.stdout.readline().decode())
    there = backend.agent.connect(invitation)["arena"]
    region, array = allocate()
    bare = Bare(region, there, decode_invitation(invitation).metadata)
    ours = Ours(region, backend, there)
    paths = []
    for block_bytes in SIZES:
        places = np.random.default_rng(2).permutation(BLOCKS)
        ops = [
            CopyOp(int(place) * block_bytes, index * block_bytes, block_bytes, index)
            for index, place in enumerate(places)
        ]
        for read in (True, False):
            both: dict[str, Callable[[], int]] = {
                "ours": lambda read=read, ops=ops: ours.move(ops, told, read=read),
                "limit": lambda read=read, ops=ops: bare.move(ops, read=read),
            }
            if read:
                _check(both, array, ops)
            costs = interleave(
                {name: lambda _, move=move: move for name, move in both.items()},
                blocks=BLOCKS,
                handled=BLOCKS,
                rounds=rounds,
            )
            speed = {name: block_bytes / cost.median / 1e3 for name, cost in costs.items()}
            paths.append(
                {
                    "name": "peer pull" if read else "peer push",
                    "block_bytes": block_bytes,
                    "ours": round(speed["ours"], 3),
                    "limit": round(speed["limit"], 3),
                    "ratio": round(speed["ours"] / speed["limit"], 3),
                }
            )
    child.kill()
    child.wait()
    backend.close()
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


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tcp", action="store_true", help="sockets only")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.tcp:
        os.environ["UCX_TLS"], os.environ["UCX_NET_DEVICES"] = "tcp", "lo"
    if given.serve:
        serve()
    paths = measure(given.rounds)
    print(f"{'path':<10} {'block':>9} {'ours GB/s':>10} {'NIXL GB/s':>10} {'ratio':>6}")
    for path in paths:
        print(
            f"{path['name']:<10} {path['block_bytes'] >> 10:>5} KiB {path['ours']:>10.2f} "
            f"{path['limit']:>10.2f} {path['ratio']:>6.2f}"
        )
    if given.json:
        given.json.write_text(json.dumps({"paths": paths}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
