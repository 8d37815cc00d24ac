"""What a visitor sees: `kvstrata demo`, whole, with kill -9 of engine and daemon in the middle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(400)]


def test_demo_keeps_its_promises(tmp_path: Path):
    report = tmp_path / "demo.json"
    # The demo takes the machine as it finds it: without the settings of this lane's own engines.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("VLLM", "OMP"))
    }
    ended = subprocess.run(
        [sys.executable, "-m", "kvstrata.apps.cli.main", "demo", "--json", str(report)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    phases = {phase["name"]: phase["turns"] for phase in json.loads(report.read_text())["phases"]}
    assert list(phases) == ["cold", "warm", "after_restart"]
    assert all(turn["identical"] for turns in phases.values() for turn in turns)
    for name, tier in (("warm", "host"), ("after_restart", "disk")):
        for turn in phases[name]:
            assert turn["tokens_from"][tier] >= 0.95 * turn["full_block_tokens"], (name, turn)
    assert all(not sum(turn["tokens_from"].values()) for turn in phases["cold"])
    cold, warm = (
        max(phases[name], key=lambda turn: turn["prompt_tokens"]) for name in ("cold", "warm")
    )
    # Loading is a copy of 18 MB and computing is 0.4 teraflop: far apart on any machine.
    assert cold["ttft_s"] / warm["ttft_s"] >= 5
    assert "What to try next" in ended.stdout


def test_the_demo_with_an_object_store_survives_the_loss_of_the_slab(
    tmp_path: Path, s3_server, s3_url
):
    report = tmp_path / "demo.json"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("VLLM", "OMP"))
    }
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "kvstrata.apps.cli.main", "demo"),
            *("--json", str(report), "--object", s3_url),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    phases = {phase["name"]: phase["turns"] for phase in json.loads(report.read_text())["phases"]}
    assert list(phases) == ["cold", "warm", "after_restart", "from_object"]
    assert all(turn["identical"] for turns in phases.values() for turn in turns)
    for turn in phases["from_object"]:
        assert turn["tokens_from"]["object"] >= 0.95 * turn["full_block_tokens"], turn
    assert "slab deleted" in ended.stdout
    left = [path for path in s3_server.folder.rglob("*") if path.stat().st_size > 1 << 16]
    assert left == [], "the demo deletes its blocks"
