"""Copies that put each number elsewhere on the way, for parts `copies` and `exact` of `gpu.py`.

An engine's pages on one side, whole blocks of another layout in the arena on the other. The oracle
is the CPU's `plan_transform` with `apply_transform`. `triton` moves a rearrangement in one launch a
group; the other ways move the runs that it is, which are as short as a head's channels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from gpu_machine import DIRECTIONS, Machine

from kvstrata.layout import BlockLayout, Dimension, Shard, apply_transform, plan_transform
from kvstrata.layout.block import DTYPE_BYTES
from kvstrata.transfer.cuda.rearrange import Rearrangement, RearrangePlan

POISON = 0xEE
ORDERS = {
    "nhd": ("layer", "kv", "page", "token", "head", "channel"),
    "hnd": ("layer", "page", "kv", "head", "token", "channel"),
    "cross-layer": ("page", "layer", "kv", "token", "head", "channel"),
}


@dataclass(frozen=True)
class Kv:
    """The numbers of one block of a model; one head and no K and V is latent attention."""

    name: str
    layers: int
    heads: int
    channels: int
    tokens: int
    dtype: str
    latent: bool = False

    def layout(self, order: str, *, page: int, tensor: int = 1) -> BlockLayout:
        """Return the layout of the last of `tensor` shards."""
        sizes = {
            "layer": self.layers, "kv": 2, "page": self.tokens // page, "token": page,
            "head": self.heads // tensor, "channel": self.channels,
        }  # fmt: skip
        names = [n for n in ORDERS[order] if not (self.latent and n in {"kv", "head"})]
        dimensions = tuple(Dimension(name, sizes[name]) for name in names)
        return BlockLayout(dimensions, self.dtype, self.tokens, "bench", Shard(tensor - 1, tensor))


@dataclass(frozen=True)
class Pairing:
    """An engine's layout and the one that blocks are kept in."""

    kv: Kv
    engine: str
    engine_page: int
    kept: str
    kept_page: int
    tensor: int = 1

    @property
    def name(self) -> str:
        """What tells it apart."""
        shard = f" 1 of {self.tensor}" if self.tensor > 1 else ""
        return (
            f"{self.kv.name} {self.kv.dtype} {self.engine}/{self.engine_page}{shard} "
            f"- {self.kept}/{self.kept_page}"
        )


LLAMA = Kv("llama-3-8b", 32, 8, 128, 64, "bfloat16")
FP8 = Kv("llama-3-8b", 32, 8, 128, 64, "float8_e4m3fn")
MLA = Kv("deepseek-mla", 61, 1, 576, 64, "bfloat16", latent=True)
PAIRINGS = (
    Pairing(LLAMA, "nhd", 16, "hnd", 64),
    Pairing(LLAMA, "hnd", 16, "cross-layer", 16),
    Pairing(LLAMA, "nhd", 16, "nhd", 64, tensor=4),
    Pairing(FP8, "nhd", 32, "hnd", 16, tensor=2),
    Pairing(MLA, "nhd", 64, "cross-layer", 16),
)
TINY = (
    Pairing(Kv("tiny", 2, 4, 8, 32, "float16"), "nhd", 16, "hnd", 32),
    Pairing(Kv("tiny", 2, 4, 8, 32, "float32"), "hnd", 32, "cross-layer", 16, tensor=2),
    Pairing(Kv("tiny", 2, 4, 3, 16, "float8_e4m3fn"), "nhd", 16, "hnd", 16, tensor=4),
    Pairing(Kv("tiny-mla", 2, 1, 24, 32, "bfloat16", latent=True), "nhd", 16, "cross-layer", 32),
)


