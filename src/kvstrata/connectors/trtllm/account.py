"""What the connector did, and what it left out and why."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from kvstrata.connectors.trtllm.requests import Tracked

__all__ = ["Statistics"]

log = logging.getLogger("kvstrata.trtllm")


@dataclass(slots=True)
class Statistics:
    """What was offered, loaded, saved and left out, since the engine started."""

    asked: int = 0
    """Requests that the engine asked for."""
    offered_tokens: int = 0
    """Tokens that it was told it can have."""
    loaded_pages: int = 0
    """Pages that were filled."""
    called_off: int = 0
    """Offers that the engine did not want after all, wholly or in part."""
    saved_blocks: int = 0
    """Blocks handed over to the daemon."""
    unsaved_blocks: int = 0
    """Blocks whose slot was given back: the copy failed, came late or was given up."""
    throttled_blocks: int = 0
    """Blocks for which the daemon had no room."""
    bad_pages: int = 0
    """Page numbers that name no page; skipped."""
    mid_page: int = 0
    """Questions behind a part of a page: the engine reuses partial blocks, and we cannot."""
    unserved: dict[str, int] = field(default_factory=dict)
    """Requests that are neither loaded nor saved, or no longer, by reason."""

    def spoil(self, tracked: Tracked, why: str) -> None:
        """Serve a request no longer; count it, and say the reason the first time."""
        if tracked.usable:
            tracked.usable = False
            if why not in self.unserved:
                log.warning("kvstrata does not serve a request: %s (said once)", why)
            self.unserved[why] = self.unserved.get(why, 0) + 1
