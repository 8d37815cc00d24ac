"""Blocks between two processes: our peer path beside bare NIXL, same memory, same descriptors.

    python bench/peer.py [--json FILE] [--tcp] [--rounds 15]

The measuring itself is `kvstrata.apps.cli.bench.peer`, which `kvstrata bench tiers` uses too; this
adds block sizes and sockets.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from kvstrata.apps.cli.bench.peer import SIZES, measure_peer


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tcp", action="store_true", help="sockets only")
    given = parser.parse_args()
    if given.tcp:
        os.environ["UCX_TLS"], os.environ["UCX_NET_DEVICES"] = "tcp", "lo"
    paths = measure_peer(given.rounds, SIZES)
    print(f"{'path':<22} {'block':>9} {'ours GB/s':>10} {'NIXL GB/s':>10} {'ratio':>6}")
    for path in paths:
        print(
            f"{path.name:<22} {path.block_bytes >> 10:>5} KiB {path.ours:>10.2f} "
            f"{path.limit:>10.2f} {path.ratio:>6.2f}"
        )
    if given.json:
        told = {"paths": [asdict(path) for path in paths]}
        given.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
