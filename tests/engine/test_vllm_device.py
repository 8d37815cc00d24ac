"""The worker half for a GPU, on a device without one: CPU tensors stand for the engine's caches.

Streams advance in any order, so what holds here holds by events alone.
"""

from __future__ import annotations

import logging
from importlib import import_module
from random import Random

import pytest

from kvstrata.core.errors import ConfigError, LayoutError
from kvstrata.layout import GroupedCache, LayerGroup, PagedCache
from kvstrata.storage.arena import Arena
from kvstrata.testing.cudaplatform import CopierFault, FakeDevicePlatform
from kvstrata.transfer.cuda.torch_mover import TorchMover

pytestmark = pytest.mark.engine
torch = pytest.importorskip("torch", reason="no torch installed (requirements/vllm-cpu.txt)")

PAGED = PagedCache(layers=2, heads=1, page_tokens=2, channels=4, dtype="float16")  # 16 B a page
ONE_GROUP = GroupedCache((LayerGroup(PAGED, (0, 1)),))
TWO_GROUPS = GroupedCache((LayerGroup(PAGED, (0, 2)), LayerGroup(PAGED, (1, 3), 64)))
PAGES, SLOTS = 8, 4
BLOCK_TOKENS = 4  # two pages of each layer


def of_vllm(module):
    """A module of the connector; importing one warns, which only a test may."""
    return import_module(f"kvstrata.connectors.vllm.{module}")


class World:
    """A worker half, its caches, and an arena that a daemon would own."""

    def __init__(
        self, *, cache=ONE_GROUP, copier="runs", seed=1, platform=None, blocks_outermost=False
    ):
        self.platform = platform or FakeDevicePlatform(Random(seed))
        self.cache, self.layout = cache, cache.block_layout(BLOCK_TOKENS)
        self.worker = of_vllm("deviceworker").DeviceWorker(
            cache, self.layout, copier, lambda: self.platform
        )
        self.names = [[f"layers.{place}" for place in group.places] for group in cache.groups]
        luck = torch.Generator().manual_seed(seed)
        names = [name for names in self.names for name in names]
        shape = (PAGES, len(names)) if blocks_outermost else (len(names), PAGES)
        together = torch.randint(0, 99, (*shape, 1, 2, 4), generator=luck).to(torch.float16)
        layers = together.unbind(1 if blocks_outermost else 0)
        self.tensors = dict(zip(names, layers, strict=True))
        self.arenas, self.steps = [self.new_arena()], 0

    def new_arena(self):
        arena = Arena.create((SLOTS + 3) * 4096, self.layout)
        for slot in range(SLOTS):
            arena.generations[slot] = 7
        return arena

    @property
    def arena(self):
        return self.arenas[-1]

    def start(self):
        self.worker.register(self.tensors, self.names, 0)
        self.step()
        self.worker._blocks.lock.join(10)
        return self

    def plan(self, **jobs):
        self.steps += 1
        return of_vllm("metadata").StepPlan(
            epoch=len(self.arenas), arena=self.arena.address, layout=self.layout, step=self.steps,
            **jobs,
        )  # fmt: skip

    def step(self, forward=lambda: None, **jobs):
        """One step as vLLM makes it; returns its report."""
        plan = self.plan(**jobs)
        self.worker.load(plan)
        forward()
        self.worker.save(plan)  # wait_for_save
        self.worker.save(plan)  # get_finished
        return self.worker.take_report()

    def copy(self, slot, pages):
        groups = [group for group in range(len(self.cache.groups)) for _ in pages]
        times = len(self.cache.groups)
        return of_vllm("metadata").PageCopy(
            [slot] * len(groups), [0, 1] * times, list(pages) * times, groups
        )

    def save(self, slot, pages, name="r"):
        return of_vllm("metadata").SaveJob(name, len(self.arenas), self.copy(slot, pages), [slot])

    def load(self, slot, pages, request="r", generation=7):
        copy = self.copy(slot, pages)
        return of_vllm("metadata").LoadJob(
            request, len(self.arenas), copy, [generation] * len(copy.pages)
        )

    def launch(self, call):
        """Let the engine's stream do something when its turn comes."""
        self.platform.fake_streams.launch(self.platform.engine, call)

    def bytes_of(self, pages):
        return {name: tensor[list(pages)].clone() for name, tensor in self.tensors.items()}

    def fill(self, pages, value):
        for tensor in self.tensors.values():
            tensor[list(pages)] = value


