"""House rules that no other tool knows; prints `path:line: rule: sentence`, fails if there is any.

    python tools/tidy.py [ROOT]

What a linter can say is said once, in pyproject.toml: docstrings of modules, classes and functions
are ruff's D1 rules, `print` outside apps and testing is T201, who imports whom is import-linter's.
The tables here are what the house decided; the rules themselves are in tidy_source.py (one file at
a time) and tidy_tree.py (the repository as a whole).
"""

from __future__ import annotations

import sys
from pathlib import Path

import tidy_source
import tidy_tree
from tidy_source import Finding, Source

ALLOWED_WORDS: dict[str, frozenset[str]] = {
    # CUDA's own names of what a batched copy is called with.
    "src/kvstrata/testing/cuda.py": frozenset({"src"}),
    "src/kvstrata/transfer/cuda/movers.py": frozenset({"src"}),
}
"""Path -> banned words that it may use because they name something else there (say why beside it),
for example a chunk of HTTP transfer encoding."""

SEAMS = {
    "Codec": "codec",
    "EvictionPolicy": "eviction-policy",
    "KeyedStore": "keyed-store",
    "TierStore": "tier-store",
    "TransferBackend": "transfer-backend",
}
"""Each seam's Protocol -> its page in docs/contracts/. Its suite is `<Protocol>Contract`."""

NOT_SEAMS: frozenset[str] = frozenset()
"""Protocols in a base.py that third parties do not implement (say why beside it)."""

PYTHON_FOLDERS = ("src", "tests", "tools", "bench", "examples")


def findings(root: Path) -> list[Finding]:
    """Return everything wrong in the repository at `root`, in reading order."""
    files = tidy_tree.repository_files(root)
    sources: list[Source] = []
    found: list[Finding] = []
    for path in files:
        if path.endswith(".py") and path.startswith(tuple(f"{top}/" for top in PYTHON_FOLDERS)):
            try:
                sources.append(Source.parse(root, path))
            except SyntaxError as error:
                found.append(Finding(path, error.lineno or 1, "syntax", f"{error.msg}"))
    records = tidy_tree.record_classes(sources)
    for source in sources:
        found += tidy_source.module_name(source)
        found += tidy_source.todo(source)
        if source.path.startswith(("src/", "tools/")):
            found += tidy_source.size(source)
        if source.path.startswith("src/"):
            found += tidy_source.words(source, ALLOWED_WORDS.get(source.path, frozenset()))
            found += tidy_source.fields(source, records)
            found += tidy_source.hot_path(source)
    found += tidy_tree.dead_modules(root, sources)
    found += tidy_tree.seams(root, sources, SEAMS, NOT_SEAMS)
    found += tidy_tree.machine_paths(root, files)
    found += tidy_tree.lock_files(root)
    return sorted(found)


def main(arguments: list[str]) -> int:
    """Print the findings; 1 if one of them is more than a note."""
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent
    found = findings(root)
    for finding in found:
        print(finding)
    return int(any(finding.rule != "note" for finding in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
