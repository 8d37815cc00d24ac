"""The connector's laws, on both halves of vLLM's, by a script in place of its scheduler."""

from __future__ import annotations

import contextlib

import pytest
from kit import SharedDaemon, write_qwen3_next

from kvstrata.testing.contracts.engine_connector import CAPABILITIES, EngineConnectorContract

pytestmark = pytest.mark.engine

PAGE_TOKENS = 32
BLOCK_TOKENS = 64
PAGES = BLOCK_TOKENS // PAGE_TOKENS


class Script:
    """vLLM's calls in the order of its `kv_connector/v1/base.py`, on its own KV tensors."""

    block_tokens = BLOCK_TOKENS
    places = 12

    def __init__(self, engine):
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        self._engine = engine
        self._leader, self._worker = engine.connector, get_kv_transfer_group()
        core = engine.llm.llm_engine.engine_core.engine_core
        self._caches = core.model_executor.driver_worker.worker.model_runner.kv_caches
        self._requests = {}
        self._pages = {}
        self._loading = {}

    def begin(self, name, tokens):
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self._requests[name] = Request(
            request_id=name,
            prompt_token_ids=list(tokens),
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
        )

    def matched(self, name, computed_tokens=0):
        tokens = None
        while tokens is None:
            request = self._requests[name]
            tokens, between = self._leader.get_num_new_matched_tokens(request, computed_tokens)
        assert between == (tokens > 0)
        return tokens

    def allocate(self, name, places, external_tokens):
        from vllm.v1.core.kv_cache_manager import KVCacheBlocks
        from vllm.v1.core.kv_cache_utils import KVCacheBlock

        self._pages[name] = [page for place in places for page in _pages(place)]
        blocks = KVCacheBlocks((tuple(KVCacheBlock(page) for page in self._pages[name]),))
        self._leader.update_state_after_alloc(self._requests[name], blocks, external_tokens)
        if external_tokens:
            self._loading[name] = external_tokens

    def plan(self, computed):
        from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput

        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = dict(computed)
        output.total_num_scheduled_tokens = sum(computed.values())
        output.kv_connector_block_state = KVConnectorBlockState(
            req_ids=set(computed),
            resolve_block_ids=lambda name: (self._pages[name],),
            boundary_state_offloads={},
        )
        plan = self._leader.build_connector_meta(output)
        for name, tokens in computed.items():
            self._requests[name].num_computed_tokens += tokens
        return plan

    def work(self, plan):
        from vllm.v1.outputs import KVConnectorOutput

        self._worker.bind_connector_metadata(plan)
        self._worker.start_load_kv(None)
        self._worker.wait_for_save()
        sent, loaded = self._worker.get_finished(set())
        failed = self._worker.get_block_ids_with_load_errors()
        meta = self._worker.build_connector_worker_meta()
        self._worker.clear_connector_metadata()
        assert not failed
        return KVConnectorOutput(sent, loaded, kv_connector_worker_meta=meta)

    def report(self, report):
        self._leader.update_connector_output(report)
        loaded = set(report.finished_recving or ())
        for name in loaded:
            self._requests[name].num_computed_tokens = self._loading.pop(name)
        return loaded

    def finish(self, name):
        request = self._requests[name]
        return self._leader.request_finished(request, self._pages.get(name, []))[0]

    def preempt(self, name):
        self._requests[name].num_computed_tokens = 0
        self._pages.pop(name)

    def reset(self):
        assert self._leader.reset_cache()

    def fill(self, place, seed):
        import torch

        luck = torch.Generator().manual_seed(seed)
        for cache in self._caches:
            for page in _pages(place):
                cache[page] = torch.rand(cache[page].shape, generator=luck, dtype=cache.dtype)

    def read(self, place):
        import torch

        return b"".join(
            cache[page].contiguous().view(torch.uint8).numpy().tobytes()
            for cache in self._caches
            for page in _pages(place)
        )

    def held_slots(self):
        from kvstrata.runtime.admin import AdminClient

        with AdminClient(self._leader.daemon_address) as admin:
            host = admin.stats()["node"]["tiers"]["host"]
        return host["filling"] + host["staged"] + host["in_use"]


def _pages(place):
    """The engine's pages that make up a place; its page 0 stands for nothing."""
    return range(1 + place * PAGES, 1 + place * PAGES + PAGES)