@pytest.mark.parametrize("blocks_outermost", [False, True])
@pytest.mark.parametrize("cache", [ONE_GROUP, TWO_GROUPS])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_go_out_and_come_back_whatever_stream_is_ahead(cache, seed, blocks_outermost):
    world = World(cache=cache, seed=seed, blocks_outermost=blocks_outermost).start()
    before = world.bytes_of([2, 5])
    report = world.step(
        forward=lambda: world.launch(lambda: world.fill([2, 5], 3.0)), saves=[world.save(1, [2, 5])]
    )
    assert not report.saved  # the host has not waited
    world.launch(lambda: world.fill([2, 5], 4.0))  # the next step's forward pass
    world.platform.drain()
    report = world.step()
    assert [job.slots for job in report.saved] == [[1]]
    assert all((each == 4.0).all() for each in world.bytes_of([2, 5]).values())
    assert all((each != 3.0).any() for each in before.values())
    report = world.step(loads=[world.load(1, [6, 0])])
    assert not report.loaded
    world.platform.drain()
    report = world.step()
    assert report.loaded == {"r": 2 * len(cache.groups)}
    assert not world.worker.take_failed_pages()
    assert all((each == 3.0).all() for each in world.bytes_of([6, 0]).values())
    assert all((tensor[1] != 3.0).any() for tensor in world.tensors.values())  # nobody's page


@pytest.mark.parametrize("blocks_outermost", [False, True])
@pytest.mark.parametrize("copier", ["batch", "runs", "triton", "torch"])
def test_each_page_finds_its_place_as_on_the_cpu(copier, blocks_outermost):
    """The same saves by the CPU's worker half, into an arena of its own."""
    world = World(copier=copier, blocks_outermost=blocks_outermost).start()
    cpu = of_vllm("worker").WorkerHalf(ONE_GROUP, world.layout)
    cpu.register(world.tensors, world.names, 0)
    theirs = world.new_arena()
    saves = [world.save(0, [3, 1], "a"), world.save(2, [7, 4], "b")]
    plan = world.plan(saves=saves)
    plan.arena = theirs.address
    cpu.load(plan)
    cpu.save(plan)
    world.step(saves=saves)
    world.platform.drain()
    assert len(world.step().saved) == 2
    for slot in range(SLOTS):
        assert bytes(world.arena.slot(slot)) == bytes(theirs.slot(slot))
    cpu.close()


@pytest.mark.parametrize("cache", [ONE_GROUP, TWO_GROUPS])
@pytest.mark.parametrize("saved_outermost", [False, True])
def test_layers_outermost_and_blocks_outermost_keep_the_same_blocks(cache, saved_outermost):
    """What an engine of one layout saved fills the pages of one of the other; on the CPU's half."""
    arena, halves, worlds = None, [], []
    for outermost in (saved_outermost, not saved_outermost):
        world = World(cache=cache, seed=1 + len(worlds), blocks_outermost=outermost)
        half = of_vllm("worker").WorkerHalf(cache, world.layout)
        half.register(world.tensors, world.names, 0)
        worlds.append(world)
        halves.append(half)
        arena = arena or world.arena
        world.arenas = [arena]
    wrote, read = worlds
    expected = wrote.bytes_of([2, 5])
    plan = wrote.plan(saves=[wrote.save(1, [2, 5])])
    halves[0].load(plan)
    halves[0].save(plan)
    others = [page for page in range(PAGES) if page not in {6, 0}]
    untouched = read.bytes_of(others)
    halves[1].load(read.plan(loads=[read.load(1, [6, 0])]))
    assert halves[1].take_report().loaded == {"r": 2 * len(cache.groups)}
    found = read.bytes_of([6, 0])
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    after = read.bytes_of(others)
    assert all(torch.equal(untouched[name], after[name]) for name in after)
    for half in halves:
        half.close()


