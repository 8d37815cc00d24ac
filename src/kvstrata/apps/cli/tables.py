"""Tables for people: what a daemon says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["print_stats"]


def print_stats(stats: dict[str, Any]) -> None:
    """Print a daemon's answer to `stats` as tables on stdout."""
    console = Console()
    _print_daemon(console, stats)
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
    _print_tenants(console, node)
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


def _print_daemon(console: Console, stats: dict[str, Any]) -> None:
    """Print what the daemon is and has before any client told it a layout."""
    console.print(
        f"daemon pid {stats['pid']} at {stats['address']}, {stats['sessions']} sessions",
        highlight=False,
    )
    memory = stats["host_memory"]
    where = "" if memory["numa_node"] is None else f" on node {memory['numa_node']}"
    console.print(
        f"host memory of {memory['memory_bytes']} bytes{where} in {memory['pages']}, "
        f"{memory['prefaulted_bytes']} bytes prefaulted",
        highlight=False,
        markup=False,
    )
    mover = stats["backend"]
    alone = f"; LEFT ALONE: {mover['left_alone']}" if mover.get("left_alone") else ""
    console.print(
        f"between host and disk blocks move by {mover['name']}: {mover['reason']}{alone}",
        highlight=False,
        markup=False,
    )


def _print_tenants(console: Console, node: dict[str, Any]) -> None:
    """Print who holds how many slots; nothing where that is one tenant of one model."""
    tiers = list(node["tiers"])
    if len(node["tenants"]) > 1 or any(each["guaranteed"] for each in node["tenants"]):
        columns = [f"{tier} (guaranteed)" for tier in tiers]
        tenants = _slots_table("slots by tenant", ["tenant"], columns)
        for each in node["tenants"]:
            held, sure = each["slots"], each["guaranteed"]
            cells = [
                f"{held.get(tier, 0)} ({sure[tier]})" if tier in sure else str(held.get(tier, 0))
                for tier in tiers
            ]
            tenants.add_row(Text(each["tenant"] or "(default)"), *cells)
        console.print(tenants)
        if node["tenants_not_shown"]:
            console.print(f"and {node['tenants_not_shown']} tenants more", highlight=False)
    if len(node["namespaces"]) > 1:
        spaces = _slots_table("slots by namespace", ["tag", "model"], tiers)
        for each in node["namespaces"]:
            counts = (str(each["slots"].get(tier, 0)) for tier in tiers)
            spaces.add_row(each["tag"], Text(each["model"] or "(unknown)"), *counts)
        console.print(spaces)


def _slots_table(title: str, names: Sequence[str], counts: Sequence[str]) -> Table:
    table = Table(title=title)
    for name in names:
        table.add_column(name)
    for count in counts:
        table.add_column(count, justify="right")
    return table
