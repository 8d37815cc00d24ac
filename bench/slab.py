"""What the slab writes and reads, beside what fio does on the same disk.

    python bench/slab.py [--directory D] [--json FILE] [--rounds N] [--quick] [--threads N]

The measuring itself is `kvstrata.apps.cli.bench.slab`, which `kvstrata bench tiers` uses too; this
lets rounds, threads and the amount be chosen.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from kvstrata.apps.cli.bench.slab import SIZES, Setup, measure_recovery, measure_slab
from kvstrata.core.config import Limits

MIB = 1 << 20


def main() -> int:
    """Measure, print a table, write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--directory", type=Path, help="where the files lie; default: temporary")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=Limits().transfer_threads)
    parser.add_argument("--quick", action="store_true", help="only shows that it works")
    chosen = parser.parse_args()
    total, rounds = (32 * MIB, 1) if chosen.quick else (256 * MIB, chosen.rounds)
    paths = []
    for size in SIZES:
        with tempfile.TemporaryDirectory(dir=chosen.directory) as folder:
            for line in measure_slab(Setup(Path(folder), size, total, chosen.threads), rounds):
                paths.append(asdict(line))
                print(
                    f"{line.name:24}{size >> 10:>5} KiB  ours {line.ours:6.2f}  limit "
                    f"{line.limit:6.2f}  ratio {line.ratio:5.2f}  ({line.limit_tool})",
                    flush=True,
                )
    with tempfile.TemporaryDirectory(dir=chosen.directory) as folder:
        start = measure_recovery(Path(folder), 10_000 if chosen.quick else 1_000_000)
    print(f"recovery of {start['blocks']:,} blocks: {start['seconds']:.2f} s")
    if chosen.json:
        chosen.json.write_text(
            json.dumps({"paths": paths, "recovery": start}, indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
