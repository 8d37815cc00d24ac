"""The worker half: what TensorRT-LLM calls around each forward pass.

It makes no calls to the daemon: the plan of each step says everything. TensorRT-LLM has no word for
a load that failed, so nothing is promised that was not verified in mapped memory; should a slot
change all the same, the engine is stopped with an error rather than left with wrong pages.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Self

import torch

from kvstrata.connectors.trtllm.desk import desk_of
from kvstrata.connectors.trtllm.engine import check_arguments, read_model
from kvstrata.connectors.trtllm.interface import WorkerBase, check_interface
from kvstrata.connectors.trtllm.jobs import LoadJob, Report, SaveJob, StepPlan
from kvstrata.connectors.trtllm.mover import Mover
from kvstrata.connectors.trtllm.pages import EnginePages, pages_of_layout, pages_of_tensor
from kvstrata.connectors.trtllm.settings import ConnectorSettings, read_settings
from kvstrata.core.errors import ConfigError

__all__ = ["KvstrataWorker"]


class KvstrataWorker(WorkerBase):  # type: ignore[misc]  # TensorRT-LLM's, or its shape
    """Copies KV between the engine's pages and the daemon's arena.

    Owner: the executor's thread. Raises ConfigError at start for engines that it does not know.
    """

    supports_attention_dp = False

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Refuse a TensorRT-LLM that we do not know before its base classes do."""
        check_interface(cls)
        made: Self = super().__new__(cls)
        return made

    def __init__(self, llm_args: Any) -> None:
        """Check the engine's arguments."""
        super().__init__(llm_args)
        self._settings = self.connector_settings()
        self._page_tokens = check_arguments(llm_args)
        self._model = read_model(llm_args)
        self._desk = desk_of(llm_args)
        self._mover: Mover | None = None
        self._loads: list[LoadJob] = []
        self._saves: list[SaveJob] = []
        self._step = 0
        self._forward_done: Any = None
        self._waiting_saved: set[int] = set()
        self._waiting_loaded: set[int] = set()
        end = weakref.WeakMethod(self.close)
        atexit.register(lambda: (close := end()) and close())

    @classmethod
    def connector_settings(cls) -> ConnectorSettings:
        """Return the checked settings of this process; a subclass may have them elsewhere."""
        return read_settings()

    # -- at start ------------------------------------------------------------------------------

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        """Take the V1 manager's pool; raises LayoutError unless it is as expected."""
        pages = pages_of_tensor(kv_cache_tensor, self._page_tokens, self._model.heads)
        self._take(pages)

    def register_kv_cache_layout(self, layout: Any) -> None:
        """Take the V2 manager's regions; raises LayoutError for those that we do not know."""
        self._take(pages_of_layout(layout, self._page_tokens))

    def register_forward_pass_callable(self) -> Callable[[], None]:
        """Return what the engine is to call on its stream when a forward pass has been queued."""
        return self._note_forward

    # -- each step -----------------------------------------------------------------------------

    def bind_connector_meta(self, metadata: object) -> None:
        """Take the step's plan. Each job in it is carried out once, however often we are called."""
        super().bind_connector_meta(metadata)
        self._give_up(self._saves)  # of a step that never computed
        self._forward_done = None
        if isinstance(metadata, StepPlan):
            self._loads += metadata.loads
            self._saves = list(metadata.saves)
            self._step = metadata.step

    def start_load_kv(self, stream: Any) -> None:
        """Carry out the step's loads; those of requests put aside go on beside the engine."""
        loads, self._loads = self._loads, []
        if loads:
            after = self._event(stream)  # earlier work may still write to the pages
            self._submit(loads, after, stream)
        self._desk.check()

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Nothing: what the step needs was copied, or queued on its stream, before it began."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Nothing: blocks are saved whole when the step has computed."""

    def wait_for_save(self, stream: Any) -> None:
        """Start the step's saves, whose pages stay as they are until `get_finished` says so."""
        saves, self._saves = self._saves, []
        if saves:
            after = self._forward_done or self._event(stream)
            self._submit(saves, after, stream)
        self._forward_done = None

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """Return the requests whose pages nobody reads any more, and those that are loaded.

        Raises TransferError if a promised load failed.
        """
        self._desk.step_ended = max(self._desk.step_ended, self._step)
        self._waiting_saved.update(finished_gen_req_ids)
        self._waiting_loaded.update(started_loading_req_ids)
        saved = [each for each in self._waiting_saved if not self._desk.busy(each)]
        loaded = [each for each in self._waiting_loaded if not self._desk.loading(each)]
        self._desk.check()
        self._waiting_saved.difference_update(saved)
        self._waiting_loaded.difference_update(loaded)
        if self._desk.settle:
            self._desk.settle()  # an idle engine asks for nothing else
        return saved, loaded

    def close(self) -> None:
        """End the copies; twice is harmless."""
        if self._mover:
            self._mover.close()

    # -- private -------------------------------------------------------------------------------

    def _take(self, pages: EnginePages) -> None:
        if self._mover is not None:
            raise ConfigError(
                "the engine registered its KV cache twice",
                hint="this TensorRT-LLM is unknown to kvstrata; run without the connector",
            )
        self._mover = Mover(self._desk, pages, background=self._settings.background)
        self._desk.mover, self._desk.pages = self._mover, pages

    def _submit(self, jobs: Sequence[LoadJob | SaveJob], after: Any, stream: Any) -> None:
        """Hand jobs over; those of this step are carried out here, on the engine's stream."""
        assert self._mover is not None, "the engine registers its cache before the first step"
        with nullcontext() if after is None else torch.cuda.stream(stream):
            for job in jobs:
                self._mover.submit(job, after)

    def _give_up(self, saves: list[SaveJob]) -> None:
        for job in saves:
            self._desk.report(Report(job.id, done=False))
        saves.clear()

    def _note_forward(self) -> None:
        self._forward_done = self._event(None)

    def _event(self, stream: Any) -> Any:
        """Return an event behind what is queued on the stream now; None where there is no GPU."""
        if self._desk.pages is None or self._desk.pages.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream() if stream is None else stream)
        return event
