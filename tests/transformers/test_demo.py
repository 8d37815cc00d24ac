"""`kvstrata demo --engine transformers`, two turns of it, kill -9 included."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.transformers, pytest.mark.slow, pytest.mark.timeout(400)]

PROGRAM = """
import sys
from pathlib import Path
from kvstrata.apps.cli.demo.play import run_demo
sys.exit(run_demo(Path(sys.argv[1]), turns=2, engine="transformers"))
"""


def test_the_demo_on_transformers_keeps_its_promises(tmp_path):
    pytest.importorskip("transformers", reason="no transformers installed")
    report = tmp_path / "demo.json"
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(report)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "120"},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    phases = {phase["name"]: phase["turns"] for phase in json.loads(report.read_text())["phases"]}
    assert list(phases) == ["cold", "warm", "after_restart"]
    assert all(turn["identical"] for turns in phases.values() for turn in turns)
    assert all(not sum(turn["tokens_from"].values()) for turn in phases["cold"])
    for name, tier in (("warm", "host"), ("after_restart", "disk")):
        for turn in phases[name]:
            assert turn["tokens_from"][tier] == turn["full_block_tokens"], (name, turn)
            assert sum(turn["tokens_from"].values()) == turn["full_block_tokens"]
    assert "KvstrataCache.for_model" in ended.stdout
