"""Says what SGLang's page hash lacks to be compiled here; fails if anything."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path


def missing() -> list[str]:
    """Return the Debian packages that are needed and not there."""
    needed = {
        "g++": shutil.which("g++") is not None,
        "libssl-dev": Path("/usr/include/openssl/sha.h").exists(),
        "python3-dev": Path(sysconfig.get_path("include"), "Python.h").exists(),
    }
    return [package for package, there in needed.items() if not there]


if __name__ == "__main__":
    if missing():
        sys.exit(f"SGLang compiles its page hash; it needs (Debian): {' '.join(missing())}")
