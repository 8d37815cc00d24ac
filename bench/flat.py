"""Cost of one reference of a replay, from ten thousand to ten million resident blocks.

    python bench/flat.py [--largest 10000000] [--json PATH]

A reference is one block of a request of 64: found and used if it is resident, stored in place of
another one if it is not; half of the requests are resident. What grows is what memory costs once
the tables leave the processor's caches; the plain dict beside it grows likewise.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

from micro import machine
from rich.console import Console
from sides import Limit, Ours

RESULTS = Path(__file__).resolve().parent / "results" / "flat.json"
CHAIN_BLOCKS = 64
REQUESTS = 400
ROUNDS = 5
SIDES = {"lru": lambda slots: Ours(slots, "lru"), "arc": lambda slots: Ours(slots, "arc"),
         "plain dict": Limit}  # fmt: skip


def chain(number: int) -> list[bytes]:
    """Return the keys of chain `number`; made anew each time, as a request's are."""
    luck = Random(number)
    return [luck.randbytes(16) for _ in range(CHAIN_BLOCKS)]


def cost(name: str, slots: int) -> float:
    """Return microseconds per reference in a full pool of `slots` blocks."""
    side: Any = SIDES[name](slots)
    filled = slots // CHAIN_BLOCKS
    for number in range(filled):
        side.store(side.fresh([chain(number)]))
    gc.collect()
    gc.freeze()
    times = []
    luck, new = Random(1), filled
    for _ in range(ROUNDS):
        requests = []
        for turn in range(REQUESTS):
            new += turn % 2
            recent = luck.randrange(new - filled // 2, new)
            number = new if turn % 2 else recent
            requests += side.fresh([chain(number)])
        began = perf_counter()
        side.serve(requests)
        times.append((perf_counter() - began) / (REQUESTS * CHAIN_BLOCKS))
    gc.unfreeze()
    return 1e6 * median(times)


def draw(path: Path, lines: list[dict[str, Any]]) -> None:
    """Draw cost over size, one curve for each side."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in SIDES:
        points = [(line["slots"], line["us"]) for line in lines if line["side"] == name]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("resident blocks")
    axes.set_ylabel("microseconds per reference")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(given: list[str]) -> int:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(description="Cost per reference against resident blocks.")
    parser.add_argument("--largest", type=int, default=10_000_000)
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args(given)
    sizes = [10**power for power in range(4, 8) if 10**power <= arguments.largest]
    out, lines = Console(), []
    for slots in sizes:
        for name in SIDES:
            lines.append({"side": name, "slots": slots, "us": round(cost(name, slots), 3)})
            out.print(f"{slots:>10,}  {name:<10}  {lines[-1]['us']:.2f} us", highlight=False)
    report = {
        "command": "python bench/flat.py",
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": machine(),
        "results": lines,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    draw(arguments.json.with_suffix(".png"), lines)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
