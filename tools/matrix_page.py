"""Writes docs/matrix.md from the matrix of the package; tests/unit/test_matrix.py compares.

python tools/matrix_page.py
"""

from __future__ import annotations

from pathlib import Path

from kvstrata.apps.cli.matrix import markdown

PAGE = Path(__file__).resolve().parent.parent / "docs" / "matrix.md"


def main() -> None:
    """Write the page."""
    PAGE.write_text(markdown(), encoding="utf-8")


if __name__ == "__main__":
    main()
