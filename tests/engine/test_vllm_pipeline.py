"""Workers that split the layers: a block is whole once every stage has written its run of it."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from kvstrata.core.config import Limits, NodeConfig, parse_tiers
from kvstrata.core.errors import LayoutError
from kvstrata.layout import GroupedCache, LayerGroup, PagedCache
from kvstrata.runtime.admin import AdminClient
from kvstrata.runtime.session import Session
from kvstrata.testing.contracts.engine_connector import EngineConnectorContract
from kvstrata.tokens import Namespace

pytestmark = pytest.mark.engine

PAGE_TOKENS, PAGES, BLOCK_TOKENS, RANKS = 4, 2, 8, 2
PAGED = PagedCache(3, 2, PAGE_TOKENS, 8, "float32", ranks=RANKS)
STAGES = (range(2), range(2, 3))
UNWEIGHED = Limits(weigh_costs=False)  # a script computes in no time
CACHE = GroupedCache((LayerGroup(PAGED, (0, 1, 2)),), STAGES)


class Shards:
    """Both halves, with two heads' ranks in each of two stages: four workers with caches of theirs.

    `broken` names workers, as (stage, rank), that have lost the arena.
    """

    block_tokens = BLOCK_TOKENS
    places = 12

    def __init__(self, workers=None):
        import torch

        from kvstrata.connectors.vllm.scheduler import SchedulerHalf
        from kvstrata.connectors.vllm.worker import WorkerHalf

        layout = CACHE.block_layout(BLOCK_TOKENS)
        space = Namespace("m", "w", "n", "float32", layout.geometry, BLOCK_TOKENS)
        self.session = Session(NodeConfig(parse_tiers("host:1MiB"), None, UNWEIGHED), layout, space)
        self.session.open()
        self.leader = SchedulerHalf(self.session, CACHE, layout, enabled=True)
        self.workers, self.caches, self.broken = {}, {}, set()
        self.requests, self.pages, self.loading = {}, {}, {}
        for stage, layers in enumerate(STAGES):
            for rank in range(RANKS):
                worker = WorkerHalf(CACHE, layout)
                names = [f"model.layers.{layer}.self_attn.attn" for layer in layers]
                caches = {name: torch.zeros(2 * 13, 2, PAGE_TOKENS, 8) for name in names}
                worker.register(caches, [names], rank, stage)
                self.workers[stage, rank] = worker
                self.caches[stage, rank] = list(caches.values())
        self.leader.fence([1 << 30] * len(self.workers) if workers is None else workers)

    def close(self):
        for worker in self.workers.values():
            worker.close()
        self.session.close()

    def begin(self, name, tokens):
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self.requests[name] = Request(
            request_id=name,
            prompt_token_ids=list(tokens),
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
        )

    def matched(self, name, computed_tokens=0):
        tokens = None
        while tokens is None:
            tokens = self.leader.matched_tokens(self.requests[name], computed_tokens)
        return tokens

    def allocate(self, name, places, external_tokens):
        pages = [page for place in places for page in _pages(place)]
        self.pages[name] = pages
        blocks = SimpleNamespace(get_block_ids=lambda: (pages,))
        self.leader.allocated(self.requests[name], blocks, external_tokens)
        if external_tokens:
            self.loading[name] = external_tokens

    def plan(self, computed):
        from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput

        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = dict(computed)
        output.kv_connector_block_state = KVConnectorBlockState(
            req_ids=set(computed),
            resolve_block_ids=lambda name: (self.pages[name],),
            boundary_state_offloads={},
        )
        plan = self.leader.build_plan(output)
        for name, tokens in computed.items():
            self.requests[name].num_computed_tokens += tokens
        return plan

    def each(self, plan):
        """Let each worker carry out the plan; return their reports, and the pages that failed."""
        reports, failed = {}, set()
        for place, worker in self.workers.items():
            if place in self.broken:
                worker._follow(plan)
                worker.close()
            worker.load(plan)
            worker.save(plan)
            failed |= worker.take_failed_pages()
            reports[place] = worker.take_report()
        return reports, failed

    def work(self, plan):
        reports, failed = self.each(plan)
        assert not failed
        return joined(reports.values())

    def report(self, report):
        if report is None:
            return set()
        self.leader.take_report(report)
        for name in report.loaded:
            self.requests[name].num_computed_tokens = self.loading.pop(name)
        return set(report.loaded)

    def finish(self, name):
        self.leader.finished(self.requests[name])
        return False

    def preempt(self, name):
        self.requests[name].num_computed_tokens = 0
        self.pages.pop(name)

    def reset(self):
        assert self.leader.clear(clean=True)

    def fill(self, place, seed):
        import torch

        luck = torch.Generator().manual_seed(seed)
        for caches in self.caches.values():
            for cache in caches:
                for page in _pages(place):
                    cache[page] = torch.rand(cache[page].shape, generator=luck)

    def read(self, place):
        return b"".join(
            cache[page].numpy().tobytes()
            for caches in self.caches.values()
            for cache in caches
            for page in _pages(place)
        )

    def held_slots(self):
        with AdminClient(self.session.daemon_address) as admin:
            host = admin.stats()["node"]["tiers"]["host"]
        return host["filling"] + host["staged"] + host["in_use"]


def joined(reports):
    """Return what vLLM makes of its workers' reports."""
    whole = None
    for report in reports:
        if report is not None:
            whole = report if whole is None else whole.aggregate(report)
    return whole


