"""Everything of issue 6 on a GPU, in one call of at most ten minutes.

    python bench/gpu.py [--part NAME] [--without NAME] [--json FILE] [--limit-s N]
    python bench/gpu.py --dry-run

Writes bench/results/gpu-<device>.json after each part: limits, copies, interference, exact, ttft.
On a GPU each part has a process of its own: what breaks the device's context breaks one part.
Needs torch and numpy; triton, cuda-bindings and transformers for what they are measured with, and
says what is missing. Nothing is installed: it uses src/ beside it. `--dry-run` runs all of it on
the CPU, tiny, CUDA's calls replaced: it shows that the program works; its numbers say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "src"))
PARTS = ("limits", "copies", "interference", "exact", "ttft")


def measure(options: argparse.Namespace, chosen: list[str], path: Path | None) -> dict[str, Any]:
    """Run the parts in this process, keep what came of each; one that fails leaves its error."""
    import gpu_copies
    import gpu_exact
    import gpu_load
    from gpu_machine import Machine

    calls = {
        "limits": gpu_copies.measure_limits,
        "copies": gpu_copies.measure_copies,
        "interference": gpu_load.measure_interference,
        "exact": gpu_exact.check_exact,
        "ttft": gpu_load.measure_ttft,
    }
    machine = Machine(dry=options.dry_run, limit_s=options.limit_s, without=options.without)
    report = _before(path, machine.name)
    report |= {"dry_run": options.dry_run}
    for part in chosen:
        began = time.monotonic()
        found: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        print(f"== {part}", flush=True)
        if machine.late:
            found["error"] = f"not begun: {options.limit_s} s were over"
        else:
            try:
                found["result"] = calls[part](machine, report)
                machine.free_arenas()
            except Exception as error:  # noqa: BLE001  # the next parts may still work
                found["error"] = f"{type(error).__name__}: {error}"
                traceback.print_exc()
        found["took_s"] = round(time.monotonic() - began, 1)
        report["parts"][part] = found
        report["machine"] = machine.facts()
        _keep(path, report)
    return report


def measure_apart(options: argparse.Namespace, chosen: list[str], path: Path) -> dict[str, Any]:
    """Run each part in a process of its own: what breaks the device's context breaks one part."""
    ends = time.monotonic() + options.limit_s
    for part in chosen:
        left_s = max(0.0, ends - time.monotonic())
        command = [sys.executable, str(HERE / "gpu.py"), "--part", part, "--json", str(path)]
        command += ["--limit-s", f"{left_s:.0f}", *(["--dry-run"] if options.dry_run else [])]
        command += [word for name in options.without for word in ("--without", name)]
        try:
            code = subprocess.run(command, check=False, timeout=left_s + 60).returncode
            reason = f"its process ended with {code}"
        except subprocess.TimeoutExpired:
            code, reason = -9, f"its process was ended after {left_s + 60:.0f} s"
        if code not in {0, 1}:  # it could not write down why itself
            report = _before(path, None)
            report["parts"][part] = {"error": reason}
            _keep(path, report)
    return _before(path, None)


def _before(path: Path | None, device: str | None) -> dict[str, Any]:
    """Return the report so far, empty if it is of another device; None is any device."""
    if path and path.exists():
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if device in {None, report.get("machine", {}).get("device")}:
            return report
    return {"dry_run": False, "machine": {"device": device}, "parts": {}}


def _keep(path: Path | None, report: dict[str, Any]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _default_path() -> Path:
    """Return where the results of this GPU are kept; ConfigError without one."""
    import torch

    from kvstrata.core.errors import ConfigError

    if not torch.cuda.is_available():
        raise ConfigError(
            "no GPU: torch sees none", hint="--dry-run shows on the CPU that all parts run"
        )
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return HERE / "results" / f"gpu-{name}.json"


def main(given: list[str]) -> int:
    """Measure; 1 if a part failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; repeatable")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--limit-s", type=float, default=480.0, help="begin nothing after that")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU; the result is not kept")
    parser.add_argument("--apart", action="store_true", help="a dry run, a process for each part")
    parser.add_argument(
        "--without", choices=("batch", "triton"), action="append", default=[], help="leave it out"
    )
    options = parser.parse_args(given)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from kvstrata.core.errors import ConfigError

    chosen = [part for part in PARTS if part in (options.part or PARTS)]
    apart = len(chosen) > 1 and (options.apart or not options.dry_run)
    if "copies" in chosen and "limits" not in chosen:
        chosen.insert(0, "limits")  # a rate is told over the limit of the same run
    try:
        usual = None if options.dry_run else _default_path()  # refuses without a GPU
        path = options.json or usual
        if apart:
            if path is None:
                parser.error("--apart needs --json in a dry run")
            report = measure_apart(options, chosen, path)
        else:
            report = measure(options, chosen, path)
    except ConfigError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    ran = {part: report["parts"][part] for part in chosen}
    failed = [part for part, each in ran.items() if "error" in each]
    print(f"ran: {', '.join(part for part in ran if part not in failed)}")
    for part in failed:
        print(f"failed: {part}: {ran[part]['error']}")
    for name, reason in report["machine"].get("absent_movers", {}).items():
        print(f"absent: {name}: {reason}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