@pytest.mark.parametrize(
    ("settings", "layout"),
    [({}, "LBHNC"), ({"outermost": "layers"}, "LBHNC"), ({"outermost": "blocks"}, "BLHNC")],
)
def test_vllm_is_asked_for_the_layout(settings, layout):
    from types import SimpleNamespace

    from vllm.v1.kv_cache_layout import KVCacheLayout

    connector = of_vllm("connector").KvstrataConnector
    transfer = SimpleNamespace(kv_connector_extra_config=settings)
    asked = connector.get_required_kvcache_layout(SimpleNamespace(kv_transfer_config=transfer))
    assert asked == layout == KVCacheLayout[asked].name
    transfer.kv_connector_extra_config = {"outermost": "pages"}
    with pytest.raises(ConfigError, match="outermost"):
        connector.get_required_kvcache_layout(SimpleNamespace(kv_transfer_config=transfer))


def test_a_load_is_reported_only_once_it_ended_and_if_its_slot_stayed_the_same():
    world = World().start()
    world.step(loads=[world.load(0, [1, 2], "stays"), world.load(3, [4, 5], "moves")])
    assert world.worker.take_loaded() == set()
    world.arena.generations[3] = 8  # given to somebody else meanwhile
    world.platform.drain()
    report = world.step(loads=[world.load(2, [6, 7], "stale", generation=6)])
    assert report.loaded == {"stays": 2, "moves": 0}
    assert world.worker.take_failed_pages() == {4, 5}
    world.platform.drain()
    assert world.step().loaded == {"stale": 0}
    assert world.worker.take_failed_pages() == {6, 7}


def test_weights_that_changed_under_way_fail_the_load():
    world = World().start()
    world.step(loads=[world.load(0, [1, 2])])
    world.platform.drain()
    world.worker._allowed = False
    world.worker._poll()
    assert world.worker.take_report().loaded == {"r": 0}
    assert world.worker.take_failed_pages() == {1, 2}


def test_what_the_driver_refuses_to_lock_is_told_and_nothing_is_copied(caplog):
    world = World(platform=FakeDevicePlatform(Random(1), lockable_bytes=0))
    with caplog.at_level(logging.ERROR):
        world.start()
    assert "memlock" in caplog.text
    before = world.bytes_of(range(PAGES))
    report = world.step(loads=[world.load(0, [1, 2])], saves=[world.save(1, [3, 4])])
    assert report.loaded == {"r": 0}
    assert len(report.unsaved) == 1
    world.platform.drain()
    assert all(torch.equal(before[name], world.tensors[name]) for name in before)


def test_two_workers_lock_the_same_arena_each_for_itself():
    one, other = World(), World()
    other.arenas = one.arenas
    one.start()
    other.start()
    for world in (one, other):
        assert sum(world.platform.fake_runtime.registered.values()) == one.arena.length_bytes
    one.worker.close()
    assert one.platform.fake_runtime.registered == {}
    assert other.platform.fake_runtime.registered


def test_an_arena_stays_mapped_and_locked_until_its_copies_ended():
    world = World().start()
    old = world.worker._arena
    world.step(loads=[world.load(0, [1, 2])], saves=[world.save(1, [3, 4])])
    world.arenas.append(world.new_arena())
    report = world.step()  # a new daemon
    assert not report.loaded
    assert old._descriptor >= 0
    assert len(world.worker._retired) == 1
    world.platform.drain()
    report = world.step()
    assert report.loaded == {"r": 0}, "its pages are free only now"
    assert not report.saved
    assert len(report.unsaved) == 1
    assert old._descriptor < 0
    assert world.worker._retired == []
    world.worker._blocks.lock.join(10)
    world.worker.close()
    assert world.platform.fake_runtime.registered == {}


def test_a_copy_that_ends_while_its_arena_is_given_back_is_still_reported():
    world = World().start()
    world.step(loads=[world.load(0, [1, 2])])
    streams = world.platform.fake_streams
    asked = streams.event_happened

    def then_everything_happens(event):
        happened = asked(event)
        world.platform.drain()
        return happened

    streams.event_happened = then_everything_happens
    world.arenas.append(world.new_arena())
    reports = [world.step(), world.step()]
    assert [report.loaded for report in reports if report.loaded] == [{"r": 0}]
    assert world.worker._retired == []


def test_a_copy_that_the_device_refuses_fails_when_the_device_is_done():
    world = World().start()
    world.platform.fake_streams.copies_before_failure = 1
    report = world.step(loads=[world.load(0, [1, 2])])
    assert not report.loaded  # one page may still be written
    world.platform.drain()
    report = world.step(saves=[world.save(1, [3, 4])])
    assert report.loaded == {"r": 0}
    world.platform.drain()
    assert len(world.step().unsaved) == 1


