"""Which blocks of which requests are saved: full, new, and in pages that exist.

Owner: the executor's thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvstrata.connectors.trtllm.account import Statistics
from kvstrata.connectors.trtllm.desk import Desk
from kvstrata.connectors.trtllm.jobs import PageCopy, Report, SaveJob
from kvstrata.connectors.trtllm.lines import Line
from kvstrata.connectors.trtllm.pages import EnginePages
from kvstrata.connectors.trtllm.requests import Tracked
from kvstrata.core.errors import DaemonError
from kvstrata.core.ids import SequenceHash

__all__ = ["Saver"]


@dataclass(slots=True)
class _Saving:
    tracked: Tracked
    epoch: int
    slots: list[int]
    void: bool = False  # its pages were given to others while it was copied


class Saver:
    """Plans saves, and hands over or gives back what became of them."""

    def __init__(  # the parts of one keeper
        self,
        line: Line,
        desk: Desk,
        pages: EnginePages,
        statistics: Statistics,
        jobs: Iterator[int],
    ) -> None:
        """Save, numbering jobs by `jobs`."""
        self._line, self._desk, self._pages = line, desk, pages
        self._statistics, self._jobs = statistics, jobs
        self._block_tokens = line.block_tokens
        self._places = self._block_tokens // pages.page_tokens
        self._saves: dict[int, _Saving] = {}  # by job

    def plan(self, tracked: Tracked) -> SaveJob | None:
        """Reserve slots for the blocks that are full and new; return the copy if there is one.

        Raises nothing: what cannot be saved is computed again one day.
        """
        if not tracked.usable or not self._line.up:
            return None
        try:
            first, hashes, rows = self._full_blocks(tracked)
            if not rows:
                return None
            reserved = self._line.reserve(tracked, first, hashes[: first + len(rows)])
        except DaemonError as error:
            self._line.note(error)
            return None
        tracked.saved_blocks = first + len(rows)
        self._statistics.throttled_blocks += reserved.throttled
        if not reserved.slots:
            return None
        copy = PageCopy([], [], [[] for _ in range(self._pages.groups)])
        for slot, index in zip(reserved.slots, reserved.indices, strict=True):
            for place, row in enumerate(rows[index]):
                copy.slots.append(slot)
                copy.places.append(place)
                for pages, page in zip(copy.pages, row, strict=True):
                    pages.append(page)
        job = SaveJob(next(self._jobs), tracked.request, tracked.epoch, copy)
        self._saves[job.id] = _Saving(tracked, tracked.epoch, reserved.slots)
        self._desk.open(job)
        return job

    def void(self, request: int) -> None:
        """Give up the request's saves under way: its pages may hold somebody else's KV by now."""
        for saving in self._saves.values():
            saving.void = saving.void or saving.tracked.request == request

    def ended(self, report: Report) -> None:
        """Tell the daemon what became of a save."""
        saving = self._saves.pop(report.job, None)
        if saving is None:
            return
        good = report.done and not saving.void
        if good:
            self._statistics.saved_blocks += len(saving.slots)
        else:
            self._statistics.unsaved_blocks += len(saving.slots)
        self._line.hand_over(saving.tracked.name, saving.epoch, saving.slots, good=good)

    def _full_blocks(
        self, tracked: Tracked
    ) -> tuple[int, list[SequenceHash], list[list[list[int]]]]:
        """Return (first block, all keys, for each new full block the pages of its places)."""
        last = tracked.computed // self._block_tokens
        if last <= tracked.saved_blocks and tracked.epoch == self._line.epoch:
            return 0, [], []
        try:
            hashes = self._line.hashes(tracked, last)
        except ValueError:
            self._statistics.spoil(tracked, "odd token ids")
            return 0, [], []
        rows: list[list[list[int]]] = []
        for block in range(tracked.saved_blocks, last):
            start = block * self._places
            places = [tracked.row(start + n, tracked.pages) for n in range(self._places)]
            told = [row for row in places if row is not None]
            if len(told) < self._places:
                break  # not told yet
            bad = sum(not self._pages.is_page(row) for row in told)
            if bad:
                self._statistics.bad_pages += bad
                # Later blocks hang on this one.
                self._statistics.spoil(tracked, "a page that does not exist")
                break
            rows.append(told)
        return tracked.saved_blocks, hashes, rows
