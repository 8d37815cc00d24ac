"""The seam for movers of bytes, and the jobs that the brain gives out. Pure: values only.

Laws and tests: docs/contracts/transfer-backend.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypeAlias

from kvstrata.core.ids import SequenceHash, SlotId, TransferId
from kvstrata.core.tier import TierName

__all__ = [
    "Completion",
    "CopyOp",
    "EraseJob",
    "Job",
    "JobDone",
    "Lineage",
    "Outcome",
    "ProbeJob",
    "ReadJob",
    "SealJob",
    "TransferBackend",
    "WriteJob",
]


@dataclass(frozen=True, slots=True)
class CopyOp:
    """One contiguous move, covering `count` slot pairs from the `first`-th of its plan."""

    source_offset: int
    """Where to read, in bytes from the start of the source region."""
    target_offset: int
    """Where to write, in bytes from the start of the target region."""
    length: int
    """How many bytes."""
    first: int = 0
    """Index of the first slot pair in the plan."""
    count: int = 1
    """Number of slot pairs that the move carries."""


class Outcome(Enum):
    """How a transfer ended."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Completion:
    """The single end of one accepted transfer."""

    transfer: TransferId
    """Which one."""
    outcome: Outcome
    """DONE only if every op moved every byte."""
    failed_ops: tuple[int, ...] = ()
    """Indices of the ops whose bytes must not be used; all of them if CANCELLED."""
    reason: str = ""
    """What went wrong, for people."""


class TransferBackend(Protocol):
    """Moves bytes between a source and a target region.

    Every accepted transfer completes exactly once, also after `cancel`. No call blocks on I/O.
    Bytes of a transfer may still arrive until its completion was polled, and never after.
    """

    def submit(self, transfer: TransferId, ops: Sequence[CopyOp], source: Any, target: Any) -> bool:
        """Accept the transfer, or return False and do nothing: it is full or closed."""

    def poll(self) -> list[Completion]:
        """Return the completions since the last poll."""

    def cancel(self, transfer: TransferId) -> None:
        """Ask for an early end; harmless if it has ended. It still completes."""

    def capabilities(self) -> frozenset[tuple[str, str]]:
        """Return the (source, target) pairs it serves, of `memory` and `file`."""

    def close(self) -> None:
        """Finish what runs, drop what waits, stop; twice is harmless."""


@dataclass(frozen=True, slots=True)
class SealJob:
    """Compute the seals of host slots that a writer has filled."""

    transfer: TransferId
    """Names the job."""
    slots: tuple[SlotId, ...]
    """Host slots."""
    keys: tuple[SequenceHash, ...]
    """The key of each."""


@dataclass(frozen=True, slots=True)
class ReadJob:
    """Bring blocks from a lower tier to the host and compute the seals of what arrived."""

    transfer: TransferId
    """Names the job."""
    tier: TierName
    """Where they come from."""
    sources: tuple[SlotId, ...]
    """Slots there."""
    slots: tuple[SlotId, ...]
    """Host slots, one for each source."""
    keys: tuple[SequenceHash, ...]
    """The key of each."""


@dataclass(frozen=True, slots=True)
class WriteJob:
    """Verify host blocks against their seals, then write them and their index lines to a tier."""

    transfer: TransferId
    """Names the job."""
    tier: TierName
    """Where they go."""
    slots: tuple[SlotId, ...]
    """Host slots."""
    targets: tuple[SlotId, ...]
    """Slots there, one for each host slot."""
    keys: tuple[SequenceHash, ...]
    """The key of each."""
    parents: tuple[SequenceHash | None, ...]
    """The parent key of each."""
    checksums: tuple[bytes, ...]
    """The seal of each."""
    written: int
    """Write counter of the last block; earlier ones, nearer the root, count up from it."""
    owners: tuple[bytes, ...] = ()
    """For each block the tag of who is charged for it; empty for nobody."""


@dataclass(frozen=True, slots=True)
class EraseJob:
    """Make a tier's blocks unfindable for good, for a restart too.

    Of a tier in slots their index lines are blanked; of a keyed tier, blocks are deleted.
    """

    transfer: TransferId
    """Names the job."""
    tier: TierName
    """Where."""
    targets: tuple[SlotId, ...]
    """Slots there; empty for a keyed tier."""
    keys: tuple[SequenceHash, ...] = ()
    """Keys there, if it is a keyed tier."""


@dataclass(frozen=True, slots=True)
class ProbeJob:
    """Ask a keyed tier which of these blocks it has; JobDone's `ok` says it for each."""

    transfer: TransferId
    """Names the job."""
    tier: TierName
    """Where."""
    keys: tuple[SequenceHash, ...]
    """Their keys."""


Job: TypeAlias = SealJob | ReadJob | WriteJob | EraseJob | ProbeJob


@dataclass(frozen=True, slots=True)
class Lineage:
    """What the header of a block in a keyed tier says besides its key."""

    parent: SequenceHash | None
    """The key of the block before it."""
    owner: bytes
    """Tag of who is charged for it."""


@dataclass(frozen=True, slots=True)
class JobDone:
    """The single end of one job: which of its blocks succeeded, and the seals computed."""

    transfer: TransferId
    """Which job."""
    ok: tuple[bool, ...]
    """For each block of the job, whether every byte of it moved."""
    checksums: tuple[bytes, ...] = field(default=())
    """For each block the seal of its bytes in the host slot; empty for an erase."""
    reason: str = ""
    """What went wrong, for people; empty if nothing did."""
    lost: tuple[int, ...] = ()
    """Of a read from a keyed tier, which blocks are not there, or not for us, and will not be."""
    damaged: tuple[int, ...] = ()
    """Of a read from a keyed tier, which blocks were not what their headers said; deleted there."""
    lineage: tuple[Lineage | None, ...] = ()
    """Of a read from a keyed tier, what each block's header says; None where it was not read."""
