"""`kvstrata replay` and `kvstrata plan`: what-if answers from a trace."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvstrata.apps.cli.charts import check_picture, draw_curves
from kvstrata.core.errors import ConfigError
from kvstrata.sim.hardware import EXAMPLE, Hardware, load_hardware
from kvstrata.sim.plan import Candidate, best, candidates, plan
from kvstrata.sim.replay import ReplayReport
from kvstrata.sim.sweep import (
    CAPACITIES,
    Cell,
    Load,
    check_policies,
    parse_capacities,
    parse_extents,
    sweep,
)
from kvstrata.sim.traces import open_trace

__all__ = ["Source", "run_plan", "run_replay"]

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Source:
    """Which trace, on which hardware."""

    path: Path
    """The trace."""
    format: str | None = None
    """Its format, or None to tell it by its first line."""
    block_tokens: int | None = None
    """Block size of a token trace."""
    hardware_file: Path | None = None
    """TOML file, or None for the example."""

    def hardware(self) -> Hardware:
        """Return the stated hardware."""
        return load_hardware(self.hardware_file) if self.hardware_file else EXAMPLE


def run_replay(
    source: Source,
    policies: Sequence[str],
    tiers: str,
    capacity: str | None,
    plot: Path | None,
    *,
    weigh_costs: bool,
    as_json: bool,
) -> None:
    """Replay every policy at every capacity; print a table or JSON, draw a picture."""
    names = check_policies(policies)
    host, below = parse_extents(tiers)
    if host and capacity:
        raise ConfigError(
            "capacity: the host tier has a size already", hint="write --tiers host without a size"
        )
    hosts = [host] if host else parse_capacities(capacity or CAPACITIES)
    hardware = source.hardware()
    if plot:
        check_picture(plot)
    load = _read(source)
    began = time.monotonic()
    steps = len(names) * len(hosts) * load.requests
    with _bar("replaying", steps) as advance:
        cells = list(sweep(load, names, hosts, below, hardware, advance, weigh_costs=weigh_costs))
    if plot:
        curves = {
            name: [(100 * c.capacity, 100 * c.report.hit) for c in cells if c.report.policy == name]
            for name in names
        }
        title = f"{source.path.name}: {load.blocks:,} blocks, {load.unique:,} unique"
        draw_curves(plot, curves, title, ("host tier, % of unique blocks", "prefix hit rate, %"))
    if as_json:
        print(json.dumps(_replay_record(source, load, hardware, cells), indent=1))
        return
    console = _console()
    console.print(_summary(source, load), highlight=False)
    console.print(_hit_table(cells, names))
    console.print(_cell_table(cells))
    console.print(f"time to first token under: {hardware.name}", highlight=False, markup=False)
    console.print(f"{len(cells)} replays in {time.monotonic() - began:.1f} s", highlight=False)


def run_plan(
    source: Source, budget: float, policies: Sequence[str], plot: Path | None, *, as_json: bool
) -> None:
    """Try every pair of tiers that the budget buys; print what to buy and the curve behind it."""
    names = check_policies(policies) if policies else ["auto"]
    hardware = source.hardware()
    if not budget > 0:
        raise ConfigError(f"budget: {budget:g} is not above zero", hint="give a positive number")
    if plot:
        check_picture(plot)
    load = _read(source)
    steps = len(candidates(load, hardware, budget)) * len(names) * load.requests
    with _bar("planning", steps) as advance:
        outcomes = list(plan(load, hardware, budget, names, advance))
    chosen, report = best(outcomes)
    frontier = _frontier(outcomes)
    if plot:
        curve = [(max(c.price, 1e-9), r.ttft_s["mean"]) for c, r in frontier]
        draw_curves(
            plot,
            {"best for the price": curve, "recommended": [(chosen.price, report.ttft_s["mean"])]},
            f"{source.path.name} on {hardware.name}",
            ("price", "mean time to first token, s"),
        )
    if as_json:
        records = [_plan_record(*each) for each in outcomes]
        recommended = _plan_record(chosen, report)
        print(
            json.dumps(
                {"hardware": hardware.name, "recommended": recommended, "candidates": records},
                indent=1,
            )
        )
        return
    console = _console()
    console.print(_summary(source, load), highlight=False)
    console.print(_plan_table(frontier, chosen))
    console.print(
        f"recommended: kvstrata serve --policy {report.policy} --tiers {_tiers_text(chosen)}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"hardware: {hardware.name}", highlight=False, markup=False)


def _read(source: Source) -> Load:
    trace = open_trace(source.path, source.format, source.block_tokens)
    with _bar("reading", trace.size_bytes) as advance:
        return Load(trace, advance)


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=max(total, 1))
        yield lambda amount: progress.advance(task, amount)
        progress.update(task, completed=max(total, 1))


def _console() -> Console:
    """Return a console that does not fold tables where nobody watches."""
    width = Console().width
    return Console(width=width if sys.stdout.isatty() else max(width, 120))


def _summary(source: Source, load: Load) -> str:
    return (
        f"{source.path.name}: {load.requests:,} requests, {load.blocks:,} blocks of "
        f"{load.block_tokens} tokens, {load.unique:,} unique"
    )


def _hit_table(cells: list[Cell], names: list[str]) -> Table:
    hosts = list(dict.fromkeys(str(cell.host) for cell in cells))
    table = Table(title="prefix hit rate, % of all blocks, by size of the host tier")
    table.add_column("policy")
    for host in hosts:
        table.add_column(host, justify="right")
    for name in names:
        row = [f"{100 * cell.report.hit:.2f}" for cell in cells if cell.report.policy == name]
        table.add_row(name, *row)
    return table


def _cell_table(cells: list[Cell]) -> Table:
    table = Table(title="what moved, and when the first token came")
    names = ("host", "from host %", "from below %", "evicted", "read GiB", "written GiB")
    times = ("mean s", "p50 s", "p99 s")
    table.add_column("policy")
    for name in (*names, *times):
        table.add_column(name, justify="right")
    for cell in cells:
        report = cell.report
        blocks = report.hit_blocks["host"], sum(report.hit_blocks.values())
        hits = [100 * count / report.blocks for count in (blocks[0], blocks[1] - blocks[0])]
        moved = [sum(_moved(report, way)) / _GIB for way in ("to host", "host to")]
        table.add_row(
            report.policy,
            str(cell.host),
            *(f"{hit:.1f}" for hit in hits),
            f"{sum(report.evictions.values()):,}",
            *(f"{size:.1f}" for size in moved),
            *(f"{report.ttft_s[key]:.3f}" for key in ("mean", "p50", "p99")),
        )
    return table


def _moved(report: ReplayReport, way: str) -> list[int]:
    """Return the bytes between the host and each tier below it, in one direction."""
    return [
        size for name, size in report.moved_bytes.items() if way in name and "engine" not in name
    ]


def _replay_record(
    source: Source, load: Load, hardware: Hardware, cells: list[Cell]
) -> dict[str, Any]:
    return {
        "trace": source.path.name,
        "requests": load.requests,
        "blocks": load.blocks,
        "unique_blocks": load.unique,
        "block_tokens": load.block_tokens,
        "hardware": hardware.name,
        "cells": [
            {"policy": cell.report.policy, "capacity": cell.capacity, "hit": cell.report.hit}
            | _report_record(cell.report)
            for cell in cells
        ],
    }


def _report_record(report: ReplayReport) -> dict[str, Any]:
    return {
        "slots": dict(report.slots),
        "hit_blocks": dict(report.hit_blocks),
        "evictions": dict(report.evictions),
        "moved_bytes": dict(report.moved_bytes),
        "dropped_blocks": report.dropped_blocks,
        "ttft_s": dict(report.ttft_s),
    }


def _plan_record(candidate: Candidate, report: ReplayReport) -> dict[str, Any]:
    return {
        "host_bytes": candidate.host_bytes,
        "disk_bytes": candidate.disk_bytes,
        "price": candidate.price,
        "policy": report.policy,
        "hit": report.hit,
    } | _report_record(report)


def _frontier(
    outcomes: list[tuple[Candidate, ReplayReport]],
) -> list[tuple[Candidate, ReplayReport]]:
    """Return those that nothing cheaper beats, cheapest first."""
    found: list[tuple[Candidate, ReplayReport]] = []
    for each in sorted(outcomes, key=lambda one: (one[0].price, one[1].ttft_s["mean"])):
        if not found or each[1].ttft_s["mean"] < found[-1][1].ttft_s["mean"]:
            found.append(each)
    return found


def _plan_table(frontier: list[tuple[Candidate, ReplayReport]], chosen: Candidate) -> Table:
    table = Table(title="what each price buys (nothing cheaper is faster)")
    for name in ("price", "host GiB", "disk GiB", "policy", "hit %", "mean TTFT s", "p99 s", ""):
        table.add_column(name, justify="right")
    for candidate, report in frontier:
        table.add_row(
            f"{candidate.price:,.2f}",
            f"{candidate.host_bytes / _GIB:,.1f}",
            f"{candidate.disk_bytes / _GIB:,.1f}",
            report.policy,
            f"{100 * report.hit:.1f}",
            f"{report.ttft_s['mean']:.3f}",
            f"{report.ttft_s['p99']:.3f}",
            "recommended" if candidate == chosen else "",
        )
    return table


def _tiers_text(candidate: Candidate) -> str:
    host = f"host:{-(-candidate.host_bytes // (1 << 20))}MiB"
    if not candidate.disk_bytes:
        return host
    return f"{host},disk:DIRECTORY:{-(-candidate.disk_bytes // (1 << 20))}MiB"
