"""Parts `limits` and `copies` of `gpu.py`, and the caches that all parts copy."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from gpu_machine import DIRECTIONS, Machine

from kvstrata.transfer.cuda.movers import EachRunMover
from kvstrata.transfer.cuda.tables import RunTable

POISON = 0xEE


@dataclass(frozen=True)
class Geometry:
    """A model's KV cache of one worker; `parts` are K and V, one for latent attention."""

    name: str
    layers: int
    parts: int
    token_bytes: int
    """Of one part of one layer."""
    block_tokens: int

    def layout(self, name: str) -> tuple[int, int, int]:
        """Return (copies a layer and block, layers ordered apart, bytes a contiguous run)."""
        part = self.token_bytes * self.block_tokens
        if name == "nhd":  # [K or V, page, token, head, channel] for each layer
            return self.parts, self.layers, part
        if name == "hnd":  # [page, head, token, K and V] for each layer
            return 1, self.layers, part * self.parts
        return 1, 1, part * self.parts * self.layers  # [page, layer, ...]


GEOMETRIES = (
    Geometry("llama-3-8b", 32, 2, 8 * 128 * 2, 16),
    Geometry("llama-3-70b-tp8", 80, 2, 128 * 2, 16),
    Geometry("deepseek-mla", 61, 1, 576 * 2, 64),
)
LAYOUTS = ("nhd", "hnd", "cross-layer")
TINY = (Geometry("tiny", 3, 2, 40, 4), Geometry("tiny-mla", 2, 1, 24, 4))


