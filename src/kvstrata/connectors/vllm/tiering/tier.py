"""The class that vLLM makes in its scheduler's process, below its CPU tier.

Laws of vLLM's that shape it. A job's rows are pinned until its result is taken, so a result means
that no row is touched any more, whatever came of it. A row whose load failed is thrown away by
vLLM; it asks again, and must be told MISS then, or the request would wait for ever. vLLM's reset of
its connector empties its CPU tier only; here it ends the use of everything kept before, too, since
what is reset after is a change of the weights. A change that comes without it is seen (`weights`).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvstrata.connectors.vllm.hints import RequestHints, read_hints
from kvstrata.connectors.vllm.runner import calling_model, calling_offloader, pages_are_free
from kvstrata.connectors.vllm.settings import ConnectorSettings, read_settings
from kvstrata.connectors.vllm.tiering.events import RowEvents, publishes
from kvstrata.connectors.vllm.tiering.hints import block_hints
from kvstrata.connectors.vllm.tiering.identity import (
    digest_of,
    refuse_unknown,
    row_layout,
    row_namespace,
)
from kvstrata.connectors.vllm.tiering.keeper import Keeper
from kvstrata.connectors.vllm.tiering.mapping import Rows
from kvstrata.connectors.vllm.tiering.weights import WeightsGuard
from kvstrata.connectors.vllm.tiering.work import Answered, Ended, Load, Question, Store
from kvstrata.connectors.vllm.weights import WeightsEye
from kvstrata.core.errors import ConfigError, LayoutError
from kvstrata.core.ids import LineageDigest
from kvstrata.runtime.session import Session

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector

__all__ = ["KvstrataTier"]

log = logging.getLogger("kvstrata.vllm")

_KEYS_MAX: Final = 65536
"""Blocks in one question or job; the daemon takes no more in one call."""
_CLOSE_S: Final = 5.0


@dataclass(slots=True)
class _Asked:
    """What is known of one block, for the requests that asked."""

    requests: set[str]
    ready: bool | None = None  # None while the daemon is asked


@dataclass(slots=True)
class _Request:
    keys: set[OffloadKey] = field(default_factory=set)
    holds: list[str] = field(default_factory=list)
    ends: dict[int, OffloadKey] = field(default_factory=dict)  # blocks by their last token


class KvstrataTier(SecondaryTierManager):  # type: ignore[misc]  # vLLM is untyped
    """Keeps below vLLM's CPU tier what vLLM writes through it, in kvstrata's tiers.

    Raises ConfigError at start for settings, layouts and engines that it does not know.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        **settings: Any,
    ) -> None:
        """Check everything that can be checked, reach the daemon, and try it with a block of ours.

        `settings` are those of the connector, `block_tokens` excepted: vLLM says how large.
        """
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality.LOCAL
        self._settings = _read(settings)
        self._rows = _rows(primary_kv_view)
        session = self._session(offloading_spec)
        self._weights = _guard()
        session.open()
        self._session_at_start = session
        self._step_tokens = offloading_spec.tokens_per_block[0] * offloading_spec.blocks_per_chunk
        self._events = RowEvents() if publishes(offloading_spec) else None
        self._keeper = Keeper(session, self._rows, follow=self._events is not None)
        self._keeper.start()
        self._mark = ""
        self._questions = 0
        self._asked: dict[OffloadKey, _Asked] = {}
        self._to_ask: dict[str, list[OffloadKey]] = {}
        self._waiting: dict[str, list[OffloadKey]] = {}  # by the question's name
        self._requests: dict[str, _Request] = {}
        self._tainted: set[str] = set()  # requests that computed something before the last reset
        self._spoiled = False  # vLLM may still find its own blocks from before the last reset
        self._jobs: dict[int, list[OffloadKey]] = {}
        self._loads: set[int] = set()  # of the jobs
        self._refused: list[JobResult] = []
        try:
            self._fly_canary()
        except BaseException:
            self.shutdown()
            raise

    def _session(self, spec: OffloadingSpec) -> Session:
        offloader = calling_offloader()
        if offloader is None:
            raise ConfigError(
                "KvstrataTier was not made by vLLM's OffloadingConnector",
                hint="name it in secondary_tiers of kv_connector_extra_config",
            )
        self._offloader: Any = offloader
        config, caches = offloader._vllm_config, offloader._kv_cache_config  # noqa: SLF001
        layout = row_layout(config, caches, spec, self._rows.shape[1])
        refuse_unknown(config, spec)
        namespace = row_namespace(config, layout, self._settings)
        return Session(self._settings.where, layout, namespace, self._settings.session_limits)

    @property
    def daemon_pid(self) -> int:
        """The daemon's process, 0 while there is none."""
        return self._session_at_start.daemon_pid

    @property
    def daemon_address(self) -> str:
        """Where the daemon listens, empty while there is none."""
        return self._session_at_start.daemon_address

    def statistics(self) -> dict[str, int]:
        """Return what happened since the start, in blocks, by name."""
        return self._keeper.statistics()

    # -- finding -------------------------------------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Take note of a request; what it computes anew is stored, chunk by chunk."""
        self._requests.setdefault(req_context.req_id, _Request())
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Return whether a block can be loaded now; RETRY while the daemon is asked."""
        if not self._weights.may_find():
            return LookupResult.MISS
        self._take_answers()
        request = self._requests.setdefault(req_context.req_id, _Request())
        request.keys.add(key)
        self._place(request, key, req_context)
        asked = self._asked.get(key)
        if asked is None:
            asked = self._asked[key] = _Asked(set())
            self._to_ask.setdefault(req_context.req_id, []).append(key)
        asked.requests.add(req_context.req_id)
        if asked.ready is None:
            return LookupResult.RETRY
        return LookupResult.HIT if asked.ready else LookupResult.MISS

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Ask the daemon about the step's blocks, one question for each request."""
        del context
        self._weights.scheduled()
        self._take_answers()
        asked, self._to_ask = self._to_ask, {}
        for name, all_keys in asked.items():
            keys = all_keys[:_KEYS_MAX]
            for key in all_keys[_KEYS_MAX:]:
                self._learn(key, ready=False)
            self._questions += 1
            hold = f"ask {self._questions}"
            self._requests[name].holds.append(hold)
            self._waiting[hold] = keys
            digests, named = _digests(keys), self._named(keys)
            self._keeper.ask(Question(hold, self._mark, digests, self._until(), named))

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Forget a request, and let go of what was found for it."""
        self._tainted.discard(req_context.req_id)
        request = self._requests.pop(req_context.req_id, None)
        if request is None:
            return
        # Others may have asked about these blocks meanwhile, and wait for the same answer.
        unanswered = self._to_ask.pop(req_context.req_id, [])
        for hold in request.holds:
            unanswered += self._waiting.pop(hold, ())
        for key in unanswered:
            self._learn(key, ready=False)
        for key in request.keys:
            asked = self._asked.get(key)
            if asked is not None:
                asked.requests.discard(req_context.req_id)
                if not asked.requests:
                    del self._asked[key]
        self._keeper.release(request.holds)

    # -- moving --------------------------------------------------------------------------------

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Have blocks copied to vLLM's CPU tier."""
        pairs = list(zip(job_metadata.keys, map(int, job_metadata.chunk_ids), strict=True))
        keys = self._begin(job_metadata, pairs, refused=not self._weights.may_find())
        if keys:
            self._loads.add(job_metadata.job_id)
            rows = tuple(row for _, row in pairs)
            job = job_metadata.job_id
            self._keeper.load(Load(job, self._mark, _digests(keys), rows, self._until()))

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Have blocks copied from vLLM's CPU tier."""
        context = job_metadata.req_context
        pairs = list(zip(job_metadata.keys, map(int, job_metadata.chunk_ids), strict=True))
        pairs.sort(key=lambda pair: context.get_offload_key_position(pair[0]) or 0)
        hints = _hints(context)
        if not hints.store:
            self._refused.append(JobResult(job_metadata.job_id, success=True, transfer_bytes=0))
            return
        spoiled = self._spoiled or context.req_id in self._tainted
        keys = self._begin(job_metadata, pairs, refused=spoiled or not self._weights.may_store())
        if not keys:
            return
        ends = [context.get_offload_key_position(key) for key in keys]
        self._keeper.store(
            Store(
                job_metadata.job_id,
                self._mark,
                _digests(keys),
                tuple(row for _, row in pairs),
                self._parent(keys, context),
                self._settings.tenant if hints.tenant is None else hints.tenant,
                block_hints(hints.retention, self._step_tokens, ends),
                self._until(),
                self._named(keys),
            )
        )

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Return the jobs that touch no row any more."""
        results, self._refused = self._refused, []
        ended = self._keeper.take_ended()
        if any(each.job in self._loads for each in ended):
            self._weights.look()  # vLLM asks us no more before it uses what has come
        return results + [self._result(each) for each in ended]

    def take_events(self) -> Iterable[OffloadingEvent]:
        """Return what came to our tiers and left them, of what this engine could load."""
        if self._events is None:
            return ()
        usable = self._keeper.serves and not self._weights.changed
        return self._events.take(self._mark if usable else None, self._keeper.take_moves())

    def drain_jobs(self) -> None:
        """End what is under way, and use nothing that was kept before.

        vLLM calls it when it resets its connector, and then only; also where requests ran and it
        could not forget its own blocks. New requests find those, so nothing is stored until the
        next reset.
        """
        self._keeper.cancel()
        self._loads.clear()  # vLLM is about to empty its CPU tier
        self._mark = secrets.token_hex(16)
        self._tainted = set(self._requests)
        self._spoiled = not pages_are_free(self._offloader._kv_cache_manager)  # noqa: SLF001
        if not self._spoiled:
            self._weights.reset()
        self._asked.clear()
        self._to_ask.clear()
        self._waiting.clear()
        holds = [hold for request in self._requests.values() for hold in request.holds]
        for request in self._requests.values():
            request.holds.clear()
            request.ends.clear()
        self._keeper.release(holds)
        log.info("kvstrata: vLLM was reset, what it kept in kvstrata before is not used any more")
        if self._spoiled:
            log.warning(
                "kvstrata: requests ran during the reset, so vLLM still has its own blocks; "
                "nothing is stored until reset_prefix_cache(reset_connector=True) finds it at rest"
            )

    def shutdown(self) -> None:
        """Leave the daemon; raises RuntimeError if a row is still being copied."""
        limit = self._settings.staging_timeout_s + self._settings.call_timeout_s + _CLOSE_S
        if not self._keeper.close(limit):
            raise RuntimeError("kvstrata's tier still copies to or from vLLM's memory")
        self._rows = np.empty((0, 0), np.uint8)  # vLLM is about to unmap what it was
        self._keeper.forget_rows()
        log.info("kvstrata's tier is closed: %s", self.statistics())

    # -- private -------------------------------------------------------------------------------

    def _until(self) -> float:
        return time.monotonic() + self._settings.staging_timeout_s

    def _named(self, keys: Sequence[OffloadKey]) -> tuple[bytes, ...]:
        """Return what the keeper must remember of blocks."""
        return tuple(keys) if self._events is not None else ()

    def _learn(self, key: OffloadKey, *, ready: bool) -> None:
        asked = self._asked.get(key)
        if asked is not None:
            asked.ready = ready

    def _take_answers(self) -> None:
        for answered in self._keeper.take_answers():
            self._answer(answered)

    def _answer(self, answered: Answered) -> None:
        name = answered.question.name
        if name not in self._waiting:  # its request is gone
            self._keeper.release([name])
            return
        for place, key in enumerate(self._waiting.pop(name)):
            self._learn(key, ready=place < answered.ready)

    def _place(self, request: _Request, key: OffloadKey, context: ReqContext) -> None:
        end = context.get_offload_key_position(key)
        if end is not None:
            request.ends[end] = key

    def _parent(self, keys: Sequence[OffloadKey], context: ReqContext) -> LineageDigest | None:
        """Return the block before the first of `keys`, None where it is not known."""
        request = self._requests.get(context.req_id)
        if request is None:
            return None
        for key in keys:
            self._place(request, key, context)
        end = context.get_offload_key_position(keys[0])
        before = request.ends.get(end - self._step_tokens) if end is not None else None
        return digest_of(before) if before else None

    def _begin(
        self,
        job: TransferJob,
        pairs: Collection[tuple[OffloadKey, int]],
        *,
        refused: bool = False,
    ) -> list[OffloadKey]:
        """Return the job's blocks; none if it has ended here, with nothing done."""
        keys = [key for key, _ in pairs]
        self._jobs[job.job_id] = keys
        inside = all(0 <= row < len(self._rows) for _, row in pairs)
        if not refused and inside and 0 < len(keys) <= _KEYS_MAX:
            return keys
        self._refused.append(self._result(Ended(job.job_id, 0, len(keys), 0.0)))
        return []

    def _result(self, ended: Ended) -> JobResult:
        keys = self._jobs.pop(ended.job)
        if ended.job in self._loads:
            self._loads.discard(ended.job)
            if self._weights.changed:
                ended = Ended(ended.job, 0, ended.count, ended.took_s)
        for key in keys[ended.good :]:  # of a load: vLLM must not try again
            self._learn(key, ready=False)
        success = ended.good == ended.count
        return JobResult(
            job_id=ended.job,
            success=success,
            successful_keys=None if success or not ended.good else tuple(keys[: ended.good]),
            transfer_time=ended.took_s,
            transfer_bytes=ended.good * self._rows.shape[1],
        )

    def _fly_canary(self) -> None:
        """Store made-up bytes, load them, compare bit for bit; vLLM's tier is still empty.

        Raises LayoutError if what comes back is not what was written.
        """
        row = self._rows[:1]
        kept = row.copy()
        sent = np.frombuffer(secrets.token_bytes(row.shape[1]), np.uint8)
        digest = (LineageDigest(secrets.token_bytes(32)),)
        tenant = self._settings.tenant
        mark = f"canary {secrets.token_hex(16)}"
        try:
            row[0] = sent
            self._keeper.store(Store(-1, mark, digest, (0,), None, tenant, [], self._until()))
            self._keeper.drain()
            row[0] = 0
            self._keeper.ask(Question("canary", mark, digest, self._until()))
            self._wait_answer()
            self._keeper.load(Load(-2, mark, digest, (0,), self._until()))
            self._keeper.drain()
            came = [each.good for each in self._keeper.take_ended()] == [1, 1]
            if came and not np.array_equal(row[0], sent):
                raise LayoutError(
                    "canary: a block that was stored and loaded came back with other bytes",
                    hint="this vLLM's CPU tier is not as kvstrata knows it; use another tier",
                )
            if not came:
                log.warning("kvstrata's canary did not come back: no room, or no answer in time")
        finally:
            row[...] = kept
            self._keeper.release(["canary"])
            self._keeper.forget(mark, digest[0])

    def _wait_answer(self) -> None:
        """Wait for the canary's question, which the keeper bounds."""
        until = self._until() + self._settings.call_timeout_s
        while not self._keeper.take_answers() and time.monotonic() < until:
            time.sleep(0.001)