def _pages(place):
    return range(1 + place * PAGES, 1 + place * PAGES + PAGES)


@pytest.fixture(scope="module")
def shards():
    running = Shards()
    yield running
    running.close()


class TestShards(EngineConnectorContract):
    @pytest.fixture
    def engine(self, shards):
        return shards


# -- what a stage cannot do was not done --------------------------------------------------------

PROMPTS = iter(range(1, 100))


def arrive(shards, tokens=None):
    """Let a prompt of two blocks and a token arrive; return its name and tokens."""
    number = next(PROMPTS)
    tokens = tokens or [100 + number] * (2 * BLOCK_TOKENS + 1)
    shards.begin(f"one-{number}", tokens)
    return f"one-{number}", tokens


def compute(shards):
    """Compute a new prompt in the first places; return its tokens and the plan of the step."""
    name, tokens = arrive(shards)
    assert shards.matched(name) == 0
    shards.allocate(name, range(3), 0)
    for place in range(3):
        shards.fill(place, 7 + place)
    plan = shards.plan({name: len(tokens)})
    assert plan.saves
    shards.finish(name)
    return tokens, plan


def found(shards, tokens):
    name, _ = arrive(shards, tokens)
    number = shards.matched(name)
    shards.finish(name)
    return number


@pytest.fixture
def fresh():
    running = Shards()
    yield running
    running.close()


@pytest.mark.parametrize("missing", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_nothing_is_found_until_every_worker_of_every_stage_has_saved(fresh, missing):
    tokens, plan = compute(fresh)
    reports, _ = fresh.each(plan)
    late = reports.pop(missing)
    fresh.report(joined(reports.values()))
    assert found(fresh, tokens) == 0
    assert fresh.held_slots() == 2, "that worker may still write to them"
    fresh.report(joined([*reports.values(), late]))
    assert found(fresh, tokens) == 2 * BLOCK_TOKENS
    assert fresh.held_slots() == 0


@pytest.mark.parametrize("broken", [(0, 1), (1, 0)])
def test_a_block_that_one_stage_could_not_save_is_not_kept(fresh, broken):
    fresh.broken = {broken}
    tokens, plan = compute(fresh)
    report = fresh.work(plan)
    assert not report.saved
    assert [job.slots for job in report.unsaved] == [job.slots for job in plan.saves]
    fresh.report(report)
    assert found(fresh, tokens) == 0
    assert fresh.held_slots() == 0


@pytest.mark.parametrize("broken", [(0, 1), (1, 0)])
def test_a_load_that_one_stage_could_not_make_fails_in_all(fresh, broken):
    tokens, plan = compute(fresh)
    fresh.report(fresh.work(plan))
    name, _ = arrive(fresh, tokens)
    fresh.allocate(name, [4, 5, 6], fresh.matched(name))
    fresh.broken = {broken}
    reports, failed = fresh.each(fresh.plan({}))
    report = joined(reports.values())
    pages = [*_pages(4), *_pages(5)]
    assert failed == report.failed_pages == set(pages), "vLLM computes them in every stage"
    assert report.loaded == {name: 0}
    fresh.report(report)
    fresh.finish(name)
    assert fresh.held_slots() == 0


def test_a_block_is_the_same_however_the_layers_are_split(fresh):
    import numpy as np

    from kvstrata.storage.arena import Arena

    _, plan = compute(fresh)
    fresh.report(fresh.work(plan))
    arena = Arena.attach(plan.arena, plan.layout)
    slot = plan.saves[0].slots[0]
    block = np.frombuffer(bytes(arena.slot(slot)), np.float32).reshape(RANKS, 3, PAGES, -1)
    arena.close()
    assert CACHE.block_layout(BLOCK_TOKENS) == replace(CACHE, stages=()).block_layout(BLOCK_TOKENS)
    for (stage, rank), caches in fresh.caches.items():
        for layer, cache in zip(STAGES[stage], caches, strict=True):
            pages = cache.numpy()[list(_pages(0))]
            assert np.array_equal(block[rank, layer], pages.reshape(PAGES, -1))


@pytest.mark.parametrize("workers", [[1], [1, 2], [1, 2, 3]])
def test_nothing_is_saved_while_a_worker_of_some_stage_is_unknown(workers):
    shards = Shards(workers)
    try:
        name, tokens = arrive(shards)
        shards.allocate(name, range(3), 0)
        plan = shards.plan({name: len(tokens)})
        assert not plan.saves
        assert plan.introduce, "the workers are asked who they are"
    finally:
        shards.close()


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "layers"), [(0, [0]), (0, [0, 2]), (1, [1]), (1, [1, 2]), (2, [2]), (-1, [2])]
)
def test_a_worker_with_the_layers_of_another_stage_is_refused(stage, layers):
    import torch

    from kvstrata.connectors.vllm.worker import WorkerHalf

    worker = WorkerHalf(CACHE, CACHE.block_layout(BLOCK_TOKENS))
    names = [f"model.layers.{layer}.self_attn.attn" for layer in layers]
    caches = {name: torch.zeros(4, 2, PAGE_TOKENS, 8) for name in names}
    with pytest.raises(LayoutError, match=r"stage") as told:
        worker.register(caches, [names], 0, stage)
    assert told.value.hint


