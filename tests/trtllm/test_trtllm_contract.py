"""The connector's laws, on both halves of TensorRT-LLM's, by a script in place of its executor."""

from __future__ import annotations

import contextlib
import pickle
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from kit import SharedDaemon

from kvstrata.runtime.admin import AdminClient
from kvstrata.testing.contracts.engine_connector import CAPABILITIES, EngineConnectorContract

pytestmark = pytest.mark.transformers

PAGE_TOKENS = 4
BLOCK_TOKENS = 8
PAGES = BLOCK_TOKENS // PAGE_TOKENS
COPY_S = 10.0


class Script:
    """TensorRT-LLM's calls in the order of the simulator's step, on the simulator's pages.

    The V1 manager puts a request aside for its load; the V2 manager loads in the step that first
    schedules the request, so there a step with a load computes the last token too.
    """

    block_tokens = BLOCK_TOKENS
    places = 12

    def __init__(self, engine, sim):
        self._sim, self._v2 = sim, engine.manager == "v2"
        self._leader, self._worker, self._pool = engine.scheduler, engine.worker, engine.pool
        self._requests, self._pages = {}, {}
        self._asked = {}  # name -> (computed, found) of its last question
        self._to_load, self._told, self._position = {}, set(), {}
        self._whole = set()
        self._ending = []

    def begin(self, name, tokens):
        self._requests[name] = self._sim.Request(len(self._requests) + 1, list(tokens), 1)

    def matched(self, name, computed_tokens=0):
        request = self._requests[name]
        found, aside = self._leader.get_num_new_matched_tokens(request, computed_tokens)
        assert aside == (found > 0 and not self._v2)
        self._asked[name] = computed_tokens, found
        return found

    def allocate(self, name, places, external_tokens):
        request = self._requests[name]
        computed, found = self._asked.pop(name, (0, 0))
        if external_tokens < found:
            assert self._v2, "V1 has no word for it"
            self._leader.cancel_load(request, computed + external_tokens, computed + found)
        pages = [page for place in places for page in range(place * PAGES, (place + 1) * PAGES)]
        # Each group has numbers of its own, so that a mix-up is seen.
        self._pages[name] = [[page + 2 * n for page in pages] for n in range(len(self._groups))]
        self._tell("update_state_after_alloc", name)
        if external_tokens:
            self._to_load[name] = external_tokens
            # V1 comes back behind its load; V2's first step counts from before it.
            self._position[name] = 0 if self._v2 else external_tokens

    def plan(self, computed):
        loads, self._to_load = self._to_load, {}
        steps = dict(computed)
        if self._v2:
            steps |= {each: len(self._requests[each].tokens) - loads[each] for each in loads}
        output = self._sim.SchedulerOutput()
        for name, tokens in steps.items():
            new = name not in self._told
            position = self._position.get(name, 0)
            request, pages = self._requests[name], self._pages[name]
            data = self._sim.RequestData(
                request.request_id, request.tokens if new else [],
                pages[0] if new and len(pages) == 1 else [], position, tokens,
                new_block_ids_by_layer_group=pages if new and self._v2 else [],
            )  # fmt: skip
            self._told.add(name)
            self._position[name] = position + tokens
            if name in loads or position + tokens >= len(request.tokens):
                self._whole.add(name)
            (output.new_requests if new else output.cached_requests).append(data)
        meta = self._leader.build_connector_meta(output)
        return pickle.loads(pickle.dumps(meta)), set(loads), bool(steps)

    def work(self, plan):
        meta, loads, computes = plan
        self._worker.bind_connector_meta(meta)
        self._worker.start_load_kv(None)
        if computes:
            self._worker.wait_for_save(None)
        until = time.monotonic() + COPY_S
        desk = self._worker._desk
        while desk._open:  # the copying thread has yet to end these
            assert time.monotonic() < until, "a copy does not end"
            time.sleep(0.001)
        return loads

    def report(self, report):
        numbers = {self._requests[name].request_id: name for name in report}
        ending, self._ending = self._ending, []
        saved, loaded = self._worker.get_finished(ending, [] if self._v2 else list(numbers))
        # Who ends between the work and here has the last block copied at once, by another
        # thread. The engine keeps its pages until it is named, so nobody has them before that.
        until = time.monotonic() + COPY_S
        while missing := set(ending) - set(saved):
            assert time.monotonic() < until, f"{missing} are not named"
            time.sleep(0.001)
            saved = [*saved, *self._worker.get_finished([], [])[0]]
        assert len(saved) == len(ending), "each is named once"
        return set(report) if self._v2 else {numbers[each] for each in loaded}

    def finish(self, name):
        if name in self._whole:  # the step that ends a prompt makes the first token of the answer
            self._whole.discard(name)
            self._requests[name].tokens.append(5)
        waits = self._tell("request_finished", name)
        if waits:
            self._ending.append(self._requests[name].request_id)
        return waits

    def preempt(self, name):
        self._leader.request_reset(self._requests[name])
        self._told.discard(name)
        self._whole.discard(name)
        self._position.pop(name, None)
        self._pages.pop(name)

    def fill(self, place, seed):
        import torch

        luck = torch.Generator().manual_seed(seed)
        for memory, page in self._cells(place):
            memory[page] = torch.rand(memory[page].shape, generator=luck, dtype=memory.dtype)

    def read(self, place):
        return b"".join(memory[page].numpy().tobytes() for memory, page in self._cells(place))

    def held_slots(self):
        with AdminClient(self._leader.daemon_address) as admin:
            host = admin.stats()["node"]["tiers"]["host"]
        return host["filling"] + host["staged"] + host["in_use"]

    @property
    def _groups(self):
        return self._pool.groups

    def _cells(self, place):
        for n, memory in enumerate(self._pool.memory):
            for page in range(place * PAGES, (place + 1) * PAGES):
                yield memory, page + 2 * n

    def _tell(self, call, name):
        pages = self._pages.get(name) or [[] for _ in self._groups]
        request = self._requests[name]
        if len(pages) == 1:
            return getattr(self._leader, call)(request, pages[0])
        return getattr(self._leader, f"{call}_by_layer_group")(request, pages)