class Rearranged:
    """Scattered pages of an engine on the device, whole blocks of another layout in the arena."""

    def __init__(self, machine: Machine, pairing: Pairing, blocks: int) -> None:
        """Allocate, and cut both plans."""
        kv, self.machine, self.blocks = pairing.kv, machine, blocks
        self.engine = kv.layout(pairing.engine, page=pairing.engine_page, tensor=pairing.tensor)
        self.kept = kv.layout(pairing.kept, page=pairing.kept_page)
        order = [each.name for each in self.engine.dimensions]
        inner = min(order.index(name) for name in ("token", "head") if name in order)
        pieces = int(np.prod([each.size for each in self.engine.dimensions[:inner]]))
        self.piece_bytes = self.engine.block_bytes // pieces
        total = blocks * pieces + blocks * pieces // 8 + 1
        luck = np.random.default_rng(blocks)
        self.places = luck.permutation(total)[: blocks * pieces].reshape(blocks, pieces)
        self.cache = machine.empty(total, self.piece_bytes)
        self.host = machine.arena(blocks, self.kept.block_bytes)
        unit = DTYPE_BYTES[kv.dtype]
        plan = plan_transform(self.kept, self.engine)
        self.to_device_plan = plan
        there = RearrangePlan(
            plan, unit,
            source_piece_bytes=self.kept.block_bytes, target_piece_bytes=self.piece_bytes,
        )  # fmt: skip
        devices = self.places * self.piece_bytes + self.cache.data_ptr()
        hosts = np.arange(blocks)[:, None] * self.kept.block_bytes + self.host.data_ptr()
        # One plan serves both ways: what was kept comes back as it was.
        self.moves = {"to_device": there.at(hosts, devices)}
        self.moves["to_host"] = self.moves["to_device"].back()

    @property
    def total_bytes(self) -> int:
        """What one copy moves."""
        return self.blocks * self.engine.block_bytes

    def expected(self, direction: str) -> torch.Tensor:
        """Return what the whole target must hold by the CPU's transform, all else poison."""
        pages, kept = self.cache.cpu().numpy(), self.host.numpy()
        wanted = np.full_like(pages if direction == "to_device" else kept, POISON)
        for block, places in enumerate(self.places):
            if direction == "to_device":
                made = bytearray(self.engine.block_bytes)
                apply_transform(self.to_device_plan, kept[block].tobytes(), made, self.engine.dtype)
                wanted[places] = np.frombuffer(made, np.uint8).reshape(-1, self.piece_bytes)
                continue
            back = [_turned(copy) for copy in self.to_device_plan]
            row = bytearray(wanted[block].tobytes())
            apply_transform(back, pages[places].tobytes(), row, self.engine.dtype)
            wanted[block] = np.frombuffer(row, np.uint8)
        return torch.from_numpy(wanted)


def _turned(copy: Any) -> Any:
    return type(copy)(
        copy.target_offset, copy.source_offset, copy.counts, copy.target_strides,
        copy.source_strides,
    )  # fmt: skip


def ways(machine: Machine) -> dict[str, Any]:
    """Return a pair of copiers for each way there is."""
    return {name: [machine.copier(name) for _ in DIRECTIONS] for name in machine.movers}


def go(machine: Machine, copiers: list[Any], direction: str, moves: Rearrangement) -> float:
    """Copy, wait for the end, and return the seconds that giving it to the device took."""
    copier, began = copiers[DIRECTIONS.index(direction)], time.perf_counter()
    ticket = copier.submit([moves], machine.engine_stream)
    spent = time.perf_counter() - began
    while not copier.poll():
        pass
    if ticket.error:
        raise ticket.error
    return spent


def check_rearranged(machine: Machine) -> int:
    """Copy random bytes into poison, every pairing and way; raise at the first wrong byte."""
    checked, all_ways = 0, ways(machine)
    for pairing in TINY if machine.dry else (*TINY, *PAIRINGS):
        case = Rearranged(machine, pairing, 3)
        for name, copiers in all_ways.items():
            for direction in DIRECTIONS:
                sides = (case.cache, case.host)
                source, target = sides if direction == "to_host" else sides[::-1]
                source.random_(0, 256)
                target.fill_(POISON)
                machine.sync()
                go(machine, copiers, direction, case.moves[direction])
                machine.sync()
                same = torch.equal(target.cpu(), case.expected(direction))
                assert same, f"{name} {pairing.name} {direction}: wrong bytes"
                checked += 1
        del case, source, target, sides
        machine.free_arenas()
    return checked


def measure_rearranged(machine: Machine, limits: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield GB/s of every way for each pairing and direction, over the link's limit."""
    all_ways = ways(machine)
    for pairing in TINY if machine.dry else PAIRINGS:
        if machine.late:
            yield {"cut": "out of time"}
            return
        case = Rearranged(machine, pairing, 3 if machine.dry else 128)
        case.cache.random_(0, 256)
        for direction in DIRECTIONS:
            moves, limit = case.moves[direction], limits[f"{direction}_gb_per_s"]
            line = {
                "rearranged": pairing.name, "direction": direction, "blocks": case.blocks,
                "bytes": case.total_bytes, "runs": len(moves.runs()),
                "unit_bytes": min(group.unit_bytes for group in moves.groups), "ways": {},
            }  # fmt: skip
            for name, copiers in all_ways.items():
                line["ways"][name] = _rate(
                    machine, partial(go, machine, copiers, direction, moves), case, limit
                )
            yield line
        del case
        machine.free_arenas()


def _rate(machine: Machine, call: Any, case: Rearranged, limit: float) -> dict[str, Any]:
    call()
    given, total, ends = [], [], time.perf_counter() + (0 if machine.dry else 1.0)
    while len(total) < 5 and (not total or time.perf_counter() < ends):
        machine.sync()
        began = time.perf_counter()
        given.append(call())
        total.append(time.perf_counter() - began)
    rate = case.total_bytes / median(total) / 1e9
    return {
        "gb_per_s": round(rate, 2), "over_limit": round(rate / limit, 3),
        "given_ms": round(1e3 * median(given), 2), "rounds": len(total),
    }  # fmt: skip
