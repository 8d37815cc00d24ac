"""Bugs on order: each breaks one law of the brain, to show that a checker would notice.

A checker that has never failed proves nothing. `tests/property` and `tests/sim` plant each of
these and expect their worlds to fail.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from kvstrata.core.tier import TierName
from kvstrata.manager.offload import Offloading
from kvstrata.manager.onboard import Onboarding, Staged
from kvstrata.manager.storing import Storing
from kvstrata.transfer.base import JobDone

__all__ = [
    "assert_machine_fails",
    "free_a_late_read_at_once",
    "free_slots_of_closed_sessions",
    "keep_stale_writes",
    "register_stale_seals",
    "trust_what_was_read",
]


def trust_what_was_read(patch: pytest.MonkeyPatch) -> None:
    """Register what a read brought without comparing seals."""
    register = Onboarding._register  # noqa: SLF001  # a planted bug sits inside

    def careless(self: Any, read: Any, done: JobDone) -> Any:
        seals = tuple(read.tier.seals[source] for source in read.job.sources)
        return register(self, read, replace(done, checksums=seals))

    patch.setattr(Onboarding, "_register", careless)


def register_stale_seals(patch: pytest.MonkeyPatch) -> None:
    """Let what is being filled or sealed at a clear be registered after it."""
    patch.setattr(Storing, "discard", lambda _: None)


def keep_stale_writes(patch: pytest.MonkeyPatch) -> None:
    """Let a write that began before a clear be found after it."""

    def discard(self: Any, tier: TierName) -> None:
        for edge in self._edges:
            if edge.tier.name == tier:
                edge.backlog.clear()

    patch.setattr(Offloading, "discard", discard)


def free_a_late_read_at_once(patch: pytest.MonkeyPatch) -> None:
    """Give the host slots of a late read to others while it may still write."""

    def give_up(self: Any, read: Any) -> None:
        read.given_up = True
        self._state.host.quarantine_filling(read.job.slots)
        self._state.host.end_quarantine(read.job.slots)
        for name in read.job.keys:
            del self._reading[name]

    def finish(self: Any, done: JobDone, original: Any = Onboarding.finish) -> Any:
        read = self._reads.get(done.transfer)
        if read is not None and read.given_up:
            del self._reads[done.transfer]
            read.source_pin.release()
            return Staged([], read.tier.name, set())
        return original(self, done)

    patch.setattr(Onboarding, "_give_up", give_up)
    patch.setattr(Onboarding, "finish", finish)


def free_slots_of_closed_sessions(patch: pytest.MonkeyPatch) -> None:
    """Treat a closed session as a dead one: its process may still write."""
    patch.setattr(Storing, "quarantine", Storing.reclaim)


def assert_machine_fails(machine: type[RuleBasedStateMachine], steps: int) -> None:
    """Run a machine with a bug planted in it; fail unless one of its assertions fails.

    The examples are fixed, but hypothesis also draws from what other modules have loaded, so the
    bound is far above what any of the plants needs.
    """
    fixed = settings(
        max_examples=5000,
        stateful_step_count=steps,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=fixed)
