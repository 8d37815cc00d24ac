"""KVBM's variables, as kvstrata's."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import Final

from kvstrata.core.errors import ConfigError

__all__ = ["translated"]

log = logging.getLogger("kvstrata.kvbm")

_OURS: Final = ("TLLM_KVSTRATA_CONFIG", "TLLM_KVSTRATA_TIERS", "TLLM_KVSTRATA_ADDRESS")
_HOST, _DISK = "DYN_KVBM_CPU_CACHE_GB", "DYN_KVBM_DISK_CACHE_GB"
_FOLDER: Final = "DYN_KVBM_DISK_CACHE_DIR"
_said: set[str] = set()


def translated(variables: Mapping[str, str]) -> dict[str, str]:
    """Return `variables` with tiers as KVBM's variables ask for them.

    Raises ConfigError for a size that is none. Variables of ours have the last word.
    """
    found = dict(variables)
    if any(variables.get(name) for name in _OURS):
        return found
    tiers = []
    if variables.get(_HOST):
        tiers.append(f"host:{_bytes(_HOST, variables[_HOST])}")
    if variables.get(_DISK):
        folder = variables.get(_FOLDER, "").rstrip("/") or "/tmp"  # noqa: S108  # KVBM's default
        # A folder of this user's own: /tmp is everybody's.
        tiers.append(f"disk:{folder}/kvstrata-{os.geteuid()}:{_bytes(_DISK, variables[_DISK])}")
    if tiers:
        found["TLLM_KVSTRATA_TIERS"] = ",".join(tiers)
    for name in sorted(variables):
        if name.startswith("DYN_KVBM_") and name not in {_HOST, _DISK, _FOLDER, *_said}:
            _said.add(name)
            log.warning("%s is not read by kvstrata; see docs/guides/tensorrt-llm.md", name)
    return found


def _bytes(name: str, text: str) -> int:
    try:
        size = float(text) * 1e9
    except ValueError:
        size = math.nan
    if not 1 <= size < 1e18:  # noqa: PLR2004  # no number is neither
        raise ConfigError(f"{name}: {text!r} is no size in GB", hint="give a number, such as 20")
    return int(size)
