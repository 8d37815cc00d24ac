"""The scheduler half: what to load, what to save, and the session with the daemon.

TensorRT-LLM asks once for each request and believes the answer: there is no word for a load that
failed. So nothing is offered but blocks that are in the host, held, and verified in memory that
this process has mapped; and while an offer is open a session that was lost stays lost, since the
next one would end what the offer holds. Every call to the daemon is bounded; a question that it
does not answer is a miss.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Sequence
from typing import Any, Self

from kvstrata.connectors.trtllm.account import Statistics
from kvstrata.connectors.trtllm.desk import Desk, desk_of, partner_of
from kvstrata.connectors.trtllm.engine import check_arguments, engine_namespace, read_model
from kvstrata.connectors.trtllm.interface import SchedulerBase, check_interface, engine_version
from kvstrata.connectors.trtllm.keeper import Keeper
from kvstrata.connectors.trtllm.settings import ConnectorSettings, read_settings
from kvstrata.core.errors import ConfigError
from kvstrata.runtime.session import Session

__all__ = ["KvstrataScheduler"]


class KvstrataScheduler(SchedulerBase):  # type: ignore[misc]  # TensorRT-LLM's, or its shape
    """Serves a TensorRT-LLM engine from KV blocks kept in kvstrata's tiers.

    Owner: the executor's thread. Raises ConfigError at start for settings, models and engines that
    it does not know.
    """

    supports_attention_dp = False

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Refuse a TensorRT-LLM that we do not know before its base classes do."""
        check_interface(cls)
        made: Self = super().__new__(cls)
        return made

    def __init__(self, llm_args: Any) -> None:
        """Check what can be checked before the pages are known."""
        super().__init__(llm_args)
        self._settings = self.connector_settings()
        self._page_tokens = check_arguments(llm_args)
        self._model = read_model(llm_args)
        self._desk: Desk = desk_of(llm_args)
        self._keeper: Keeper | None = None
        end = weakref.WeakMethod(self.close)
        atexit.register(lambda: (close := end()) and close())

    @classmethod
    def connector_settings(cls) -> ConnectorSettings:
        """Return the checked settings of this process; a subclass may have them elsewhere."""
        return read_settings()

    def wait_for_initialization(self) -> None:
        """Reach or start the daemon, and see one block come back; the pages are registered now."""
        partner = partner_of(self._desk)
        if partner is None or partner.pages is None:
            raise ConfigError(
                "the worker half has registered no KV cache in this process",
                hint="kvstrata serves engines of one rank, whose halves share a process",
            )
        self._desk, settings = partner, self._settings
        partner.served = True
        layout = partner.pages.block_layout(settings.block_tokens_for(self._page_tokens))
        namespace = engine_namespace(
            self._llm_args,
            self._model,
            layout,
            revision=settings.weights_revision,
            version=engine_version(),
        )
        session = Session(settings.where, layout, namespace, settings.session_limits)
        session.open()
        self._keeper = Keeper(session, partner, partner.pages, settings)
        try:
            self._keeper.open()
        except BaseException:
            self.close()
            raise

    @property
    def statistics(self) -> Statistics:
        """What was offered, loaded, saved and left out so far."""
        return self._keeper.statistics if self._keeper else Statistics()

    @property
    def daemon_pid(self) -> int:
        """The daemon's process, 0 while there is none."""
        return self._keeper.session.daemon_pid if self._keeper else 0

    @property
    def daemon_address(self) -> str:
        """Where the daemon listens, empty while there is none."""
        return self._keeper.session.daemon_address if self._keeper else ""

    # -- what TensorRT-LLM calls ---------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Return (tokens behind `num_computed_tokens` that can be loaded, loaded between steps)."""
        return self._keeper.ask(request, num_computed_tokens) if self._keeper else (0, False)

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        """Take the pages that the engine has allocated."""
        self.update_state_after_alloc_by_layer_group(request, [block_ids])

    def update_state_after_alloc_by_layer_group(
        self, request: Any, block_ids_by_layer_group: Sequence[Sequence[int]]
    ) -> None:
        """Take the pages that the engine has allocated, of each group of layers."""
        if self._keeper:
            self._keeper.allocated(request.request_id, block_ids_by_layer_group)

    def build_connector_meta(self, scheduler_output: Any) -> object:
        """Return the step's plan for the worker half."""
        return self._keeper.plan(scheduler_output) if self._keeper else None

    def cancel_load(self, request: Any, start: int, end: int) -> None:
        """Forget the offer of prompt tokens from `start` up to `end`: they will be computed."""
        if self._keeper:
            self._keeper.cancel(request.request_id, start, end)

    def request_reset(self, request: Any) -> None:
        """Let go of a request whose pages are gone; it will ask again."""
        if self._keeper:
            self._keeper.reset(request.request_id)

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        """Let go of a request; True if its pages must stay until `get_finished` names it."""
        return self.request_finished_by_layer_group(request, [cache_block_ids])

    def request_finished_by_layer_group(
        self, request: Any, cache_block_ids_by_layer_group: Sequence[Sequence[int]]
    ) -> bool:
        """As `request_finished`, with the pages of each group of layers."""
        return bool(self._keeper and self._keeper.finish(request, cache_block_ids_by_layer_group))

    def close(self) -> None:
        """Say goodbye to the daemon, which a private one takes as its end; twice is harmless."""
        if self._keeper:
            self._keeper.close()
