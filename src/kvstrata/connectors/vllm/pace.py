"""How often the daemon is asked again for what it is still bringing.

vLLM asks for a waiting request in each step, and with nothing to compute its steps follow one
another without pause: thousands of questions a second. They would take from the daemon the core on
which it brings what they are about.
"""

from __future__ import annotations

import time
from typing import Final

__all__ = ["ASK_AGAIN_S", "Pace"]

ASK_AGAIN_S: Final = 0.002
"""Earlier the daemon is not asked again for the same request."""
_REST_S: Final = 0.0005


class Pace:
    """Rests where the engine has nothing to do. Owner: the engine core's thread."""

    def __init__(self) -> None:
        """Begin busy."""
        self._idle = False

    def planned(self, *, computes: bool) -> None:
        """Note whether the step at hand computes anything."""
        self._idle = not computes

    def rest(self) -> None:
        """Rest for a moment, at most once a step, if the step before computed nothing."""
        if self._idle:
            self._idle = False
            time.sleep(_REST_S)
