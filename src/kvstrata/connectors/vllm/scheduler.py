"""The scheduler half: what to load, what to save, and the session with the daemon.

Every call to the daemon is bounded; once one fails, the session is down and each question is
answered as a miss until a daemon is back. Loads are asynchronous in vLLM's sense: a request is
scheduled only after its blocks arrived, so a failed load can never leak into saved blocks.
"""

from __future__ import annotations

import itertools
import logging
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from kvstrata.connectors.speeds import CopyMeter, PrefillMeter
from kvstrata.connectors.vllm.adapters import KnownAdapters, key_of
from kvstrata.connectors.vllm.extras import MediumDigests, request_extras
from kvstrata.connectors.vllm.grouped import first_complete, load_copy, save_copy
from kvstrata.connectors.vllm.hints import RequestHints, hints_for, read_hints
from kvstrata.connectors.vllm.metadata import (
    AdapterUse,
    LoadJob,
    SaveJob,
    StepPlan,
    StepReport,
    WeightsReport,
)
from kvstrata.connectors.vllm.metrics import ConnectorStats, split_by_tier
from kvstrata.connectors.vllm.pace import ASK_AGAIN_S, Pace
from kvstrata.connectors.vllm.pins import Pins
from kvstrata.connectors.vllm.states import chains, save_states
from kvstrata.core.errors import CallRefusedError, DaemonError
from kvstrata.core.ids import SequenceHash
from kvstrata.layout import BlockLayout, GroupedCache
from kvstrata.runtime import messages as wire
from kvstrata.runtime.session import Session
from kvstrata.tokens import NamespaceKey, PromptLineage, sequence_hashes
from kvstrata.tokens.family import Family

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from kvstrata.connectors.vllm.events import TierEvents

__all__ = ["SchedulerHalf"]

log = logging.getLogger("kvstrata.vllm")

_FAILED_LOADS_MAX: Final = 2
"""So often a request's load may fail; vLLM asks again each time that nothing of it arrived."""


@dataclass(slots=True)
class _Tracked:
    """One request of the engine, from arrival to its end."""

    request: Request
    name: str  # ours: vLLM's id may come from a client and have any length
    lineage: PromptLineage
    usable: bool  # False: neither loaded nor saved
    hints: RequestHints
    named: bool  # everything that its KV depends on is in `lineage`
    adapter: AdapterUse | None = None
    hashes: list[SequenceHash] = field(default_factory=list)
    epoch: int = 0  # of `hashes`, `saved_blocks` and `holding`
    saved_blocks: int = 0
    local_tokens: int = 0
    ready_blocks: int = 0
    holding: bool = False  # the daemon holds blocks for it
    loading: bool = False  # its load was given to the worker and has not ended
    load_tokens: int = 0  # what that load is for
    finished: bool = False
    asked_at: float = 0.0  # first, for the load under way
    ask_again_at: float = 0.0  # earlier the daemon, in `epoch`, has nothing new to say
    promised_pages: int = 0  # by it
    failed_loads: int = 0
    staged: dict[str, int] = field(default_factory=dict)  # tokens of its load, by lower tier
    tokens_from: dict[str, int] = field(default_factory=lambda: {"host": 0, "disk": 0})


