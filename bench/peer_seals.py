"""What verifying costs an arrival from a peer: pulls by NIXL, sealed and not.

    python bench/peer_seals.py [--json FILE] [--rounds N]

64 blocks of 1 MiB are pulled from another process to random places, in jobs of so many blocks that
are all submitted at once. `sealed` hands each job that has arrived to the sealer, as the executor
does for a mover that does not seal on the way, and ends when the last seal is there and is the one
that the other process's bytes have. `bare` ends when the last job has arrived. Both in every round,
in an order that changes; the slowdown is the median of the rounds' own. Over shared address spaces
(`cma`) and over sockets (`tcp`), each in a process of its own, since UCX reads its settings once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from kvstrata.apps.cli.bench.peer import LENGTH, allocate, peer_memory
from kvstrata.core.ids import TransferId
from kvstrata.storage.seal import seal
from kvstrata.transfer.backends.nixl import NixlBackend
from kvstrata.transfer.backends.nixl.binding import nixl_version
from kvstrata.transfer.backends.sealer import SealerBackend, SealRequest
from kvstrata.transfer.base import CopyOp, Outcome

MIB = 1 << 20
BLOCKS = 64
PLACES = LENGTH // MIB
RESULTS = Path(__file__).parent / "results" / "peer-seals.json"
TRANSPORTS = {"cma": {}, "tcp": {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}}
TIMEOUT_S = 30


class Arrival:
    """Memory here, memory of another process, NIXL between them and the sealer behind it."""

    def __init__(
        self, there: Any, backend: NixlBackend, news: queue.SimpleQueue[None], threads: int
    ) -> None:
        self.there, self.backend, self.news = there, backend, news
        self.sealer = SealerBackend(threads=threads, notify=lambda: news.put(None))
        self.region, array = allocate()
        backend.agent.hold(self.region)  # as an arena is, for good
        self.array = array
        self.luck = random.Random(1)
        theirs = np.random.default_rng(1).integers(0, 256, LENGTH, np.uint8)
        self.bindings = [self.luck.randbytes(32) for _ in range(PLACES)]
        self.wanted = [
            seal(binding, memoryview(theirs)[at * MIB : (at + 1) * MIB])
            for at, binding in enumerate(self.bindings)
        ]

    def run(self, job_blocks: int, *, sealed: bool) -> tuple[float, float]:
        """Bring 64 blocks in; return wall and processor seconds."""
        sources = self.luck.sample(range(PLACES), BLOCKS)
        targets = self.luck.sample(range(PLACES), BLOCKS)
        pairs = list(zip(sources, targets, strict=True))
        jobs = [pairs[at : at + job_blocks] for at in range(0, BLOCKS, job_blocks)]
        seals = [[b""] * len(job) for job in jobs]
        began, worked = time.perf_counter(), time.process_time()
        for name, job in enumerate(jobs):
            ops = [CopyOp(a * MIB, b * MIB, MIB, at) for at, (a, b) in enumerate(job)]
            assert self.backend.submit(TransferId(name), ops, self.there, self.region)
        left = len(jobs)
        while left:
            self.news.get(timeout=TIMEOUT_S)
            for done in self.backend.poll():
                assert done.outcome is Outcome.DONE, done
                if not sealed:
                    left -= 1
                    continue
                job = jobs[done.transfer]
                ops = [CopyOp(b * MIB, 0, MIB, at) for at, (_, b) in enumerate(job)]
                bindings = tuple(self.bindings[a] for a, _ in job)
                request = SealRequest(self.region, bindings, seals[done.transfer])
                assert self.sealer.submit(done.transfer, ops, request, None)
            for done in self.sealer.poll():
                wanted = [self.wanted[a] for a, _ in jobs[done.transfer]]
                assert seals[done.transfer] == wanted, "other bytes came than the peer has"
                left -= 1
        return time.perf_counter() - began, time.process_time() - worked


@contextlib.contextmanager
def arrivals(threads: int) -> Iterator[Arrival]:
    """Start the other process and both backends."""
    news: queue.SimpleQueue[None] = queue.SimpleQueue()
    backend = NixlBackend(notify=lambda: news.put(None), timeout_s=TIMEOUT_S)
    with peer_memory(backend) as there:
        made = Arrival(there, backend, news, threads)
        try:
            yield made
        finally:
            made.sealer.close()
            backend.close()


def measure(transport: str, rounds: int) -> list[dict[str, Any]]:
    """Return a line for each number of sealing threads and length of a job."""
    lines = []
    for threads in (1, 2):
        with arrivals(threads) as arrival:
            for job_blocks in (4, 16):
                taken: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
                for turn in range(-2, rounds):
                    for sealed in (bool(turn % 2), not turn % 2):
                        took = arrival.run(job_blocks, sealed=sealed)
                        if turn >= 0:
                            taken[sealed].append(took)
                lines.append(line(transport, threads, job_blocks, taken))
                print(lines[-1], file=sys.stderr, flush=True)
    return lines


def line(
    transport: str, threads: int, job_blocks: int, taken: dict[bool, list[tuple[float, float]]]
) -> dict[str, Any]:
    """Return the medians of one setting."""
    pairs = list(zip(taken[True], taken[False], strict=True))
    size = BLOCKS * MIB / 1e9
    bare, ours = (median(wall for wall, _ in taken[side]) for side in (False, True))
    return {
        "transport": transport,
        "seal_threads": threads,
        "job_blocks": job_blocks,
        "rounds": len(pairs),
        "bare_gb_per_s": round(size / bare, 3),
        "bare_quickest_gb_per_s": round(size / min(taken[False])[0], 3),
        "sealed_gb_per_s": round(size / ours, 3),
        "slowdown": round(median(one[0] / other[0] for one, other in pairs) - 1, 4),
        "slowdown_of_medians": round(ours / bare - 1, 4),
        "slowdown_of_quickest": round(min(taken[True])[0] / min(taken[False])[0] - 1, 4),
        "bare_cpu_ms_per_block": round(1000 * median(cpu for _, cpu in taken[False]) / BLOCKS, 3),
        "seal_cpu_ms_per_block": round(
            1000 * median(one[1] - other[1] for one, other in pairs) / BLOCKS, 3
        ),
    }


def main() -> int:
    """Measure each transport in a process of its own, print, write JSON."""
    parser = argparse.ArgumentParser(description="What verifying costs an arrival from a peer.")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--transport", choices=list(TRANSPORTS), help="this one, to stdout")
    given = parser.parse_args()
    if given.transport:
        print(json.dumps(measure(given.transport, given.rounds)))
        return 0
    load = [round(os.getloadavg()[0], 2)]
    lines = []
    for transport, variables in TRANSPORTS.items():
        command = [sys.executable, __file__, "--rounds", str(given.rounds)]
        done = subprocess.run(
            [*command, "--transport", transport],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            check=True,
        )
        lines += json.loads(done.stdout)
    load.append(round(os.getloadavg()[0], 2))
    told = {
        "cores": os.cpu_count(),
        "load_average": load,
        "nixl": nixl_version(),
        "blocks": BLOCKS,
        "block_bytes": MIB,
        "arrivals": lines,
    }
    given.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
