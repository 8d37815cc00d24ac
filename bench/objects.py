"""Blocks to and from an object server: our mover beside the bare client, at the same concurrency.

    python bench/objects.py [--json FILE] [--quick] [--block-bytes N] [--url s3://...]

The measuring itself is `kvstrata.apps.cli.bench.objects`, which `kvstrata bench tiers` uses too;
this lets length and number of the blocks be chosen. Without --url a server is started
(`rclone serve s3`), which shares this machine's cores with both sides.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from dataclasses import asdict
from pathlib import Path

from kvstrata.apps.cli.bench.objects import measure_objects
from kvstrata.apps.cli.bench.rclone import object_server


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one round; only shows that it works")
    parser.add_argument("--block-bytes", type=int, default=1 << 20)
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--url")
    chosen = parser.parse_args()
    rounds = 1 if chosen.quick else 9
    paths = []
    with contextlib.nullcontext(chosen.url) if chosen.url else object_server() as url:
        for concurrency in (8, 32):
            for line in measure_objects(
                url, chosen.block_bytes, chosen.blocks, concurrency, rounds
            ):
                paths.append(asdict(line))
                print(
                    f"{line.name:26} {line.block_bytes:>9} bytes  ours {line.ours:6.3f} GB/s  "
                    f"limit {line.limit:6.3f} GB/s  ratio {line.ratio:.2f}"
                )
    if chosen.json:
        chosen.json.write_text(json.dumps({"paths": paths}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
