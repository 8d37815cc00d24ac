"""`bench/gpu.py` on the CPU: all of it runs, and without what a bare GPU machine lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
RUN = """
import runpy, sys
for name in ("msgspec", "blake3", "pydantic", "pydantic_settings", "xxhash", "zmq"):
    sys.modules[name] = None  # not on a GPU machine
sys.path.insert(0, str(sys.argv[1]))
sys.argv = ["gpu.py", *sys.argv[2:]]
runpy.run_path(sys.path[0] + "/gpu.py", run_name="__main__")
"""


def run(*options):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", RUN, str(BENCH), *options],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.transformers
@pytest.mark.slow
def test_the_dry_run_goes_through_every_part_and_keeps_nothing(tmp_path):
    before = sorted((BENCH / "results").iterdir())
    done = run("--dry-run", "--json", str(tmp_path / "dry.json"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "ran: limits, copies, interference, exact, ttft" in done.stdout
    assert sorted((BENCH / "results").iterdir()) == before
    report = json.loads((tmp_path / "dry.json").read_text())
    assert report["dry_run"] is True
    parts = {name: part["result"] for name, part in report["parts"].items()}
    for line in parts["copies"]:
        assert {"fragments", "torch", "runs", "batch"} <= set(line["ways"])
    assert parts["exact"]["copies_checked"] >= 4 * 2 * 8
    (hit,) = parts["ttft"]
    assert hit["runs"]["same_token"]
    assert hit["runs"]["logits_difference_max"] < 1e-3


@pytest.mark.transformers
@pytest.mark.slow
def test_parts_in_processes_of_their_own_write_one_report(tmp_path):
    out = tmp_path / "dry.json"
    chosen = ("--part", "limits", "--part", "exact", "--without", "triton")
    done = run("--dry-run", "--apart", *chosen, "--json", str(out))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(out.read_text())
    assert set(report["parts"]) == {"limits", "exact"}
    assert report["machine"]["absent_movers"]["triton"] == "left out, as asked"


@pytest.mark.transformers
def test_a_part_that_fails_is_told_and_the_next_one_runs(tmp_path):
    out = tmp_path / "dry.json"
    done = run(
        "--dry-run", "--part", "limits", "--part", "exact", "--limit-s", "0", "--json", str(out)
    )
    assert done.returncode == 1
    assert "failed: limits: not begun" in done.stdout
    assert set(json.loads(out.read_text())["parts"]) == {"limits", "exact"}


@pytest.mark.transformers
def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here: this is about machines without one")
    done = run("--json", str(tmp_path / "none.json"))
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert not list(tmp_path.iterdir())