class StateScript(Script):
    """The same on a model with states: a place is a page of attention and one of each state.

    As vLLM does it, a request computes to its last end of a block in one step, after which it has
    states there, and the rest in another. Where it has none a place is its page of attention.
    """

    block_tokens = 96

    def __init__(self, engine):
        super().__init__(engine)
        self._views = engine.worker._pages
        self._stateful = None

    def allocate(self, name, places, external_tokens):
        from vllm.v1.core.kv_cache_manager import KVCacheBlocks
        from vllm.v1.core.kv_cache_utils import KVCacheBlock

        places = list(places)
        last = self._blocks(name) - 1
        self._stateful = places[last]
        self._pages[name] = tuple(
            [_page(group, place) * (group == 3 or at >= last) for at, place in enumerate(places)]
            for group in range(4)
        )
        blocks = KVCacheBlocks(
            tuple(tuple(KVCacheBlock(page) for page in table) for table in self._pages[name])
        )
        self._leader.update_state_after_alloc(self._requests[name], blocks, external_tokens)
        if external_tokens:
            self._loading[name] = external_tokens

    def plan(self, computed):
        if not computed:
            return [self._step({}, {})]
        ((name, tokens),) = computed.items()
        blocks = self._blocks(name)
        boundary = blocks * self.block_tokens
        offers = [(group, self._pages[name][group][blocks - 1], boundary) for group in range(3)]
        first = self._step({name: boundary}, {name: offers})
        return [first, self._step({name: tokens - boundary}, {})]

    def work(self, plan):
        return [super(StateScript, self).work(step) for step in plan]

    def report(self, report):
        return {name for step in report for name in super(StateScript, self).report(step)}

    def finish(self, name):
        return self._leader.request_finished_all_groups(self._requests[name], ([],) * 4)[0]

    def fill(self, place, seed):
        import numpy as np

        luck = np.random.default_rng(seed)
        for group, layers in enumerate(self._views):
            for pages in layers:
                pages[_page(group, place)] = luck.integers(0, 256, pages.shape[1], np.uint8)

    def read(self, place):
        groups = range(4) if place == self._stateful else [3]
        return b"".join(
            pages[_page(group, place)].tobytes() for group in groups for pages in self._views[group]
        )

    def _blocks(self, name):
        return (self._requests[name].num_tokens - 1) // self.block_tokens

    def _step(self, computed, offers):
        from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput

        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = dict(computed)
        output.total_num_scheduled_tokens = sum(computed.values())
        output.kv_connector_block_state = KVConnectorBlockState(
            req_ids=set(computed),
            resolve_block_ids=self._pages.__getitem__,
            boundary_state_offloads=offers,
        )
        plan = self._leader.build_connector_meta(output)
        for name, tokens in computed.items():
            self._requests[name].num_computed_tokens += tokens
        return plan


def _page(group, place):
    """One page of a place; pages are numbered through all groups."""
    return 1 + 10 * group + place


@pytest.fixture(scope="module")
def daemon_at(tmp_path_factory):
    """`with daemon_at() as address:` runs one that offers all: a script computes in no time."""

    @contextlib.contextmanager
    def start():
        folder = tmp_path_factory.mktemp("d")
        with contextlib.closing(SharedDaemon(folder, limits={"weigh_costs": False})) as daemon:
            yield daemon.address

    return start


@pytest.fixture(scope="class", params=["llama", "deepseek"])
def script(request, engine_on, daemon_at):
    """The halves of one engine, which has run: its worker is registered and known."""
    import torch

    options = {}
    if request.param == "deepseek":
        if not torch.cpu._is_amx_tile_supported():
            pytest.skip("vLLM keeps no prefix of latents on a CPU without AMX")
        options = {"model": request.getfixturevalue("deepseek"), "dtype": "bfloat16"}
    with daemon_at() as address:
        extra = {"address": address, "block_tokens": BLOCK_TOKENS}
        with engine_on(extra, **options) as running:
            running.ask([[3] * 40], max_tokens=1)
            yield Script(running)


@pytest.fixture(scope="class")  # a process has room for one engine at a time
def state_script(engine_on, daemon_at, tmp_path_factory):
    """The same, with states."""
    model = write_qwen3_next(tmp_path_factory.mktemp("qwen"))
    with daemon_at() as address:
        extra = {"address": address, "block_tokens": StateScript.block_tokens}
        with engine_on(extra, model=model, dtype="bfloat16") as running:
            running.ask([[3] * 40], max_tokens=1)
            yield StateScript(running)


class TestVllm(EngineConnectorContract):
    @pytest.fixture
    def engine(self, script):
        return script


class TestVllmStates(EngineConnectorContract):
    capabilities = CAPABILITIES - {"lives", "preempts", "resets"}

    @pytest.fixture
    def engine(self, state_script):
        return state_script
