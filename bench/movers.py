"""Movers of files beside our threads, as the daemon would use them, and what choosing one costs.

    python bench/movers.py [--json FILE] [--directory DIR] [--rounds N] [--quick]

**jobs**: the daemon's jobs of 4 MiB through the executor, seals and index lines included, by each
mover that is installed and by ours, in turns, each over a slab of its own. Ours seals on the way;
for another one the seals are a stage of their own.

**start**: seconds from a new process's first line to the choice, for each setting; and from the
start of `kvstrata serve` to its ready line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from kvstrata.apps.cli.bench.slab import SIZES, Setup, measure_mover
from kvstrata.core.config import Limits
from kvstrata.transfer.backends.nixl.binding import nixl_version
from kvstrata.transfer.mover import installed, mover_names

MIB = 1 << 20
RESULTS = Path(__file__).parent / "results" / "movers.json"
CHOOSE = """
import sys, time
from pathlib import Path
from kvstrata.core.config import Limits
from kvstrata.transfer.mover import choose_mover
began = time.perf_counter()
choice = choose_mover(sys.argv[1], Path(sys.argv[2]), Limits())
print(time.perf_counter() - began, choice.name)
"""


def measure_choice(setting: str, directory: str, times: int) -> dict[str, Any]:
    """Return how long the choice takes in a fresh process, and how often it fell on whom."""
    seconds, names = [], []
    for _ in range(times):
        command = [sys.executable, "-c", CHOOSE, setting, directory]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        seconds.append(float(told[0]))
        names.append(told[1])
    return {
        "setting": setting,
        "median_s": round(median(seconds), 4),
        "max_s": round(max(seconds), 4),
        "chosen": {name: names.count(name) for name in sorted(set(names))},
    }


def measure_serve(setting: str, times: int) -> dict[str, Any]:
    """Return how long `kvstrata serve` with a new tier takes until it is ready."""
    seconds = []
    for _ in range(times):
        with tempfile.TemporaryDirectory(prefix="kv") as folder:
            command = [sys.executable, "-m", "kvstrata.apps.cli.main", "serve"]
            command += ["--tiers", f"host:64MiB,disk:{folder}:64MiB", "--backend", setting]
            command += ["--address", f"ipc://{folder}/s"]
            began = time.perf_counter()
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon:
                assert daemon.stderr is not None, "it was asked for"
                while " serves " not in (line := daemon.stderr.readline()):
                    assert line, "the daemon did not start"
                seconds.append(time.perf_counter() - began)
                daemon.terminate()
    return {"setting": setting, "median_s": round(median(seconds), 3)}


def main() -> int:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--directory", type=Path, help="where the slabs lie; default: temporary")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="only shows that it works")
    given = parser.parse_args()
    rounds, total, times = (1, 32 * MIB, 1) if given.quick else (given.rounds, 256 * MIB, 7)
    load = [round(os.getloadavg()[0], 2)]
    others = [name for name in mover_names() if name != "posix" and installed(name)]
    jobs = []
    with tempfile.TemporaryDirectory(dir=given.directory) as folder:
        for name in others:
            for size in SIZES:
                setup = Setup(Path(folder), size, total, Limits().transfer_threads)
                for line in measure_mover(setup, name, rounds):
                    jobs.append(asdict(line))
                    print(jobs[-1], flush=True)
        settings = ["posix", *others, "auto"]
        choices = [measure_choice(each, folder, times) for each in settings]
    starts = [measure_serve(each, times) for each in settings]
    for each in [*choices, *starts]:
        print(each)
    load.append(round(os.getloadavg()[0], 2))
    told = {
        "cores": os.cpu_count(),
        "load_average": load,
        "nixl": nixl_version(),
        "unit": "GB/s",
        "jobs": jobs,
        "choice": choices,
        "serve": starts,
    }
    given.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
