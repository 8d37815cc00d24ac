"""The benchmark runs beside its peer; what it measures is not a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

BENCH = Path(__file__).parents[2] / "bench" / "micro.py"


def test_micro_compares_every_operation_with_its_peer(tmp_path):
    report = tmp_path / "micro.json"
    ended = subprocess.run(
        [sys.executable, str(BENCH), "--quick", "--json", str(report)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(report.read_text())
    assert {"hash", "match", "store", "use"} <= {row["operation"] for row in found["results"]}
    for row in found["results"]:
        assert row["ours_us"] > 0
        assert row["ratio_to_peer"] > 0, row
