"""`kvstrata demo --engine sglang`, two turns of it, kill -9 included."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from kit import demo_kept_its_promises

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROGRAM = """
import sys
from pathlib import Path
from kvstrata.apps.cli.demo.play import run_demo
if __name__ == "__main__":
    sys.exit(run_demo(Path(sys.argv[1]), turns=2, engine="sglang"))
"""


def test_the_demo_on_sglang_keeps_its_promises(tmp_path):
    program, report = tmp_path / "program.py", tmp_path / "demo.json"
    program.write_text(PROGRAM)
    ended = subprocess.run(
        [sys.executable, str(program), str(report)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "120"},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    demo_kept_its_promises(report)
