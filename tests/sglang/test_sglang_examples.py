"""The example runs as it stands, and prints what its guide promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "sglang_example.py"


def test_the_sglang_example_runs(tmp_path):
    ended = subprocess.run(
        [sys.executable, str(EXAMPLE)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = ended.stdout.splitlines()
    assert "first time: of 300 tokens loaded {}" in lines
    assert "again: of 300 tokens loaded {'device': 0, 'host': 0, 'storage': 256}" in lines
    assert "the answers are the same" in lines
