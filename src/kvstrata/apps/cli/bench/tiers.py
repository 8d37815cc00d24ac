"""`kvstrata bench tiers`: every path of bytes beside its limit, on this machine, in one run."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import typer
from rich.console import Console
from rich.table import Table

from kvstrata import __version__
from kvstrata.apps.cli.bench.limits import FIO_HINT, fio_version
from kvstrata.apps.cli.bench.memory import measure_memory
from kvstrata.apps.cli.bench.rclone import object_server
from kvstrata.apps.cli.bench.slab import SIZES, Setup, measure_recovery, measure_slab
from kvstrata.apps.cli.bench.turns import Absent, PathRow
from kvstrata.core.config import Limits
from kvstrata.core.errors import ConfigError
from kvstrata.storage.memory import machine_memory_bytes
from kvstrata.transfer.backends.nixl.binding import INSTALL_HINT, nixl_version

__all__ = ["PATHS", "run_tiers"]

MIB: Final = 1 << 20
CONCURRENCIES: Final = (8, 32)
_MEMORY_TIMES: Final = 5  # a round takes 20 ms: a neighbour would decide it


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is moved and how often."""

    rounds: int
    """Rounds that count, of each measurement."""
    slab_bytes: int
    """What each round writes and reads, of each block size."""
    blocks: int
    """Blocks that move through memory and to an object server, each round."""
    index_blocks: int
    """Blocks of the index that is recovered."""


WHOLE: Final = Effort(rounds=9, slab_bytes=256 * MIB, blocks=64, index_blocks=1_000_000)
QUICK: Final = Effort(rounds=1, slab_bytes=16 * MIB, blocks=8, index_blocks=10_000)

Measured = PathRow | Absent | dict[str, Any]


def run_tiers(
    paths: Sequence[str],
    directory: Path | None,
    object_url: str | None,
    json_file: Path | None,
    *,
    quick: bool,
) -> None:
    """Measure, print a table to stdout, write JSON if asked to."""
    if unknown := set(paths) - PATHS.keys():
        raise ConfigError(
            f"path: no path {', '.join(sorted(unknown))}", hint=f"known: {', '.join(PATHS)}"
        )
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"json: {str(json_file.parent)!r} is no directory", hint="make it first")
    effort = QUICK if quick else WHOLE
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > cores:
        typer.echo(f"load {load:.1f} on {cores} cores: the figures will scatter", err=True)
    found: list[PathRow] = []
    absent: list[Absent] = []
    recovery: dict[str, Any] | None = None
    for name in paths or PATHS:
        typer.echo(f"measuring: {name}", err=True)
        for each in PATHS[name](effort, directory, object_url):
            if isinstance(each, PathRow):
                found.append(each)
            elif isinstance(each, Absent):
                absent.append(each)
            else:
                recovery = each
    _print(found, absent, recovery)
    if json_file is not None:
        told = {
            "command": " ".join(["kvstrata", *sys.argv[1:]]),
            "machine": _machine(),
            "effort": asdict(effort),
            "unit": "GB/s",
            "paths": [asdict(each) for each in found],
            "recovery": recovery,
            "absent": [asdict(each) for each in absent],
        }
        json_file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _memory(effort: Effort, directory: Path | None, url: str | None) -> Iterator[Measured]:
    del directory, url
    yield from measure_memory(_MEMORY_TIMES * effort.rounds, effort.blocks)


def _slab(effort: Effort, directory: Path | None, url: str | None) -> Iterator[Measured]:
    del url
    if fio_version() is None:
        typer.echo(FIO_HINT, err=True)
    for size in SIZES:
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            setup = Setup(Path(folder), size, effort.slab_bytes, Limits().transfer_threads)
            yield from measure_slab(setup, effort.rounds)


def _objects(effort: Effort, directory: Path | None, url: str | None) -> Iterator[Measured]:
    del directory
    if importlib.util.find_spec("obstore") is None:
        yield Absent("object", "obstore is not installed: pip install 'kvstrata[object]'")
        return
    from kvstrata.apps.cli.bench.objects import measure_objects

    def measure(where: str) -> Iterator[PathRow]:
        for concurrency in CONCURRENCIES:
            yield from measure_objects(where, MIB, effort.blocks, concurrency, effort.rounds)

    if url is not None:
        yield from measure(url)
        return
    try:
        with object_server() as where:
            yield from measure(where)
    except ConfigError as error:
        yield Absent("object", str(error))


def _peer(effort: Effort, directory: Path | None, url: str | None) -> Iterator[Measured]:
    del directory, url
    if nixl_version() is None:
        yield Absent("peer", f"NIXL is not installed: {INSTALL_HINT}")
        return
    from kvstrata.apps.cli.bench.peer import measure_peer

    try:
        yield from measure_peer(effort.rounds)
    except ConfigError as error:
        yield Absent("peer", str(error))


def _recovery(effort: Effort, directory: Path | None, url: str | None) -> Iterator[Measured]:
    del url
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        try:
            yield measure_recovery(Path(folder), effort.index_blocks)
        except ConfigError as error:  # it takes a page a block, 4 GB for a million
            yield Absent("recovery", str(error))


PATHS: Final[dict[str, Callable[[Effort, Path | None, str | None], Iterator[Measured]]]] = {
    "memory": _memory,
    "slab": _slab,
    "object": _objects,
    "peer": _peer,
    "recovery": _recovery,
}
"""What can be measured, by the name that `--path` takes."""


def _machine() -> dict[str, Any]:
    """Return what a reader must know of the machine to compare; nothing that names it."""
    model = ""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        models = [
            line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line
        ]
        model = next(iter(models), "")
    except OSError:
        pass
    return {
        "processor": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": machine_memory_bytes() >> 20,
        "load_1min": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "kvstrata": __version__,
        "fio": fio_version(),
        "nixl": nixl_version(),
    }


def _print(
    found: Sequence[PathRow], absent: Sequence[Absent], recovery: dict[str, Any] | None
) -> None:
    console = Console()
    if found:
        table = Table(title="GB/s, medians of rounds in turn")
        table.add_column("path", no_wrap=True)
        for name in ("KiB", "ours", "limit", "ratio", "spread"):
            table.add_column(name, justify="right", no_wrap=True)
        for each in found:
            table.add_row(
                each.name,
                str(each.block_bytes >> 10),
                f"{each.ours:.2f}",
                f"{each.limit:.2f}",
                f"{each.ratio:.2f}",
                f"{each.spread:.2f}",
            )
        console.print(table, markup=False)
        for tool in dict.fromkeys(each.limit_tool for each in found):
            names = dict.fromkeys(each.name for each in found if each.limit_tool == tool)
            console.print(f"limit of {'; '.join(names)}: {tool}", highlight=False, markup=False)
    if recovery:
        console.print(
            f"index of {recovery['blocks']:,} blocks recovered in {recovery['seconds']:.2f} s",
            highlight=False,
        )
    for gone in absent:
        console.print(f"not measured: {gone.name}: {gone.reason}", highlight=False, markup=False)
