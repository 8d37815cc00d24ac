"""What the scheduler half does with its requests: offers, loads, saves, and their ends.

    asked --(found, held, verified)--> offered --(pages)--> loading --(report)--> computing
      |                                   |
      |                                   +--(cancel_load, reset, end)--> the hold is released
      +--> computing --(blocks full)--> saving --(report)--> sealed, or aborted

Owner: the executor's thread. A request may end while its jobs go on; their reports end them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any, Final

from kvstrata.connectors.speeds import CopyMeter, PrefillMeter
from kvstrata.connectors.trtllm.account import Statistics
from kvstrata.connectors.trtllm.canary import fly_canary
from kvstrata.connectors.trtllm.desk import Desk
from kvstrata.connectors.trtllm.jobs import LoadJob, PageCopy, Report, StepPlan
from kvstrata.connectors.trtllm.lines import Line
from kvstrata.connectors.trtllm.pages import EnginePages
from kvstrata.connectors.trtllm.requests import Offer, Tracked, read_identity
from kvstrata.connectors.trtllm.saver import Saver
from kvstrata.connectors.trtllm.settings import ConnectorSettings
from kvstrata.core.errors import DaemonError
from kvstrata.runtime.session import Session

__all__ = ["Keeper"]

_POLL_S: Final = 0.001


class Keeper:
    """The requests of one engine."""

    def __init__(
        self, session: Session, desk: Desk, pages: EnginePages, settings: ConnectorSettings
    ) -> None:
        """Serve over an opened session."""
        self.session = session
        self.statistics = Statistics()
        self._line = Line(session, desk, pages.page_bytes, settings.tenant)
        self._desk, self._pages, self._settings = desk, pages, settings
        self._block_tokens = session.layout.block_tokens
        self._places = self._block_tokens // pages.page_tokens
        # What was offered without pages may be called off; then nobody may be waiting for it.
        self._background = settings.background and pages.whole_offers
        self._requests: dict[int, Tracked] = {}
        self._loads: dict[int, Tracked] = {}  # by job
        self._names = map("r{}".format, itertools.count(1))
        self._jobs = itertools.count(1)
        self._saver = Saver(self._line, desk, pages, self.statistics, self._jobs)
        self._steps = itertools.count(1)
        self._step_ended = 0
        self._prefill, self._copies = PrefillMeter(), CopyMeter()

    def open(self) -> None:
        """Map the arena and fly the canary; raises ConfigError or DaemonError."""
        self._line.attach()
        fly_canary(self.session, self._desk, self._pages)
        self._desk.settle = self._settle

    def close(self) -> None:
        """Let the copies end, hand over what they saved, leave the daemon; twice is harmless."""
        self._desk.settle = None
        if self._desk.mover:
            self._desk.mover.close()
        self._settle()
        self.session.close()
        self._desk.close()

    # -- matching ------------------------------------------------------------------------------

    def ask(self, request: Any, computed_tokens: int) -> tuple[int, bool]:
        """Return how many tokens behind `computed_tokens` are offered, and whether beside steps."""
        self._settle()
        self.statistics.asked += 1
        tracked = self._begin(request)
        if not tracked.usable or not self._line.ready():
            return 0, False
        if computed_tokens % self._pages.page_tokens:
            self.statistics.mid_page += 1
            return 0, False
        try:
            offer = self._find(tracked, computed_tokens)
        except DaemonError as error:
            self._line.note(error)
            offer = None
        if offer is None:
            self._line.release(tracked)
            return 0, False
        tracked.offer = offer
        tokens = (offer.last - offer.first) * self._pages.page_tokens
        self.statistics.offered_tokens += tokens
        return tokens, self._background

    def allocated(self, request: int, groups: Sequence[Sequence[int]]) -> None:
        """Take the pages for an offer; within steps they are told with the step."""
        tracked = self._requests.get(request)
        if tracked is None or tracked.offer is None or not self._background:
            return
        if tracked.allocated is None:
            self._desk.promise_load(request)
        tracked.allocated = [list(each) for each in groups]

    def cancel(self, request: int, start: int, end: int) -> None:
        """Take back the offer of tokens from `start` up to `end`, as far as it is still ours."""
        tracked = self._requests.get(request)
        offer = tracked.offer if tracked else None
        if tracked is None or offer is None:
            return  # handed over: the copy is harmless, the engine computes over it
        size = self._pages.page_tokens
        first, last = offer.first, offer.last
        if start <= first * size and end >= last * size:
            first = last
        elif start <= first * size:
            first = min(last, max(first, end // size))
        elif end >= last * size:
            last = max(first, min(last, -(-start // size)))
        self.statistics.called_off += (first, last) != (offer.first, offer.last)
        if first >= last:
            self._drop_offer(tracked)
        else:
            tracked.offer = Offer(first, last, offer.slots, offer.generations)

    # -- each step -----------------------------------------------------------------------------

    def plan(self, output: Any) -> StepPlan:
        """Return the step's loads, and the saves of blocks that it completes."""
        self._settle()
        told = [*output.new_requests, *output.cached_requests]
        plan = StepPlan(step=next(self._steps) if told else 0)
        scheduled = [
            *self._note_all(output.new_requests, new=True),
            *self._note_all(output.cached_requests, new=False),
        ]
        for tracked in list(self._requests.values()):
            if tracked.offer and tracked.allocated is not None:
                self._plan_load(plan, tracked, tracked.allocated)
        for tracked in scheduled:
            if tracked.offer and not self._background:
                self._plan_load(plan, tracked, tracked.pages)
            if not self._pages_kept(tracked):
                self._desk.break_off(f"pages of request {tracked.request} changed after their load")
        if self._line.ready():
            saves = map(self._saver.plan, scheduled)
            plan.saves.extend(job for job in saves if job)
        self._measure(plan, told)
        return plan

    def finish(self, request: Any, groups: Sequence[Sequence[int]]) -> bool:
        """Forget a request; True while its pages are still read or written."""
        self._settle()
        number = int(request.request_id)
        tracked = self._requests.pop(number, None)
        if tracked is None:
            return self._desk.busy(number)
        self._drop_offer(tracked)
        known = tracked.usable and tracked.started
        if known and tracked.finish(request.get_tokens(0), groups) and self._line.ready():
            job = self._saver.plan(tracked)
            if job:
                self._desk.carry_out(job)  # there may be no further step to carry it
        if not tracked.loading:
            self._line.release(tracked)
        return self._desk.busy(number)

    def reset(self, request: int) -> None:
        """Forget a request whose pages now belong to others: nothing of it may go on."""
        # Before any report is taken: a copy that is over by now may have read what the next owner
        # wrote there, since the engine tells us after it gave the pages away.
        self._saver.void(request)
        if self._desk.mover:
            self._desk.mover.cancel(request)
        self._settle()
        tracked = self._requests.pop(request, None)
        if tracked:
            self._drop_offer(tracked)
            self._line.release(tracked)

    # -- private: requests ---------------------------------------------------------------------

    def _begin(self, request: Any) -> Tracked:
        number = int(request.request_id)
        earlier = self._requests.get(number)
        if earlier:
            self._drop_offer(earlier)
            if not earlier.loading:
                self._line.release(earlier)
        identity = read_identity(request, self._settings.adapters)
        tokens = list(request.get_tokens(0))
        tracked = Tracked(number, next(self._names), identity, tokens, len(tokens))
        self._requests[number] = tracked
        if identity.problem or getattr(request, "is_dummy_request", False) is True:
            self.statistics.spoil(tracked, identity.problem or "dummy")
        return tracked

    def _note_all(self, told: Sequence[Any], *, new: bool) -> list[Tracked]:
        """Take what the engine says of its requests; return those that we know."""
        known = [(data, self._requests.get(data.request_id)) for data in told]
        for data, tracked in known:
            problem = tracked.note(data, new=new, groups=self._pages.groups) if tracked else ""
            if tracked and problem:
                self.statistics.spoil(tracked, problem)
                if tracked.offer or tracked.filled:
                    self._desk.break_off(f"request {tracked.request} was loaded and has {problem}")
        return [tracked for _, tracked in known if tracked]

    def _find(self, tracked: Tracked, computed_tokens: int) -> Offer | None:
        """Return what can be offered, held and verified; raises DaemonError."""
        size = self._block_tokens
        try:
            # The engine must compute something, so the last token is never among them.
            hashes = self._line.hashes(tracked, (len(tracked.tokens) - 1) // size)
        except ValueError:
            self.statistics.spoil(tracked, "odd token ids")
            return None
        if len(hashes) * size <= computed_tokens:
            return None
        until = time.monotonic() + self._settings.staging_wait_s
        while True:
            found = self._line.lookup(
                tracked, hashes, self._prefill.tokens_per_s, self._copies.bytes_per_s
            )
            if not found.pending or time.monotonic() >= until:
                break
            time.sleep(_POLL_S)
        if found.ready * size <= computed_tokens:
            return None
        slots, generations = self._line.acquire(tracked, hashes[: found.ready])
        first = computed_tokens // self._pages.page_tokens
        last = len(slots) * self._places
        return Offer(first, last, slots, generations) if last > first else None

    def _drop_offer(self, tracked: Tracked) -> None:
        if tracked.offer is None:
            return
        if tracked.allocated is not None:
            self._desk.drop_load(tracked.request)
        tracked.offer = tracked.allocated = None
        self._line.release(tracked)

    # -- private: loads ------------------------------------------------------------------------

    def _plan_load(self, plan: StepPlan, tracked: Tracked, allocated: list[list[int]]) -> None:
        offer = tracked.offer
        assert offer is not None
        copy = PageCopy([], [], [[] for _ in range(self._pages.groups)])
        generations = []
        for position in range(offer.first, offer.last):
            row = tracked.row(position, allocated)
            if row is None:
                if self._pages.whole_offers:
                    self._desk.break_off(f"request {tracked.request} has too few pages to load")
                break  # the engine took a part, and computes the rest
            if not self._pages.is_page(row):
                self.statistics.bad_pages += 1
                continue
            block, place = divmod(position, self._places)
            copy.slots.append(offer.slots[block])
            copy.places.append(place)
            generations.append(offer.generations[block])
            for pages, page in zip(copy.pages, row, strict=True):
                pages.append(page)
            tracked.filled[position] = row
        if not copy.slots:
            self._drop_offer(tracked)
            return
        job = LoadJob(
            next(self._jobs), tracked.request, tracked.epoch, copy, generations, self._background
        )
        tracked.offer = tracked.allocated = None
        tracked.loading.add(job.id)
        self._loads[job.id] = tracked
        self._desk.open(job)
        plan.loads.append(job)

    def _pages_kept(self, tracked: Tracked) -> bool:
        """Return whether the pages that were loaded are those that the engine will read."""
        filled, tracked.filled = tracked.filled, {}
        if not tracked.started:
            tracked.filled = filled
            return True
        return all(tracked.row(position, tracked.pages) == row for position, row in filled.items())

    # -- private: reports ----------------------------------------------------------------------

    def _settle(self) -> None:
        """Take the worker half's reports and tell the daemon."""
        ended = self._desk.step_ended
        if ended > self._step_ended:
            self._step_ended = ended
            self._prefill.ended(ended, time.monotonic())
        for report in self._desk.take_reports():
            if report.job in self._loads:
                self._loaded(self._loads.pop(report.job), report)
            else:
                self._saver.ended(report)

    def _loaded(self, tracked: Tracked, report: Report) -> None:
        if report.done:
            self._copies.copied(report.copied_bytes, report.took_s)
            self.statistics.loaded_pages += report.copied_bytes // self._pages.page_bytes
        tracked.loading.discard(report.job)
        if not tracked.loading and tracked.offer is None:
            self._line.release(tracked)

    def _measure(self, plan: StepPlan, told: Sequence[Any]) -> None:
        """Note what the step computes, to learn how fast prompts are."""
        if not told:
            return
        counts = [data.num_scheduled_tokens for data in told]
        tokens, prompt = sum(counts), sum(count for count in counts if count > 1)
        # A step that also loads takes longer; that is not the prompt's doing.
        self._prefill.scheduled(plan.step, 0 if plan.loads else prompt, tokens, time.monotonic())
