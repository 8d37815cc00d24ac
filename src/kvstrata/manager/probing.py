"""Probing: asking keyed tiers for blocks that nobody told us of, because other daemons wrote them.

A lookup that would miss asks each keyed tier, in the background, whether it has the first keys
that are nowhere, and the request is pending meanwhile, for a bounded time. What is there is adopted
and then staged like anything else. What is not there is remembered for a while, so that a prompt
that nobody stored costs one question and not one a lookup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvstrata.core.ids import SequenceHash, TransferId
from kvstrata.core.tier import TierName
from kvstrata.manager.lineage import Found
from kvstrata.manager.state import BrainState, LowerTier
from kvstrata.storage.base import NOBODY
from kvstrata.transfer.base import JobDone, Lineage, ProbeJob

__all__ = ["Probing", "Unknown"]

_JOBS_MAX: Final = 64
_ABSENT_MAX: Final = 65_536


@dataclass(frozen=True, slots=True)
class Unknown:
    """A block that is nowhere, as far as we know."""

    key: SequenceHash
    """Its key."""
    parent: SequenceHash | None
    """The key of the block before it."""


@dataclass(slots=True)
class _Probe:
    job: ProbeJob
    tier: LowerTier
    parents: tuple[SequenceHash | None, ...]
    deadline: float
    given_up: bool = False


class Probing:
    """Questions under way, and the keys that are known not to be there."""

    def __init__(self, state: BrainState) -> None:
        self._state = state
        self._probes: dict[TransferId, _Probe] = {}
        self._asked: dict[tuple[TierName, SequenceHash], TransferId] = {}
        self._absent: dict[tuple[TierName, SequenceHash], float] = {}
        self._keyed = [tier for tier in state.lower if tier.keyed]

    @property
    def in_flight(self) -> int:
        """Jobs given out and not ended."""
        return len(self._probes)

    @property
    def useful(self) -> bool:
        """Whether there is anybody to ask."""
        return bool(self._keyed) and self._state.limits.probe_blocks_max > 0

    def ask(self, unknown: Sequence[Unknown]) -> bool:
        """Ask for `unknown`, the nearest one to the root first; return whether to wait for answers.

        Not if the first one is known not to be there: no later one would help.
        """
        first = unknown[0].key
        asked = [self._ask_tier(tier, unknown, first) for tier in self._keyed]
        return any(asked)

    def give_up_late(self, now: float) -> list[TransferId]:
        """Stop waiting for answers past their deadline; return the jobs, to be cancelled."""
        late = []
        for transfer, probe in self._probes.items():
            if not probe.given_up and now >= probe.deadline:
                self._forget(probe)
                probe.given_up = True
                probe.tier.rests_until = now + self._state.limits.rest_s
                late.append(transfer)
        return late

    def finish(self, done: JobDone) -> tuple[TierName, list[Found]] | None:
        """Take the end of a job; None if it was not one of ours, else what is there."""
        probe = self._probes.pop(done.transfer, None)
        if probe is None:
            return None
        state, tier = self._state, probe.tier
        if probe.given_up:
            return tier.name, []
        self._forget(probe)
        if done.reason:
            tier.rests_until = state.now + state.limits.rest_s
            return tier.name, []
        found = []
        for key, parent, there in zip(probe.job.keys, probe.parents, done.ok, strict=True):
            # One that is there and finds no room is not asked for at once again either.
            self._absent[tier.name, key] = state.now + state.limits.probe_again_s
            if there:
                found.append(Found(key, Lineage(parent, NOBODY)))
        while len(self._absent) > _ABSENT_MAX:
            del self._absent[next(iter(self._absent))]
        state.counters.probed_blocks += len(done.ok)
        state.counters.found_blocks += len(found)
        return tier.name, found

    # -- private -------------------------------------------------------------------------------

    def _ask_tier(self, tier: LowerTier, unknown: Sequence[Unknown], first: SequenceHash) -> bool:
        state = self._state
        if (tier.name, first) in self._asked:
            return True
        rests = state.now < tier.rests_until or len(self._probes) >= _JOBS_MAX
        if rests or self._is_absent(tier, first):
            return False
        wanted = [
            each
            for each in unknown
            if (tier.name, each.key) not in self._asked and not self._is_absent(tier, each.key)
        ]
        job = ProbeJob(state.next_transfer(), tier.name, tuple(each.key for each in wanted))
        parents = tuple(each.parent for each in wanted)
        deadline = state.now + min(state.limits.probe_timeout_s, state.limits.staging_timeout_s)
        self._probes[job.transfer] = _Probe(job, tier, parents, deadline)
        self._asked.update(((tier.name, key), job.transfer) for key in job.keys)
        state.outbox.append(job)
        return True

    def _is_absent(self, tier: LowerTier, key: SequenceHash) -> bool:
        until = self._absent.get((tier.name, key))
        if until is not None and self._state.now >= until:
            del self._absent[tier.name, key]
            return False
        return until is not None

    def _forget(self, probe: _Probe) -> None:
        for key in probe.job.keys:
            self._asked.pop((probe.tier.name, key), None)
