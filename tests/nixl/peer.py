"""The other process of the two-process tests: takes orders on stdin, answers on stdout."""

from __future__ import annotations

import json
import mmap
import sys
import time

import numpy as np

from kvstrata.storage.base import MemoryRegion
from kvstrata.transfer.backends.nixl import NixlAgent, NixlBackend
from kvstrata.transfer.base import CopyOp

PIECE = 1 << 20


def say(answer):
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    length, value = int(sys.argv[1]), int(sys.argv[2])
    backend = NixlBackend(NixlAgent(), timeout_s=60)
    memory = mmap.mmap(-1, length)
    array = np.frombuffer(memory, np.uint8)
    array[:] = value
    mine = MemoryRegion(memoryview(memory))
    there = None
    say(backend.agent.export({"arena": mine}).hex())
    for line in sys.stdin:
        order = json.loads(line)
        answer = None
        match order["do"]:
            case "connect":
                there = backend.agent.connect(bytes.fromhex(order["invitation"]))["arena"]
            case "push" | "pull":
                ops = [CopyOp(at, at, PIECE) for at in range(0, length, PIECE)]
                ends = (mine, there) if order["do"] == "push" else (there, mine)
                assert backend.submit(order["name"], ops, *ends)
            case "wait":
                end = time.monotonic() + order["timeout_s"]
                while not (found := backend.poll()) and time.monotonic() < end:
                    time.sleep(0.001)
                answer = [each.outcome.value for each in found]
            case "count":
                answer = int(np.count_nonzero(array == order["value"]))
        say(answer)


if __name__ == "__main__":
    main()