def test_more_than_the_bound_is_refused_at_once():
    world = World().start()
    jobs = [world.load(0, [1, 2], f"r{number}") for number in range(258)]
    assert len(world.step(loads=jobs).loaded) == 2
    saves = [world.save(1, [3, 4], f"s{number}") for number in range(257)]
    assert len(world.step(saves=saves).unsaved) == 1


def test_a_plan_that_leaves_the_memory_is_refused_before_anything_moves():
    world = World().start()
    for slot, pages in ((SLOTS + 9, [1, 2]), (0, [1, PAGES]), (0, [-1, 2])):
        with pytest.raises(IndexError):
            world.step(loads=[world.load(slot, pages)])
    world.platform.drain()


def test_no_copier_that_works_is_an_error_at_start_with_its_reason_and_remedy():
    world = World(copier="batch")
    world.platform.faults = {"batch": CopierFault.WRONG_BYTE}
    with pytest.raises(ConfigError, match=r"no device copier.*batch: .*bytes were wrong") as caught:
        world.start()
    assert "device_copier" in caught.value.hint


def test_the_log_says_that_it_has_not_run_on_hardware(caplog):
    with caplog.at_level(logging.WARNING):
        World(copier="auto").start()
    assert "not run on hardware yet" in caplog.text


def test_the_reference_copier_alone_carries_everything():
    class TorchPlatform(FakeDevicePlatform):
        def makers(self, spaces):
            tensors = [each if torch.is_tensor(each) else torch.from_numpy(each) for each in spaces]
            return {"torch": lambda: TorchMover(tensors)}

        def host_tensor(self, memory):
            return torch.frombuffer(memory, dtype=torch.uint8)

    world = World(platform=TorchPlatform(Random(3)), copier="torch").start()
    expected = world.bytes_of([2, 5])
    world.step(saves=[world.save(1, [2, 5])])
    world.platform.drain()
    assert len(world.step().saved) == 1
    world.step(loads=[world.load(1, [6, 0])])
    world.platform.drain()
    assert world.step().loaded == {"r": 2}
    found = world.bytes_of([6, 0])
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def half_of(cache, kind, *, alone=True, copier="auto"):
    settings = of_vllm("settings").ConnectorSettings(device_copier=copier)
    layout = cache.block_layout(BLOCK_TOKENS)
    return of_vllm("deviceworker").worker_half(cache, layout, settings, kind, alone=alone)


def test_on_a_cpu_the_worker_half_is_what_it_was():
    for kind in ("cpu", "xpu"):
        assert type(half_of(ONE_GROUP, kind, alone=False)) is of_vllm("worker").WorkerHalf
    assert type(half_of(ONE_GROUP, "cuda")) is of_vllm("deviceworker").DeviceWorker


def test_what_is_not_proven_on_a_gpu_is_refused(caplog):
    split = GroupedCache((LayerGroup(PagedCache(2, 1, 2, 4, "float16", ranks=2), (0, 1)),))
    with pytest.raises(ConfigError, match="not been run on one yet"):
        half_of(ONE_GROUP, "cuda", copier=None)
    with pytest.raises(LayoutError, match="one worker"):
        half_of(split, "cuda")
    with pytest.raises(ConfigError, match="beside another connector"):
        half_of(ONE_GROUP, "cuda", alone=False)
    with pytest.raises(ConfigError, match="auto, batch, runs, triton, torch"):
        of_vllm("settings").read_settings({"device_copier": "fastest"})
    elsewhere = World()
    elsewhere.platform.device_type = "cuda"
    with pytest.raises(LayoutError, match="is on cpu, not on cuda"):
        elsewhere.start()
    world = World().start()
    other = PagedCache(2, 1, 4, 4, "float16").block_layout(4)
    world.arenas.append(Arena.create(1 << 16, other))
    plan = world.plan(saves=[world.save(1, [2, 5])])
    plan.layout = other
    with caplog.at_level(logging.WARNING):
        world.worker.load(plan)
    assert "not re-arranged on a GPU" in caplog.text
    world.worker.save(plan)
    assert len(world.worker.take_report().unsaved) == 1