@pytest.fixture(scope="module")
def daemon_for():
    """Return the address of a daemon for a kind of layout; it offers all that it keeps.

    A script computes in no time, so that nothing would be worth a load.
    """
    with contextlib.ExitStack() as ends:
        started = {}

        def address(kind):
            if kind not in started:
                folder = Path(tempfile.mkdtemp(prefix="kv"))
                ends.callback(shutil.rmtree, folder, ignore_errors=True)
                started[kind] = SharedDaemon(folder, limits={"weigh_costs": False})
                ends.callback(started[kind].signal, signal.SIGKILL)
            return started[kind].address

        yield address


class TestV1(EngineConnectorContract):
    """One pool. An offer is taken whole; the halves share a process, so reports are at hand."""

    capabilities = CAPABILITIES - {"carried_reports", "declines", "preempts", "resets"}

    @pytest.fixture
    def engine(self, start, sim, daemon_for):
        return Script(start(manager="v1", settings={"address": daemon_for("v1")}), sim)


class TestV2(EngineConnectorContract):
    """Groups of layers. An offer may be called off, and loads are made within the step."""

    capabilities = CAPABILITIES - {"carried_reports", "resets", "separate_loads"}

    @pytest.fixture(params=[1, 2], ids=["one-group", "two-groups"])
    def engine(self, start, sim, daemon_for, request):
        settings = {"address": daemon_for(f"v2, {request.param}")}
        return Script(start(manager="v2", groups=request.param, settings=settings), sim)


def test_a_step_without_new_pages_may_be_told_without_its_groups(sim):
    from kvstrata.connectors.trtllm.requests import Identity, Tracked

    tracked = Tracked(1, "r", Identity(""), list(range(24)), 24)
    pages = [[0, 1], [2, 3]]
    first = sim.RequestData(1, list(range(24)), [], 0, 8, new_block_ids_by_layer_group=pages)
    assert not tracked.note(first, new=True, groups=2)
    assert not tracked.note(sim.RequestData(1, [], [], 8, 16), new=False, groups=2)
    assert (tracked.pages, tracked.computed) == (pages, 24)
    assert tracked.note(sim.RequestData(1, [], [9], 24, 0), new=False, groups=2)
