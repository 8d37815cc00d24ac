"""Hits on disk for part `ttft` of `gpu.py`: a daemon with a slab, its arena page-locked here.

What is timed begins with the question for the prompt's tokens and ends with the first token: the
daemon reads the blocks from its slab into the arena, and from there they go to the device layer by
layer. Before each round the host tier is cleared, so every block comes from the disk.
"""

from __future__ import annotations

import os
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_machine import Machine

from kvstrata.core.errors import ConfigError
from kvstrata.transfer.cuda.pagelock import PageLock
from kvstrata.transfer.cuda.tables import RunTable

SOURCES = Path(__file__).resolve().parent.parent / "src"
STAGING_TIMEOUT_S = 120.0


class DiskTier:
    """A private daemon over one directory, and its arena. Owner: the thread that made it."""

    def __init__(
        self, machine: Machine, directory: Path, *, block_tokens: int, shape: tuple[int, int],
        blocks: int,
    ) -> None:  # fmt: skip
        """Start the daemon; `shape` is (parts, bytes) of a block, `blocks` what a tier must hold.

        ConfigError if a package that the daemon needs is missing, or the arena cannot be locked.
        """
        os.environ["PYTHONPATH"] = f"{SOURCES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        try:
            from kvstrata.core.config import Limits, NodeConfig, parse_tiers
            from kvstrata.layout import BlockLayout, Dimension
            from kvstrata.runtime.session import Session, SessionLimits
            from kvstrata.storage.arena import Arena
            from kvstrata.tokens import Namespace
            from kvstrata.tokens.namespace import ModelKey, salted_key
        except ImportError as error:
            raise ConfigError(
                f"no daemon: {error}", hint="install kvstrata with its dependencies"
            ) from error
        self.machine, self.shape, self.block_tokens = machine, shape, block_tokens
        self.layout = BlockLayout(
            (Dimension("part", shape[0]), Dimension("byte", shape[1])), "uint8", block_tokens,
            "array",
        )  # fmt: skip
        slot = -(-self.layout.block_bytes // 4096) * 4096 + 4096
        room = (blocks + 8) * slot + (1 << 20)
        limits = Limits(staging_timeout_s=STAGING_TIMEOUT_S)
        tiers = parse_tiers(f"host:{room},disk:{directory}:{2 * room + (64 << 20)}")
        space = Namespace("bench", "", "", "uint8", self.layout.geometry, block_tokens)
        self.session = Session(
            NodeConfig(tiers, None, limits), self.layout, space,
            SessionLimits(call_timeout_s=60.0, start_timeout_s=120.0),
        )  # fmt: skip
        welcome = self.session.open()
        self.key = salted_key(ModelKey(welcome.model_key), "")
        self.arena = Arena.attach(welcome.arena, self.layout)
        view = np.frombuffer(self.arena.region.view, np.uint8)
        self.address, self._lock = int(view.ctypes.data), None
        if not machine.dry:
            self._lock = PageLock(machine.streams, self.address, len(view))
            try:
                self._lock.open()
            except ConfigError:
                self.close()
                raise
        self._names = map(str, count())
        self._held, self._promised = "", [(0, 0)]

    def keep(self, tokens: list[int], host: torch.Tensor) -> None:
        """Store the blocks of `host`, `[blocks, parts, bytes]`, and wait until all are on disk."""
        from kvstrata.runtime import messages as wire
        from kvstrata.runtime.admin import wait_until_idle

        hashes, name = self._hashes(tokens), next(self._names)
        assert len(hashes) == len(host), f"{len(hashes)} names of {len(host)} blocks"
        reserved = self.session.reserve(name, None, hashes)
        assert len(reserved.slots) == len(host), "the host tier has too few slots"
        for index, slot in zip(reserved.indices, reserved.slots, strict=True):
            block = np.frombuffer(self.arena.slot(slot), np.uint8).reshape(self.shape)
            block[...] = host[index].numpy()
        self.session.seal(name, reserved.slots)
        wait_until_idle(lambda: self.session.call(wire.Stats(), wire.StatsAnswer).stats, 300.0)

    def forget_host(self) -> None:
        """Let go of what is held, and forget what is in the host: the disk keeps it."""
        from kvstrata.runtime import messages as wire

        if self._held:
            self.session.release([self._held])
            self._held = ""
        self.session.call(wire.Clear(["host"]), wire.Cleared)

    def fetch(self, tokens: list[int]) -> tuple[list[int], dict[str, int], float]:
        """Return the slots of all blocks, held, from where they came, and seconds of reading."""
        hashes, self._held, began = self._hashes(tokens), next(self._names), time.perf_counter()
        while (found := self.session.lookup(self._held, hashes)).pending:
            time.sleep(0.0005)
        assert found.ready == len(hashes), f"{found.ready} of {len(hashes)} blocks: {found.why}"
        acquired = self.session.acquire(self._held, hashes)
        self._promised = list(zip(acquired.slots, acquired.generations, strict=True))
        return acquired.slots, dict(acquired.staged), time.perf_counter() - began

    def check(self) -> None:
        """Raise if a slot was given to another block since `fetch`: what was copied is void."""
        generations = self.arena.generations
        assert all(generations[slot] == promised for slot, promised in self._promised), (
            "a slot was given away while it was held"
        )

    def tables(self, slots: list[int], case: Any) -> list[RunTable]:
        """Return the runs from these slots to the pages of `case`, layer by layer."""
        grid, found = self.arena.grid, []
        starts = np.array(slots, np.int64) * grid.stride_bytes + grid.base_bytes + self.address
        for layer, table in enumerate(case.tables("to_device")):
            parts = np.arange(layer * case.per_layer, (layer + 1) * case.per_layer)[:, None]
            sources = (starts + parts * case.run_bytes).ravel()
            found.append(RunTable(sources, table.targets, table.lengths))
        return found

    def close(self) -> None:
        """Unlock, and end the daemon."""
        self.machine.sync()
        if self._lock:
            self._lock.close()
        self.arena.close()
        self.session.close()

    def _hashes(self, tokens: list[int]) -> list[Any]:
        from kvstrata.tokens import lineage_digests, sequence_hashes

        return list(sequence_hashes(self.key, lineage_digests(tokens, self.block_tokens)))


def place(chosen: Path | None) -> Path:
    """Return a new directory for a slab: in `chosen`, else in the checkout, which is no tmpfs."""
    root = chosen or Path(__file__).resolve().parent.parent / "build"
    root.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="gpu-disk-", dir=root))
