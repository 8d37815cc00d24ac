"""One request of a trace, whatever its format, and what is wrong with a file that is no trace."""

from __future__ import annotations

from dataclasses import dataclass

from kvstrata.core.errors import ConfigError
from kvstrata.core.ids import SequenceHash

__all__ = ["TraceError", "TraceInfo", "TraceRequest"]


class TraceError(ConfigError):
    """A trace that cannot be read; the message names file, line and field."""


@dataclass(frozen=True, slots=True)
class TraceInfo:
    """What is true of a whole trace."""

    format: str
    """Name of the format."""
    block_tokens: int
    """Tokens that one block stands for."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """What a simulator needs to know of one request."""

    arrival_s: float
    """Seconds since the first request of the trace."""
    blocks: list[SequenceHash]
    """One key per block of the prompt, root first; equal keys mean equal prefixes up to there."""
    prompt_tokens: int
    """Length of the prompt."""
    output_tokens: int
    """Length of the answer."""
    session: str = ""
    """The conversation, where the format says so."""
    tenant: str = ""
    """Whose request it is, where the format says so."""