class SchedulerHalf:
    """Owner: the engine core's thread."""

    def __init__(
        self,
        session: Session,
        cache: GroupedCache,
        layout: BlockLayout,
        *,
        enabled: bool,
        tenant: str = "",
    ) -> None:
        """Serve an engine over an opened session; unless `enabled`, every answer is a miss.

        `tenant` is charged for what is stored by requests that name none.
        """
        self.session = session
        self._tenant = tenant
        self._block_tokens, self._block_bytes = layout.block_tokens, layout.block_bytes
        self._cache = cache
        self._page_tokens = cache.page_tokens
        self._workers = cache.workers
        self._failed_loads_max = _FAILED_LOADS_MAX if cache.is_whole else 1  # all was lost
        self._enabled = enabled
        self._requests: dict[str, _Tracked] = {}
        self._names = map(str, itertools.count(1))
        self._loads: list[LoadJob] = []
        self._missed: list[_Tracked] = []  # let go of together, when the step is planned
        self._keys: dict[tuple[str, str], NamespaceKey] = {}  # by salt and tenant
        self._keys_epoch = 0
        self._fenced = False
        self._clear_owed = False
        self._steps = itertools.count(1)
        self._prefill, self._copies, self._pace = PrefillMeter(), CopyMeter(), Pace()
        self._adapters, self._media = KnownAdapters(), MediumDigests()
        self.stats = ConnectorStats()
        self.events: TierEvents | None = None  # if vLLM publishes any
        self._weights_mark = ""  # what names blocks of weights that are not the files'
        self._weights_changed = False
        self._resets = self._renewals = 0
        self._last_step = self._tainted_until = 0
        self._pins = Pins(session, self._note)

    def fence(self, pids: Sequence[int]) -> None:
        """Learn which processes will fill slots; until the daemon knows, nothing is saved."""
        if len(pids) != self._workers:
            log.warning("%d of %d workers said hello; nothing is saved", len(pids), self._workers)
            return
        try:
            self.session.fence(pids)
        except DaemonError as error:
            self._note(error)  # a session that was lost names them in its next hello
        self._fenced = True

    # -- matching ------------------------------------------------------------------------------

    def matched_tokens(self, request: Request, local_tokens: int) -> int | None:
        """Return how many tokens behind `local_tokens` can be loaded, None to be asked again."""
        tracked = self._track(request)
        tracked.local_tokens = local_tokens
        tracked.ready_blocks = 0
        allowed = self._may_load(tracked)
        if not allowed:
            return None if allowed is None else 0
        now = time.monotonic()
        tracked.asked_at = tracked.asked_at or now
        if now < tracked.ask_again_at and tracked.epoch == self.session.epoch:
            self._pace.rest()
            return None
        # Of a prompt that is there whole vLLM computes the last token, whose window may begin a
        # page before that of the token behind it.
        spared = 0 if self._cache.is_whole else 1
        hashes = self._hashes(tracked, request.num_tokens - spared)
        if len(hashes) * self._block_tokens <= local_tokens:
            return 0
        try:
            found = self.session.lookup(
                tracked.name,
                chains(self._cache, hashes),
                self._cache.windows,
                prefill_tokens_per_s=self._prefill.tokens_per_s,
                copy_bytes_per_s=self._copies.bytes_per_s,
            )
        except DaemonError as error:
            self._note(error)
            return 0
        tracked.holding = True
        if found.pending:
            tracked.ask_again_at = time.monotonic() + ASK_AGAIN_S
            return None
        tracked.ready_blocks = found.ready
        return max(0, found.ready * self._block_tokens - local_tokens)

    def allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        """Plan the load of the `external_tokens` that vLLM made room for."""
        tracked = self._track(request)
        if not external_tokens:
            if not tracked.loading:
                tracked.asked_at = 0.0
                self._missed.append(tracked)
            return
        tokens = range(tracked.local_tokens, tracked.local_tokens + external_tokens)
        slots, generations, staged = self._acquire(tracked)
        copy, lost = load_copy(
            self._cache, self._block_tokens, blocks.get_block_ids(), tokens, slots
        )
        promised = dict(zip(slots, generations, strict=True))
        tracked.loading = True
        tracked.load_tokens, tracked.promised_pages = external_tokens, len(copy.pages) + len(lost)
        tracked.staged = {tier: n * self._block_tokens for tier, n in staged.items()}
        self._loads.append(
            LoadJob(
                request=request.request_id,
                epoch=tracked.epoch,
                copy=copy,
                generations=[promised[slot] for slot in copy.slots],
                lost_pages=lost,
                adapter=tracked.adapter,
            )
        )

    # -- each step -----------------------------------------------------------------------------

    def build_plan(self, output: SchedulerOutput) -> StepPlan:
        """Return the step's loads, and the saves of blocks that this step completes."""
        plan = StepPlan(loads=self._loads, resets=self._resets, renewals=self._renewals)
        plan.introduce = not self._fenced
        self._loads = []
        self._pace.planned(computes=bool(output.num_scheduled_tokens))
        self._release(self._missed)
        self._missed = []
        self._pins.take()
        self._measure(plan, output)
        loading = (job.request for job in plan.loads)
        plan.adapters = self._adapters.plan(self._adapters_of(output.num_scheduled_tokens, loading))
        if self._enabled and self._fenced and not self._weights_changed and self._ready():
            for request_id, tokens in output.num_scheduled_tokens.items():
                tracked = self._requests.get(request_id)
                if self.session.welcome is None:
                    break  # the call for an earlier request has lost it
                if tracked and self._holds(tracked) and tracked.hints.store:
                    self._plan_save(plan, tracked, tokens, output)
                    self._plan_states(plan, tracked, output)
        # Last, since a call above may have lost the session.
        if self.session.welcome:
            plan.epoch, plan.arena = self.session.epoch, self.session.welcome.arena
            plan.layout = self.session.welcome.layout
        return plan

    def take_report(self, report: StepReport, *, tainted: bool = False) -> None:
        """Tell the daemon what the worker did.

        In a `tainted` step something was computed on KV that another connector failed to bring.
        """
        if tainted:
            self._tainted_until = self._last_step  # plans that are out build on it
        tainted = tainted or 0 < report.step <= self._tainted_until
        if report.step:
            self._prefill.ended(report.step, time.monotonic())
        self._adapters.take(report.adapters)
        if report.weights:
            self._take_weights(report.weights)
        if report.workers != self._workers:
            # Some worker may still be at it: what it reads and fills stays held, and is not found.
            log.warning("%d of %d workers reported a step", report.workers, self._workers)
            return
        if report.pids and not self._fenced:
            self.fence(report.pids)
        self._copies.copied(report.copied_bytes, report.copied_s)
        self._count_copies(report)
        done: list[_Tracked] = []
        for request_id, good_pages in report.loaded.items():
            tracked = self._requests.get(request_id)
            if tracked:
                tracked.loading = False
                self._count_load(tracked, good_pages)
                self._count(tracked, good_pages)
                done.append(tracked)
        self._release(done)
        for tracked in done:
            if tracked.finished:
                del self._requests[tracked.request.request_id]
        self._tell_saves(report, tainted=tainted)

    def _tell_saves(self, report: StepReport, *, tainted: bool) -> None:
        whole, spoiled = ([], report.saved) if tainted else (report.saved, [])
        calls: list[tuple[int, wire.Call]] = [
            (job.epoch, wire.Seal(job.name, job.slots)) for job in whole
        ]
        calls += [
            (job.epoch, wire.Abort(job.name, job.slots)) for job in (*spoiled, *report.unsaved)
        ]
        self._tell([call for epoch, call in calls if epoch == self.session.epoch])
        self._pins.take()

    def finished(self, request: Request) -> dict[str, Any] | None:
        """Forget a request; return where its tokens came from, for vLLM to pass to the caller."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return None
        tracked.finished = True
        if self._holds(tracked) and not self._cache.state_groups:  # a hit needs a state, too
            blocks = request.num_prompt_tokens // self._block_tokens
            self._pins.ask(tracked.epoch, tracked.hashes, blocks, tracked.hints.pin_s)
        if not tracked.loading:  # else the worker still reads what the daemon holds for it
            self._release([tracked])
            del self._requests[request.request_id]
        return {"kvstrata": {"tokens_from": dict(tracked.tokens_from)}}

    def staged_tokens(self, request: Request) -> int:
        """Return how many tokens of the load under way came from below the host for it."""
        tracked = self._requests.get(request.request_id)
        return sum(tracked.staged.values()) if tracked else 0

    def clear(self, *, clean: bool) -> bool:
        """Forget every block in every tier; always True.

        Until the daemon has been told nothing is asked of it, and vLLM would stay paused after a
        reset that failed. A reset may mean new weights: what requests under way have computed must
        not be kept. Unless it is `clean` vLLM still finds its own blocks of old weights: what is
        spoiled stays so.
        """
        for tracked in self._requests.values():
            tracked.usable = False
        if clean:
            self._adapters.forget()
            self._weights_changed = False
            self._resets += 1
        self._clear_owed = True
        self._ready()
        return True

    # -- private -------------------------------------------------------------------------------

    def _may_load(self, tracked: _Tracked) -> bool | None:
        """Return whether the daemon may be asked for a request, None while its name is unknown."""
        if not self._enabled or not tracked.usable:
            return False
        ready = not self._weights_changed and self._ready()
        if not ready:
            tracked.usable &= tracked.named  # weights may change before its name is known
        elif not tracked.named and not self._name(tracked):
            return None
        reasons = {
            "weights changed": self._weights_changed,
            "no daemon": not ready,
            "unknown adapter or image": ready and not self._holds(tracked),
            # The first may find its adapter put out of the worker's memory; that brings it back.
            "loads failed": tracked.failed_loads
            >= self._failed_loads_max + (tracked.adapter is not None),
        }
        why = next((reason for reason, true in reasons.items() if true), None)
        if why:
            self.stats.count("given_up", label=why)
            return False
        return not tracked.request.skip_reading_prefix_cache  # vLLM would not use what we find

    def _holds(self, tracked: _Tracked) -> bool:
        """Return whether the request's name still says what its KV is computed with."""
        return tracked.usable and tracked.named and self._adapters.holds(tracked.adapter)

    def _take_weights(self, said: WeightsReport) -> None:
        """Go on without the cache, or under new names, now that the model has other weights."""
        for tracked in self._requests.values():
            tracked.usable = False  # computed or named with the old ones
        if self.events:
            self.events.forget()
        if said == WeightsReport.CHANGED:
            self._weights_changed = True
            log.warning(
                "the model's weights have changed; kvstrata loads and saves nothing until "
                "reset_prefix_cache(reset_connector=True)"
            )
            return
        self._renewals += 1
        self._weights_mark = uuid.uuid4().hex
        log.info("the model's weights have changed; kvstrata keeps blocks under new names")

    def _ready(self) -> bool:
        """Return whether the daemon can be asked now; pay an owed clear first. Never waits long."""
        if not self.session.usable():
            return False
        if self._clear_owed:
            try:
                self.session.call(wire.Clear([]), wire.Cleared)
            except DaemonError as error:
                self._note(error)
                return False
            self._clear_owed = False
        return True

    def _measure(self, plan: StepPlan, output: SchedulerOutput) -> None:
        """Number the step and note what it computes, to learn how fast prompts are."""
        scheduled = output.num_scheduled_tokens
        if not scheduled:
            return
        plan.step = self._last_step = next(self._steps)
        prompt = 0
        for request_id, tokens in scheduled.items():
            tracked = self._requests.get(request_id)
            if tracked:
                request = tracked.request
                missing = request.num_prompt_tokens - request.num_computed_tokens
                prompt += min(max(missing, 0), tokens)
        # A step that also loads takes longer; that is not the prompt's doing.
        counted = 0 if plan.loads else prompt
        self._prefill.scheduled(plan.step, counted, sum(scheduled.values()), time.monotonic())

    def _count_load(self, tracked: _Tracked, good_pages: int) -> None:
        failed = good_pages < tracked.promised_pages
        tracked.failed_loads += failed
        self.stats.count("loads")
        self.stats.count("failed_loads", int(failed))
        self.stats.waited(time.monotonic() - tracked.asked_at)
        tracked.asked_at = 0.0

    def _count_copies(self, report: StepReport) -> None:
        blocks = sum(len(job.slots) for job in report.saved)
        for name, number in (
            ("loaded_bytes", report.copied_bytes),
            ("load_seconds", report.copied_s),
            ("saved_blocks", blocks),
            ("saved_bytes", blocks * self._block_bytes),
            ("save_seconds", report.saved_s),
            ("failed_saves", len(report.unsaved)),
        ):
            self.stats.count(name, number)

    def _count(self, tracked: _Tracked, good_pages: int) -> None:
        """Add what a load has brought to the request's account."""
        tokens = good_pages * self._page_tokens
        if not self._cache.is_whole:  # all or nothing, with as many pages as the windows need
            tokens = tracked.load_tokens if good_pages else 0
        for tier, counted in split_by_tier(tokens, tracked.staged).items():
            tracked.tokens_from[tier] = tracked.tokens_from.get(tier, 0) + counted
            self.stats.count("loaded_tokens", counted, tier)

    def _track(self, request: Request) -> _Tracked:
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            # What else than tokens and salt decides the KV is refused until it is in the identity.
            usable = not (
                request.prompt_embeds is not None
                or request.pooling_params
                or request.resumable  # vLLM takes back tokens of a session that goes on
            )
            extras = request_extras(self._weights_mark, "", (), self._block_tokens)
            lineage = PromptLineage(self._block_tokens, extras)
            hints = read_hints(request.kv_transfer_params)
            usable &= hints is not None  # else nobody knows whose it is
            hints = hints or RequestHints()
            named = not request.lora_request and not request.mm_features
            tracked = _Tracked(request, next(self._names), lineage, usable, hints, named)
            self._requests[request.request_id] = tracked
        return tracked

    def _name(self, tracked: _Tracked) -> bool:
        """Put what tokens do not say into its lineage; False while the worker is asked for it."""
        request, digest = tracked.request, ""
        if request.lora_request:
            told = self._adapters.digest(request.lora_request)
            if told is None:
                return False
            digest = told
            tracked.usable = bool(digest)
            tracked.adapter = AdapterUse(key_of(request.lora_request), digest)
        media = self._media.media(request.mm_features)
        if media is None:  # vLLM has handed the data to its worker only
            tracked.usable, media = False, []
        tracked.lineage.extras = request_extras(
            self._weights_mark, digest, media, self._block_tokens
        )
        tracked.named = True
        return True

    def _adapters_of(self, *requests: Iterable[str]) -> list[Any]:
        """Return the LoRARequests that these requests of the step compute or load with."""
        tracked = map(self._requests.get, itertools.chain(*requests))
        return [
            each.request.lora_request
            for each in tracked
            if each and each.adapter and each.adapter.digest
        ]

    def _hashes(self, tracked: _Tracked, tokens: int) -> list[SequenceHash]:
        """Return the keys of the first `tokens` tokens' full blocks, in the session's epoch."""
        if tracked.epoch != self.session.epoch:
            tracked.epoch = self.session.epoch
            tracked.hashes = []
            tracked.saved_blocks = 0
            tracked.holding = False
        blocks = tokens // self._block_tokens
        if len(tracked.lineage.digests) < blocks:
            tokens_now = tracked.request.all_token_ids[: blocks * self._block_tokens]
            try:
                tracked.lineage.extend_to(tokens_now)
            except ValueError:  # an id that is no token: a place holder of some kind
                tracked.usable = False
                return []
        known = len(tracked.hashes)
        if known < blocks:
            key = self._key(tracked.request.cache_salt or "", self._tenant_of(tracked))
            tracked.hashes += sequence_hashes(key, tracked.lineage.digests[known:])
            if self.events:
                self.events.know(tracked.request, tracked.hashes, known)
        return tracked.hashes[:blocks]

    def _tenant_of(self, tracked: _Tracked) -> str:
        """Return who is charged for what the request stores, and finds it again."""
        return self._tenant if tracked.hints.tenant is None else tracked.hints.tenant

    def _key(self, salt: str, tenant: str) -> NamespaceKey:
        welcome = self.session.welcome
        assert welcome is not None, "keys are made only while the session is up"
        if self._keys_epoch != self.session.epoch or len(self._keys) > 4096:  # noqa: PLR2004
            self._keys.clear()  # another daemon may have another secret; salts may be many
            self._keys_epoch = self.session.epoch
        if (salt, tenant) not in self._keys:
            self._keys[salt, tenant] = welcome.namespace_key(salt, tenant)
        return self._keys[salt, tenant]

    def _family(self, tracked: _Tracked) -> Family | None:
        """Return the tags that explain, to those who ask later, where this prompt was stored."""
        welcome, digests = self.session.welcome, tracked.lineage.digests
        if welcome is None or not digests:
            return None
        salt = tracked.request.cache_salt or ""
        return welcome.family(digests[0], salt, self._tenant_of(tracked))

    def _acquire(self, tracked: _Tracked) -> tuple[list[int], list[int], dict[str, int]]:
        if self.session.welcome is None or tracked.epoch != self.session.epoch:
            return [], [], {}
        hashes = tracked.hashes[: tracked.ready_blocks]
        try:
            keys = chains(self._cache, hashes)
            acquired = self.session.acquire(tracked.name, keys, self._cache.windows)
        except DaemonError as error:
            self._note(error)
            return [], [], {}
        return acquired.slots, acquired.generations, acquired.staged

    def _plan_save(
        self, plan: StepPlan, tracked: _Tracked, tokens: int, output: SchedulerOutput
    ) -> None:
        request = tracked.request
        # Only KV of known tokens that this step has computed by its end.
        computed = min(request.num_computed_tokens + tokens, request.num_tokens)
        last = computed // self._block_tokens
        if last <= (tracked.saved_blocks if tracked.epoch == self.session.epoch else 0):
            return
        hashes = self._hashes(tracked, computed)
        if len(hashes) < last:
            return
        state = output.kv_connector_block_state
        tables = state.get_block_ids(request.request_id) if state else None
        if tables is None:
            return
        first = first_complete(self._cache, self._block_tokens, tables, tracked.saved_blocks, last)
        if first == last:
            tracked.saved_blocks = last
            return
        parent = hashes[first - 1] if first else None
        try:
            hints = hints_for(tracked.hints.retention, self._block_tokens, first, last)
            tenant = self._tenant_of(tracked)
            family = None if first else self._family(tracked)
            reserved = self.session.reserve(
                tracked.name, parent, hashes[first:last], hints, tenant, family
            )
        except DaemonError as error:
            self._note(error)
            return
        tracked.saved_blocks = last
        if reserved.slots:
            blocks = [first + index for index in reserved.indices]
            copy = save_copy(self._cache, self._block_tokens, tables, blocks, reserved.slots)
            plan.saves.append(
                SaveJob(tracked.name, tracked.epoch, copy, reserved.slots, tracked.adapter)
            )

    def _plan_states(self, plan: StepPlan, tracked: _Tracked, output: SchedulerOutput) -> None:
        if not self._cache.state_groups:
            return
        tenant = self._tenant_of(tracked)
        size, cache = self._block_tokens, self._cache
        try:
            plan.saves.extend(save_states(self.session, cache, size, tracked, tenant, output))
        except DaemonError as error:
            self._note(error)

    def _release(self, tracked: Sequence[_Tracked]) -> None:
        held = [each for each in tracked if each.holding]
        for each in held:
            each.holding = False
        names = [each.name for each in held if each.epoch == self.session.epoch]
        if names:
            self._tell([wire.Release(names)])

    def _tell(self, calls: Sequence[wire.Call]) -> None:
        """Make calls of the session at hand that have no answer but Done, in one round trip."""
        if not calls or self.session.welcome is None:
            return
        try:
            self.session.tell_all(calls)
        except DaemonError as error:
            self._note(error)

    def _note(self, error: DaemonError) -> None:
        """A lost session has said so itself; a refusal means that we misunderstood something."""
        if isinstance(error, CallRefusedError):
            log.warning("kvstrata daemon refused a call: %s", error)
