"""How fast an engine is, from the steps that it makes: for any connector, with no engine in it.

Owner: the thread of the connector's scheduler half. Times are the caller's, on one clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

__all__ = ["CopyMeter", "PrefillMeter"]

_STEPS_KEPT: Final = 32
_FLIGHTS_MAX: Final = 64
_PROMPT_SHARE_MIN: Final = 0.5
_FADING: Final = 0.9
"""What the copies so far count when the next one is added."""


@dataclass(frozen=True, slots=True)
class _Flight:
    step: int
    prompt_tokens: int  # 0: its time tells nothing about prompts
    began: float


class PrefillMeter:
    """Prompt tokens per second: the median of the last 32 steps that were mostly prefill.

    A step's time runs from when it was scheduled, or from the end of the step before if that is
    later, to its own end: an engine that schedules ahead is measured right, and one that idles is
    not measured. The median weighs each step by its prompt tokens, so that many short prompts do
    not outvote a long one, and one step that was held up changes nothing.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._flights: deque[_Flight] = deque(maxlen=_FLIGHTS_MAX)
        self._steps: deque[tuple[float, int]] = deque(maxlen=_STEPS_KEPT)  # tokens per s, tokens
        self._last_end = 0.0
        self.tokens_per_s = 0.0

    def scheduled(self, step: int, prompt_tokens: int, all_tokens: int, now: float) -> None:
        """A step was given out that computes so many tokens, of prompts and altogether.

        Steps are numbered upwards. Give 0 prompt tokens for a step whose time is not to count.
        """
        counts = prompt_tokens >= _PROMPT_SHARE_MIN * all_tokens
        self._flights.append(_Flight(step, prompt_tokens if counts else 0, now))

    def ended(self, step: int, now: float) -> None:
        """A step was made; those before it that nobody reported are forgotten."""
        while self._flights and self._flights[0].step <= step:
            flight = self._flights.popleft()
            if flight.step == step and flight.prompt_tokens:
                took = now - max(flight.began, self._last_end)
                if took > 0.0:
                    self._steps.append((flight.prompt_tokens / took, flight.prompt_tokens))
                    self.tokens_per_s = _weighted_median(self._steps)
        self._last_end = max(self._last_end, now)


class CopyMeter:
    """Bytes per second of copies to the engine, the recent ones counting more."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._bytes = self._seconds = 0.0

    @property
    def bytes_per_s(self) -> float:
        """The speed, 0 if nothing was copied yet."""
        return self._bytes / self._seconds if self._seconds > 0.0 else 0.0

    def copied(self, size: int, seconds: float) -> None:
        """So many bytes were copied in so long; what took no time is left out."""
        if size > 0 and seconds > 0.0:
            self._bytes = _FADING * self._bytes + size
            self._seconds = _FADING * self._seconds + seconds


def _weighted_median(steps: deque[tuple[float, int]]) -> float:
    half = sum(tokens for _, tokens in steps) / 2
    for rate, tokens in sorted(steps):
        half -= tokens
        if half <= 0:
            return rate
    raise AssertionError("no steps")
