"""The loads that SGLang has queued for the batch being built: on every rank the same ones.

Between the answer to a question and its load one rank's pages may go (its daemon ends, a hold runs
out). What one rank cannot lease no rank loads, and SGLang computes it on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvstrata.connectors.sglang.leases import Lease, Leases
from kvstrata.core.ids import LineageDigest

__all__ = ["QueuedLoads"]


class QueuedLoads:
    """Leases of requests whose copy has not begun. For SGLang's scheduler thread only."""

    def __init__(self, leases: Leases, vote: Callable[[bool], bool]) -> None:
        """`vote` returns whether every rank was called with true; each is called as often."""
        self._leases = leases
        self._vote = vote
        self._queued: dict[str, Lease] = {}

    def add(
        self, request: str, named: tuple[Sequence[LineageDigest], Sequence[int]] | None
    ) -> bool:
        """Lease pages for a request, `(digests, pages of the device)`; None is a load to refuse.

        True if every rank has leased its part; else nothing is held, on no rank.
        """
        lease = None
        if named is None or request in self._queued:
            self._leases.drop(request)
        else:
            lease = self._leases.take(request, *named)
        everywhere = self._vote(lease is not None)
        if lease is None:
            return False
        if not everywhere:
            self._leases.give_up(lease)
            return False
        self._queued[request] = lease
        return True

    def cancel(self, request: str) -> bool:
        """Give up a load that has not begun; False if there is none."""
        lease = self._queued.pop(request, None)
        if lease:
            self._leases.end([lease])
        return lease is not None

    def take(self) -> list[Lease]:
        """Return every queued load, in order; none is queued any more."""
        batch, self._queued = list(self._queued.values()), {}
        return batch

    def forget(self) -> None:
        """Queue nothing any more; the leases are somebody else's to end."""
        self._queued.clear()
