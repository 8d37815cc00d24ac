"""What vLLM's scheduler and the keeper's thread hand to each other."""

from __future__ import annotations

from dataclasses import dataclass

from kvstrata.core.ids import LineageDigest
from kvstrata.core.retention import BlockHint

__all__ = ["Answered", "Ended", "KeeperCounters", "Load", "Question", "Store"]


@dataclass(slots=True)
class KeeperCounters:
    """What happened so far, in blocks unless said otherwise."""

    asked: int = 0
    """Asked for."""
    found: int = 0
    """Found, ready to be loaded."""
    loaded: int = 0
    """Copied to vLLM."""
    unloaded: int = 0
    """Asked to be loaded and not: gone, torn, too late, or no daemon."""
    torn: int = 0
    """Of these, copied while the slot was given to another block."""
    stored: int = 0
    """Handed to the daemon, or there already."""
    unstored: int = 0
    """Not stored: no slot free, too late, or no daemon."""
    cancelled: int = 0
    """Asked to be loaded or stored and not: vLLM was reset meanwhile."""
    late: int = 0
    """Pieces of work that ended at their time limit."""
    refused: int = 0
    """Pieces of work for which a queue had no room."""
    untold_blocks: int = 0
    """In a tier, and no KV event tells of them: other engines', or too many."""
    missed_changes: int = 0
    """Times that KV events began anew because the daemon had forgotten what came between."""


@dataclass(frozen=True, slots=True)
class Question:
    """Asks whether blocks of one prompt are kept, and ready to be loaded."""

    name: str
    """Under which the daemon holds what is found."""
    mark: str
    """Mark of the blocks' keys."""
    digests: tuple[LineageDigest, ...]
    """The blocks, in the order of the prompt."""
    until: float
    """When it must be answered, on the monotonic clock."""
    keys: tuple[bytes, ...] = ()
    """vLLM's names of the blocks, if it wants to hear of them."""


@dataclass(frozen=True, slots=True)
class Answered:
    """How many leading blocks of a question are ready."""

    question: Question
    """The question."""
    ready: int
    """Leading blocks."""


@dataclass(frozen=True, slots=True)
class Load:
    """Copy kept blocks to rows of vLLM's tier."""

    job: int
    """vLLM's number of the job."""
    mark: str
    """Mark of the blocks' keys."""
    digests: tuple[LineageDigest, ...]
    """The blocks, in the order of the prompt."""
    rows: tuple[int, ...]
    """The row of each."""
    until: float
    """When it must have ended."""


@dataclass(frozen=True, slots=True)
class Store:
    """Copy rows of vLLM's tier to the daemon."""

    job: int
    """vLLM's number of the job."""
    mark: str
    """Mark of the blocks' keys."""
    digests: tuple[LineageDigest, ...]
    """The blocks, in the order of the prompt."""
    rows: tuple[int, ...]
    """The row of each."""
    parent: LineageDigest | None
    """The block before the first, None if that is the root or not known."""
    tenant: str
    """Who is charged."""
    hints: list[BlockHint]
    """How long blocks among them are to be kept."""
    until: float
    """When it must have ended."""
    keys: tuple[bytes, ...] = ()
    """vLLM's names of the blocks, if it wants to hear of them."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A load or store that touches no row any more."""

    job: int
    """vLLM's number of the job."""
    good: int
    """Leading blocks that were copied, or that the daemon has already."""
    count: int
    """Blocks of the job."""
    took_s: float
    """How long its copies and calls took."""