def _digests(keys: Sequence[OffloadKey]) -> tuple[LineageDigest, ...]:
    return tuple(digest_of(key) for key in keys)


def _hints(context: ReqContext) -> RequestHints:
    """Return what a request asks for, read once."""
    hints: RequestHints | None = context.get_state(RequestHints)
    if hints is None:
        # Of a tenant that cannot be read nothing is kept.
        hints = read_hints(context.kv_transfer_params) or RequestHints(store=False)
        context.set_state(hints)
    return hints


def _guard() -> WeightsGuard:
    """Return what watches the model's weights; raises ConfigError where they cannot be seen."""
    model = calling_model()
    eye = None if model is None else WeightsEye(model)
    if eye is None or not eye.sees:
        raise ConfigError(
            "KvstrataTier cannot see the model's weights from vLLM's scheduler",
            hint="leave distributed_executor_backend out, or use KvstrataConnector",
        )
    return WeightsGuard(eye)


def _read(settings: dict[str, Any]) -> ConnectorSettings:
    """Return the settings of a tier; raises ConfigError that names the key."""
    if "block_tokens" in settings:
        raise ConfigError(
            "block_tokens: vLLM's CPU tier says how large a block is",
            hint="set blocks_per_chunk or block_size in kv_connector_extra_config",
        )
    if settings.pop("locality", "LOCAL") != "LOCAL":
        raise ConfigError("locality: kvstrata's daemon is local", hint="leave it out")
    return read_settings(settings)


def _rows(view: memoryview) -> Rows:
    """Return vLLM's CPU tier as rows; raises LayoutError for a view that is not one of rows."""
    rows: Rows = np.asarray(view)
    if rows.ndim != 2 or rows.itemsize != 1 or not rows.flags.c_contiguous or not rows.size:  # noqa: PLR2004
        raise LayoutError(
            f"vLLM's CPU tier is {rows.dtype} {rows.shape}, not rows of bytes",
            hint="this vLLM is unknown to kvstrata; use another tier",
        )
    return rows.view(np.uint8)
