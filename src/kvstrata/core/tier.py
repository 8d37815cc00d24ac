"""The tiers a block can live in, nearest to the engine first."""

from __future__ import annotations

from enum import Enum

__all__ = ["Tier"]


class Tier(Enum):
    """Where a block's bytes are. The value is the word used in configuration and output."""

    HOST = "host"
    DISK = "disk"
