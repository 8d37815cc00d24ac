"""What the NIXL wrapper's rules rest on, measured anew: run it when NIXL changes.

    python bench/nixl_facts.py

Bare NIXL, sockets only, two processes. Each line is a fact of docs/adr/0007-nixl.md.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import numpy as np

from kvstrata.transfer.backends.nixl import load_binding, nixl_version

LENGTH = 256 << 20
PIECE = 1 << 20


class Bare:
    """An agent, its memory, and the calls that the facts need."""

    def __init__(
        self, name: str, value: int, *, delay_us: int = 5000, length: int = LENGTH
    ) -> None:
        self.binding = binding = load_binding()
        config = binding.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, delay_us
        config.syncMode = binding.NIXL_THREAD_SYNC_STRICT
        self.name = name
        self.agent = binding.nixlAgent(name, config)
        self.handle = self.agent.createBackend("UCX", {})
        self.array = np.frombuffer(mmap.mmap(-1, length), np.uint8)
        self.array[:] = value
        self.base = self.array.ctypes.data

    def register(self, offset: int = 0, length: int = LENGTH) -> None:
        """Register a part of the memory."""
        rows = [(self.base + offset, length, 0, "")]
        listed = self.binding.nixlRegDList(self.binding.DRAM_SEG, rows)
        self.agent.registerMem(listed, [self.handle])

    def pull(self, peer: str, base: int, first: int, end: int) -> int:
        """Post a read of pieces `first` to `end`; return its handle."""
        rows = np.zeros((end - first, 3), np.uint64)
        rows[:, 0] = np.arange(first, end, dtype=np.uint64) * np.uint64(PIECE)
        rows[:, 1] = PIECE
        local, far = rows.copy(), rows
        local[:, 0] += np.uint64(self.base)
        far[:, 0] += np.uint64(base)
        kind = self.binding.DRAM_SEG
        lists = [self.binding.nixlXferDList(kind, each) for each in (local, far)]
        made: int = self.agent.createXferReq(
            self.binding.NIXL_READ, *lists, peer, "", [self.handle]
        )
        self.agent.postXferReq(made)
        return made

    def landed(self, value: int) -> float:
        """Return the share of the memory that holds `value`."""
        return float(np.count_nonzero(self.array[::4096] == value)) / (LENGTH // 4096)


def serve(name: str) -> None:
    """Be the process that is read from."""
    far = Bare(name, 7)
    far.register()
    print(far.agent.getLocalMD().hex(), far.base, flush=True)
    sys.stdin.read()
    os._exit(0)


def start(name: str) -> tuple[subprocess.Popen[bytes], bytes, int]:
    """Start the other process; return it, its metadata and where its memory is."""
    child = subprocess.Popen(
        [sys.executable, __file__, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    metadata, base = child.stdout.readline().split()
    return child, bytes.fromhex(metadata.decode()), int(base)


def late_bytes(how: str) -> None:
    """Stop the peer while it sends, give the request up, let the peer go on."""
    child, metadata, base = start(how)
    near = Bare("near " + how, 0)
    near.register()
    near.agent.loadRemoteMD(metadata)
    request = near.pull(how, base, 0, LENGTH // PIECE)
    time.sleep(0.02)
    child.send_signal(signal.SIGSTOP)
    time.sleep(0.3)
    if how == "removed":
        near.agent.invalidateRemoteMD(how)
        said = _raised(near.agent.getXferStatus, request)
    else:
        said = str(near.agent.releaseXferReq(request)).rpartition(".")[2]
    before = near.landed(7)
    child.send_signal(signal.SIGCONT)
    time.sleep(2)
    print(
        f"peer stopped, {how}: NIXL says {said}; landed {before:.0%}, "
        f"two seconds after the peer went on {near.landed(7):.0%}"
    )
    child.kill()
    child.wait()


def overlapping() -> None:
    """Register a part, then the whole."""
    agent = Bare("overlap", 0)
    agent.register(PIECE, 4096)
    agent.register()
    said = _raised(agent.pull, "overlap", agent.base, 4, 8)
    print(f"a part registered, then the whole; a move behind the part: {said}")


def flipped_bits() -> None:
    """Damage one bit of metadata, load it, then the right one; a process for each try."""
    child, metadata, _ = start("flipped")
    ends: Counter[str] = Counter()
    for at in range(0, len(metadata), 3):
        tried = subprocess.run(
            [sys.executable, __file__, "--flip", str(at), metadata.hex()],
            capture_output=True,
            text=True,
            check=False,
        )
        crash = f"the process died of signal {-tried.returncode}"
        ends[crash if tried.returncode else tried.stdout.strip()] += 1
    print("metadata with one flipped bit, then the right one:")
    for end, count in ends.most_common():
        print(f"  {count:4} {end}")
    child.kill()
    child.wait()


def flip(at: int, metadata: bytes) -> None:
    """Be the process of one try."""
    near = Bare(f"near {at}", 0, length=PIECE)
    damaged = bytearray(metadata)
    damaged[at] ^= 1
    first = _raised(near.agent.loadRemoteMD, bytes(damaged))
    again = _raised(near.agent.loadRemoteMD, metadata)
    time.sleep(0.05)
    print(f"damaged: {first}; right one: {again}", flush=True)
    os._exit(0)


def idle() -> None:
    """Compare progress delays."""
    for delay_us in (0, 1000, 5000):
        agent = Bare(f"idle {delay_us}", 0, delay_us=delay_us)
        begin = time.process_time()
        time.sleep(3)
        share = (time.process_time() - begin) / 3
        print(f"idle agent, progress delay {delay_us} us: {share:.1%} of a core")
        del agent.agent


def _raised(call: Any, *given: Any) -> str:
    try:
        call(*given)
    except Exception as error:  # noqa: BLE001 - what is raised is the answer
        return type(error).__name__
    return "nothing raised"


def main() -> None:
    """Print every fact."""
    os.environ.update(
        {
            "UCX_TLS": "tcp",
            "UCX_NET_DEVICES": "lo",
            "NIXL_LOG_LEVEL": "FATAL",
            "UCX_LOG_LEVEL": "fatal",
        }
    )
    if sys.argv[1:2] == ["--flip"]:
        flip(int(sys.argv[2]), bytes.fromhex(sys.argv[3]))
    if len(sys.argv) > 1:
        serve(sys.argv[1])
    print(f"NIXL {nixl_version()}")
    idle()
    overlapping()
    flipped_bits()
    for how in ("removed", "released"):
        late_bytes(how)
    os._exit(0)  # agents with requests in flight must not be torn down


if __name__ == "__main__":
    main()
