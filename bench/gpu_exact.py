"""Part `exact` of `gpu.py`: every byte, and the order with the engine's stream."""

from __future__ import annotations

from typing import Any

import torch
from gpu_copies import GEOMETRIES, LAYOUTS, POISON, TINY, Case, Geometry, ways
from gpu_machine import DIRECTIONS, Machine

ODD = (Geometry("odd-bytes", 3, 2, 7, 3), Geometry("odd-words", 2, 2, 333 * 4, 5))


def check_exact(machine: Machine, report: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    """Copy random bytes into poison, every way; raise at the first wrong byte."""
    checked, all_ways = 0, ways(machine)
    for geometry in (*TINY, *ODD) if machine.dry else (*GEOMETRIES, *TINY, *ODD):
        for layout in LAYOUTS if geometry.parts > 1 else LAYOUTS[1:]:
            case = Case(machine, geometry, layout, 5 if machine.dry else 37)
            for name, way in all_ways.items():
                for direction in DIRECTIONS:
                    sides = (case.cache, case.host)
                    source, target = sides if direction == "to_host" else sides[::-1]
                    source.random_(0, 256)
                    target.fill_(POISON)
                    machine.sync()
                    way(case, direction, case.tables(direction))
                    machine.sync()
                    same = torch.equal(target.cpu(), case.expected(direction))
                    assert same, f"{name} {geometry.name} {layout} {direction}: wrong bytes"
                    checked += 1
            del case, source, target, sides
            machine.free_arenas()
    return {"copies_checked": checked, "wrong": 0, "ordered": _check_order(machine)}


def _check_order(machine: Machine) -> int:
    """Write over a source and read a target on a busy engine stream, after waiting for a layer."""
    checked = 0
    for name in machine.movers:
        case = Case(machine, TINY[0] if machine.dry else GEOMETRIES[0], "nhd", 6)
        copiers = [machine.copier(name) for _ in DIRECTIONS]
        case.cache.fill_(1)
        machine.sync()
        with machine.on_engine():
            _keep_busy(machine)
            case.cache.fill_(2)
            ticket = copiers[0].submit(case.tables("to_host"), machine.engine_stream)
            ticket.wait_layer(case.layers - 1, machine.engine_stream)
            case.cache.fill_(3)
            machine.sync()
            assert bool((case.host == 2).all()), f"{name}: a source was read too early or late"
            case.host.fill_(4)
            _keep_busy(machine)
            before = case.cache.clone()
            ticket = copiers[1].submit(case.tables("to_device"), machine.engine_stream)
            ticket.wait_layer(case.layers - 1, machine.engine_stream)
            after = case.cache[:, case.index].clone()
            machine.sync()
        assert bool((before == 3).all()), f"{name}: a target was written before it was read"
        assert bool((after == 4).all()), f"{name}: a target was read before it was written"
        for copier in copiers:
            copier.poll()
            assert not copier.close(), f"{name}: a copy never ended"
        checked += 2
    return checked


def _keep_busy(machine: Machine) -> None:
    if not machine.dry:
        torch.cuda._sleep(100_000_000)  # noqa: SLF001  # some 50 ms
