"""Deleting from keyed tiers: what was evicted, cleared or expired there must go for good.

A tier in slots forgets by blanking an index line; a keyed tier has none, so its blocks are deleted,
some at a time and in the background. What could not be deleted is tried again, for as long as
the daemon runs: a clear is whole once nothing is left to delete.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import islice
from typing import Final

from kvstrata.core.ids import SequenceHash, TransferId
from kvstrata.manager.state import BrainState, LowerTier
from kvstrata.transfer.base import EraseJob, JobDone

__all__ = ["KEYS_MAX", "Deleting"]

KEYS_MAX: Final = 1000
"""Keys in one job: what one request to an object store may delete."""
_JOBS_MAX: Final = 2  # of one tier at once; the rest waits and makes larger jobs


class Deleting:
    """Keys that wait to be deleted, and the jobs under way."""

    def __init__(self, state: BrainState) -> None:
        self._state = state
        self._jobs: dict[TransferId, EraseJob] = {}

    @property
    def pending(self) -> int:
        """Jobs under way and keys waiting for one, those left aside that wait to be tried again."""
        now = self._state.now
        waiting = [tier for tier in self._state.lower if now >= tier.delete_after]
        return len(self._jobs) + sum(len(tier.doomed) for tier in waiting)

    def going(self, tier: LowerTier) -> set[SequenceHash]:
        """Return the keys that are being deleted from `tier`."""
        return {key for job in self._jobs.values() if job.tier == tier.name for key in job.keys}

    def doom(self, tier: LowerTier, keys: Iterable[SequenceHash]) -> None:
        """Delete `keys` of a keyed `tier`, soon; of more than the backlog holds, the rest stays."""
        room = self._state.limits.offload_backlog_blocks_max + tier.pool.slots_total
        for key in keys:
            if len(tier.doomed) < room:
                tier.doomed[key] = None
            else:
                self._state.counters.undeleted_blocks += 1

    def spare(self, tier: LowerTier, keys: Collection[SequenceHash]) -> None:
        """Do not delete `keys`: they are written again; jobs that began go before that write."""
        if tier.doomed:
            for key in keys:
                tier.doomed.pop(key, None)

    def pump(self) -> None:
        """Start as many jobs as the limits allow."""
        for tier in self._state.lower:
            running = sum(job.tier == tier.name for job in self._jobs.values())
            while tier.doomed and running < _JOBS_MAX and self._state.now >= tier.delete_after:
                keys = tuple(islice(tier.doomed, KEYS_MAX))
                job = EraseJob(self._state.next_transfer(), tier.name, (), keys)
                self.spare(tier, job.keys)
                self._jobs[job.transfer] = job
                self._state.outbox.insert(0, job)  # it makes room for what is written
                running += 1

    def finish(self, done: JobDone) -> bool:
        """Take the end of a job; False if it was not one of ours."""
        job = self._jobs.pop(done.transfer, None)
        if job is None:
            return False
        tier = self._state.tier(job.tier)
        left = [key for key, ok in zip(job.keys, done.ok, strict=True) if not ok]
        self._state.counters.deleted_blocks += len(job.keys) - len(left)
        if left:
            tier.delete_after = self._state.now + self._state.limits.delete_retry_s
            self.doom(tier, [key for key in left if key not in tier.pool])
        return True
