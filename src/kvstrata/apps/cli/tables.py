"""Tables for people: what a daemon says of itself."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["print_stats"]


def print_stats(stats: dict[str, Any]) -> None:
    """Print a daemon's answer to `stats` as tables on stdout."""
    console = Console()
    console.print(
        f"daemon pid {stats['pid']} at {stats['address']}, {stats['sessions']} sessions",
        highlight=False,
    )
    node = stats["node"]
    if node is None:
        console.print("no client has connected yet: the layout of the blocks is not known")
        return
    console.print(
        f"blocks of {node['block_bytes']} bytes: {node['layout']}", highlight=False, markup=False
    )
    tiers = Table(title="slots")
    tiers.add_column("tier", no_wrap=True)
    names = (
        "total",
        "free",
        "filling",
        "staged",
        "idle",
        "in_use",
        "quarantined",
        "evictions",
        "hit_blocks",
    )
    for name in names:
        tiers.add_column(name.replace("_", " "), justify="right", overflow="fold")
    for tier, counts in node["tiers"].items():
        tiers.add_row(tier, *(str(counts[name]) for name in names))
    console.print(tiers)
    if node["would_have_hit"]:
        gauges = Table(title=f"blocks the host tier would have hit (policy {node['policy']})")
        gauges.add_column("policy x size")
        gauges.add_column("%", justify="right")
        for name, rate in node["would_have_hit"].items():
            gauges.add_row(name, f"{100 * rate:.1f}")
        console.print(gauges)
    counters = Table(title="since the daemon started")
    counters.add_column("what")
    counters.add_column("count", justify="right")
    for name, count in node["counters"].items():
        counters.add_row(name.replace("_", " "), str(count))
    console.print(counters)