def _config(size, **odd):
    model = {"is_multimodal_model": odd.pop("media", False)}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=size),
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 5, **model),
        **({"lora_config": None, "speculative_config": None} | odd),
    )


def test_the_stages_are_those_that_vllm_makes(monkeypatch):
    from kvstrata.connectors.vllm.stages import staged_cache

    first = GroupedCache((LayerGroup(replace(PAGED, layers=2), (0, 1)),))
    assert staged_cache(_config(1), first) == first
    whole = staged_cache(_config(2), first)
    assert whole.stages == (range(3), range(3, 5))
    assert (whole.workers, whole.groups[0].cache.layers) == (4, 5)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,4")
    assert staged_cache(_config(2), first).stages == (range(1), range(1, 5))


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"lora_config": object()}, "LoRA"),
        ({"media": True}, "media"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"window": 16}, "several cache groups or a window"),
        ({"packing": "latent-amx"}, "latents (MLA)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_was_not_tested_with_stages_is_refused(odd, said):
    from kvstrata.connectors.vllm.stages import staged_cache

    paged = replace(PAGED, layers=2, packing=odd.pop("packing", ""))
    first = GroupedCache((LayerGroup(paged, (0, 1), odd.pop("window", 0)),))
    with pytest.raises(LayoutError, match=re.escape(f"with {said};")) as told:
        staged_cache(_config(2, **odd), first)
    assert "pipeline_parallel_size to 1" in told.value.hint


# -- the real engine ----------------------------------------------------------------------------

WARM = {"enforce_eager": False, "compilation_config": {"mode": 1, "backend": "eager"}}
"""vLLM's CPU workers make room for what a stage is handed as they warm up; eager ones never do."""


def test_stages_beside_another_connector_are_refused():
    from kvstrata.connectors.vllm.stages import refuse_beside, staged_cache

    first = GroupedCache((LayerGroup(replace(PAGED, layers=2), (0, 1)),))
    refuse_beside(first, alone=False)
    staged = staged_cache(_config(2), first)
    refuse_beside(staged, alone=True)
    with pytest.raises(LayoutError, match="with another connector; that was not tested"):
        refuse_beside(staged, alone=False)


def test_two_stages_load_what_one_wrote_and_what_they_wrote(engine_on, prompts, tmp_path):
    extra = {"tiers": f"host:64MiB,disk:{tmp_path}:64MiB"}
    with engine_on(extra) as engine:
        one = engine.ask(prompts)
        engine.wait_idle()
    staged = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp", **WARM}
    with engine_on(extra, **staged) as engine:
        restarted = engine.ask(prompts)
        cold = engine.ask(prompts, cache_salt="other")
        engine.forget()
        warm = engine.ask(prompts, cache_salt="other")
        counters = engine.counters()
    for answers in (restarted, cold, warm):
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in one]
    assert [answer.tokens_from["disk"] for answer in restarted] == [64, 128, 256, 0]
    assert [answer.tokens_from["host"] for answer in cold] == [0, 0, 0, 0]
    assert [answer.tokens_from["host"] for answer in warm] == [64, 128, 256, 0]
    assert counters["corrupt_blocks"] == 0
