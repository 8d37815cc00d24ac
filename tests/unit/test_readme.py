"""The README's example is run as it stands there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
MARKER = "<!-- test: client -->\n"


def example() -> str:
    """Return the Python block that follows the marker."""
    before, found, after = README.read_text(encoding="utf-8").partition(MARKER)
    assert found, f"README.md has no line {MARKER!r}"
    opening, fence, rest = after.partition("```python\n")
    assert fence, "no python block follows the marker"
    assert not opening.strip(), f"not the block but {opening!r} follows the marker"
    code, fence, _ = rest.partition("\n```\n")
    assert fence, "the block does not end"
    assert MARKER not in before
    return code + "\n"


def test_the_client_example_runs(tmp_path, run_directory) -> None:
    assert run_directory.is_dir()
    code = example()
    assert "kvstrata" in code
    program = tmp_path / "example.py"
    program.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
