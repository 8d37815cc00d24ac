"""`kvstrata demo --engine transformers`, two turns of it, kill -9 included."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from kit import demo_kept_its_promises

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
    demo_kept_its_promises(report)
    assert "KvstrataCache.for_model" in ended.stdout