class Case:
    """Blocks of one geometry: scattered pages on the device, whole blocks in the arena."""

    def __init__(
        self,
        machine: Machine,
        geometry: Geometry,
        layout: str,
        blocks: int,
        *,
        scattered: bool = True,
    ) -> None:
        """Allocate; pages are in random order with some left out, or in order."""
        self.machine = machine
        self.per_layer, self.layers, self.run_bytes = geometry.layout(layout)
        self.outer = self.per_layer * self.layers
        self.blocks = blocks
        pages_total = blocks + max(1, blocks // 8) if scattered else blocks
        luck = np.random.default_rng(blocks)
        self.pages = luck.permutation(pages_total)[:blocks] if scattered else np.arange(blocks)
        self.cache = machine.empty(self.outer, pages_total, self.run_bytes)
        self.host = machine.arena(blocks, self.outer, self.run_bytes)
        self.index = torch.from_numpy(self.pages).to(machine.device)

    @property
    def total_bytes(self) -> int:
        """What one copy moves."""
        return self.host.numel()

    def tables(self, direction: str) -> list[RunTable]:
        """Return the runs, layer by layer."""
        pages_total = self.cache.shape[1]
        found = []
        for layer in range(self.layers):
            outer = np.arange(layer * self.per_layer, (layer + 1) * self.per_layer)[:, None]
            pages = (outer * pages_total + self.pages) * self.run_bytes + self.cache.data_ptr()
            slots = (np.arange(self.blocks) * self.outer + outer) * self.run_bytes
            slots += self.host.data_ptr()
            lengths = np.full(pages.size, self.run_bytes, np.int64)
            sides = (pages.ravel(), slots.ravel())
            source, target = sides if direction == "to_host" else sides[::-1]
            found.append(RunTable(source, target, lengths))
        return found

    def by_torch(self, direction: str) -> None:
        """Copy by torch's indexing, layer by layer, and wait."""
        for layer in range(self.layers):
            places = slice(layer * self.per_layer, (layer + 1) * self.per_layer)
            pages, slots = self.cache[places], self.host[:, places]
            if direction == "to_host":
                slots.copy_(pages[:, self.index].transpose(0, 1))
            else:
                pages.index_copy_(1, self.index, slots.to(self.machine.device).transpose(0, 1))
        self.machine.sync()

    def expected(self, direction: str) -> torch.Tensor:
        """Return what the whole target must hold, the source as it is, all else poison."""
        cache, pages = self.cache.cpu(), torch.from_numpy(self.pages)
        if direction == "to_host":
            return cache[:, pages].transpose(0, 1).contiguous()
        wanted = torch.full_like(cache, POISON)
        wanted[:, pages] = self.host.transpose(0, 1)
        return wanted


Way = Callable[[Case, str, list[RunTable]], float]
"""Copies, waits for the end, and returns the seconds that giving it to the device took."""


def ways(machine: Machine) -> dict[str, Way]:
    """Return every way of copying: the naive ones and each mover there is."""
    found: dict[str, Way] = {"fragments": _fragments(machine), "torch": _torch}
    for name in machine.movers:
        found[name] = _mover(machine, name)
    return found


def _torch(case: Case, direction: str, _tables: list[RunTable]) -> float:
    began = time.perf_counter()
    case.by_torch(direction)
    return time.perf_counter() - began


def _fragments(machine: Machine) -> Way:
    """One cudaMemcpyAsync each, nothing joined, no layer told."""
    stream, event = machine.streams.stream_create(), machine.streams.event_create()
    mover = EachRunMover(machine.streams)

    def go(_case: Case, _direction: str, tables: list[RunTable]) -> float:
        began = time.perf_counter()
        for table in tables:
            assert not mover.move(table, stream), "CUDA refused a copy"
        assert not machine.streams.event_record(event, stream), "CUDA refused an event"
        spent = time.perf_counter() - began
        while not machine.streams.event_happened(event):
            pass
        return spent

    return go


def _mover(machine: Machine, name: str) -> Way:
    copiers = {direction: machine.copier(name) for direction in DIRECTIONS}

    def go(_case: Case, direction: str, tables: list[RunTable]) -> float:
        copier, began = copiers[direction], time.perf_counter()
        ticket = copier.submit(tables, machine.engine_stream)
        spent = time.perf_counter() - began
        while not copier.poll():
            pass
        if ticket.error:
            raise ticket.error
        return spent

    return go


def measure_limits(machine: Machine, report: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    """Return GB/s of one large buffer each way, both ways at once, and on the device."""
    size = 1 << (16 if machine.dry else 30)
    host, device = machine.arena(2, size), machine.empty(2, size)
    copiers = {direction: machine.copier("runs") for direction in DIRECTIONS}
    tables = {}
    for row, direction in enumerate(DIRECTIONS):
        sides = (device[row].data_ptr(), host[row].data_ptr())
        source, target = sides if direction == "to_host" else sides[::-1]
        rows = [np.array([each], np.int64) for each in (source, target, size)]
        tables[direction] = [RunTable(*rows)]

    def go(*directions: str) -> float:
        machine.sync()
        began = time.perf_counter()
        for each in directions:
            assert copiers[each].submit(tables[each], machine.engine_stream).error is None
        for each in directions:
            while not copiers[each].poll():
                pass
        return time.perf_counter() - began

    def on_device() -> float:
        machine.sync()
        began = time.perf_counter()
        device[0].copy_(device[1])
        machine.sync()
        return time.perf_counter() - began

    def rate(call: Callable[[], float]) -> float:
        call()
        return round(size / median(call() for _ in range(7)) / 1e9, 2)

    found = {
        "buffer_bytes": size,
        "to_host_gb_per_s": rate(lambda: go("to_host")),
        "to_device_gb_per_s": rate(lambda: go("to_device")),
        "both_at_once_gb_per_s_each": rate(lambda: go(*DIRECTIONS)),
        "device_gb_per_s": rate(on_device),
    }
    for copier in copiers.values():
        copier.close()
    return found


def blocks_that_fit(machine: Machine, geometry: Geometry) -> int:
    """Return 1,024, or fewer if a third of the free memory of either side is less."""
    if machine.dry:
        return 6
    host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = min(torch.cuda.mem_get_info()[0], host) // 3
    block = geometry.layers * geometry.parts * geometry.token_bytes * geometry.block_tokens
    return int(max(1, min(1024, free // block)))


def measure_copies(machine: Machine, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return GB/s of every way, for every geometry, layout and direction; limits come first."""
    limits = report["parts"]["limits"].get("result")
    assert limits, "the limits could not be measured"
    all_ways, lines = ways(machine), []
    for geometry in TINY if machine.dry else GEOMETRIES:
        for layout in LAYOUTS if geometry.parts > 1 else LAYOUTS[1:]:
            if machine.late:
                return [*lines, {"cut": "out of time"}]
            case = Case(machine, geometry, layout, blocks_that_fit(machine, geometry))
            case.cache.random_(0, 256)
            for direction in DIRECTIONS:
                line = {"geometry": geometry.name, "layout": layout, "direction": direction}
                line |= _one_line(case, direction, all_ways, limits[f"{direction}_gb_per_s"])
                lines.append(line)
                rates = {name: each["over_limit"] for name, each in line["ways"].items()}
                print(f"{geometry.name} {layout} {direction} {case.run_bytes} B: {rates}")
            del case
            machine.free_arenas()
    return lines


def _one_line(case: Case, direction: str, all_ways: dict[str, Way], limit: float) -> dict[str, Any]:
    began = time.perf_counter()
    tables = case.tables(direction)
    planned = time.perf_counter() - began
    done: dict[str, Any] = {}
    for name, way in all_ways.items():
        spent = _rounds(case.machine, partial(way, case, direction, tables))
        rate = case.total_bytes / spent["total_s"] / 1e9
        done[name] = {
            "gb_per_s": round(rate, 2),
            "over_limit": round(rate / limit, 3),
            "given_ms": round(1e3 * spent["given_s"], 2),
            "rounds": spent["rounds"],
        }
    return {
        "blocks": case.blocks, "run_bytes": case.run_bytes, "runs": sum(map(len, tables)),
        "bytes": case.total_bytes, "plan_ms": round(1e3 * planned, 2), "ways": done,
    }  # fmt: skip


def _rounds(machine: Machine, call: Callable[[], float], limit_s: float = 2.0) -> dict[str, Any]:
    """Return medians of up to 7 rounds after one that warms up, for about `limit_s`."""
    call()
    given, total, ends = [], [], time.perf_counter() + (0 if machine.dry else limit_s)
    while len(total) < 7 and (not total or time.perf_counter() < ends):
        machine.sync()
        began = time.perf_counter()
        given.append(call())
        total.append(time.perf_counter() - began)
    return {"given_s": median(given), "total_s": median(total), "rounds": len(total)}
