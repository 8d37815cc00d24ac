"""Everything of issue 6 on a GPU, in one call of at most ten minutes.

    python bench/gpu.py [--part NAME] [--json FILE] [--limit-s N]
    python bench/gpu.py --dry-run

Writes bench/results/gpu-<device>.json after each part: limits, copies, interference, exact, ttft.
Needs torch and numpy; triton, cuda-bindings and transformers for what they are measured with, and
says what is missing. Nothing is installed: it uses src/ beside it. `--dry-run` runs all of it on
the CPU, tiny, CUDA's calls replaced: it shows that the program works; its numbers say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "src"))
PARTS = ("limits", "copies", "interference", "exact", "ttft")


def measure(chosen: list[str], *, dry: bool, limit_s: float, path: Path | None) -> dict[str, Any]:
    """Run the parts, keep what came of each; a part that fails leaves its error."""
    import gpu_copies
    import gpu_load
    from gpu_machine import Machine

    calls = {
        "limits": gpu_copies.measure_limits,
        "copies": gpu_copies.measure_copies,
        "interference": gpu_load.measure_interference,
        "exact": gpu_copies.check_exact,
        "ttft": gpu_load.measure_ttft,
    }
    machine = Machine(dry=dry, limit_s=limit_s)
    name = re.sub(r"[^a-z0-9]+", "-", machine.name.lower()).strip("-")
    path = path or (None if dry else HERE / "results" / f"gpu-{name}.json")
    report: dict[str, Any] = {"dry_run": dry, "parts": {}}
    if path and path.exists():  # the other parts, if they are of this device
        before = json.loads(path.read_text(encoding="utf-8"))
        if before.get("machine", {}).get("device") == machine.name:
            report["parts"] = before["parts"]
    for part in chosen:
        began, found = time.monotonic(), {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        print(f"== {part}", flush=True)
        if machine.late:
            found["error"] = f"not begun: {limit_s} s were over"
        else:
            try:
                found["result"] = calls[part](machine, report)
            except Exception as error:  # noqa: BLE001  # the next parts may still work
                found["error"] = f"{type(error).__name__}: {error}"
                traceback.print_exc()
        machine.free_arenas()
        found["took_s"] = round(time.monotonic() - began, 1)
        report["parts"][part] = found
        report["machine"] = machine.facts()
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def main(given: list[str]) -> int:
    """Measure; 1 if a part failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; repeatable")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--limit-s", type=float, default=480.0, help="begin nothing after that")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU; the result is not kept")
    options = parser.parse_args(given)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from kvstrata.core.errors import ConfigError

    chosen = [part for part in PARTS if part in (options.part or PARTS)]
    if "copies" in chosen and "limits" not in chosen:
        chosen.insert(0, "limits")  # a rate is told over the limit of the same run
    try:
        report = measure(
            chosen,
            dry=options.dry_run,
            limit_s=options.limit_s,
            path=options.json,
        )
    except ConfigError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    ran = {part: report["parts"][part] for part in chosen}
    failed = [part for part, each in ran.items() if "error" in each]
    print(f"ran: {', '.join(part for part in ran if part not in failed)}")
    for part in failed:
        print(f"failed: {part}: {ran[part]['error']}")
    for name, reason in report["machine"]["absent_movers"].items():
        print(f"absent: {name}: {reason}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
