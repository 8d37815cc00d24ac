"""The example runs as it stands, and prints what its guide promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.transformers, pytest.mark.timeout(300)]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "transformers_example.py"


def test_the_transformers_example_runs(tmp_path):
    ended = subprocess.run(
        [sys.executable, str(EXAMPLE)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = ended.stdout.splitlines()
    assert lines == [
        "of 300 tokens loaded 0 from -",
        "of 300 tokens loaded 256 from memory",
        "of 300 tokens loaded 256 from disk",
        "the answers are the same",
    ]
