"""kvstrata below vLLM's own CPU tier: vLLM's `OffloadingConnector` with `KvstrataTier`."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kit import SharedDaemon

from kvstrata.core.errors import ConfigError, LayoutError
from kvstrata.runtime.admin import AdminClient
from kvstrata.storage.slab import SLAB_NAME

pytestmark = pytest.mark.engine

CHUNK_TOKENS = 32
CPU_BYTES = 8 << 20
CANARY = 1
"""Blocks that each start stores and loads to try the way."""
REQUEST_DEADLINE_S = 10.0
"""As in `test_vllm_failures`: prompts take 0.1 s, a lost daemon may add its timeouts."""


@pytest.fixture(scope="module", autouse=True)
def cpu_spec() -> Iterator[None]:
    """Let vLLM's tiers run on the CPU platform; only the copies of pages are not vLLM's."""
    path = Path(__file__).parents[2] / "bench" / "peers" / "vllm_tiering.py"
    found = importlib.util.spec_from_file_location("vllm_tiering", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["vllm_tiering"] = module
    found.loader.exec_module(module)
    yield
    del sys.modules["vllm_tiering"]


def transfer(**settings: Any) -> Any:
    """Return vLLM's configuration of its own tiers with ours below."""
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config={
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "vllm_tiering",
            "cpu_bytes_to_use": CPU_BYTES,
            "secondary_tiers": [
                {
                    "type": "KvstrataTier",
                    "module_path": "kvstrata.connectors.vllm.tiering",
                    **settings,
                }
            ],
        },
    )


@contextmanager
def tiered(engine_on, settings: dict[str, Any], **options: Any) -> Iterator[tuple[Any, Any]]:
    """Run vLLM's tiers with ours below: the engine and our tier."""
    with engine_on(kv_transfer_config=transfer(**settings), **options) as engine:
        (tier,) = engine.connector.scheduler.manager.secondary_tiers
        yield engine, tier


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[SharedDaemon]:
    """A daemon that outlives engines."""
    shared = SharedDaemon(tmp_path)
    yield shared
    shared.signal(signal.SIGCONT)
    shared.signal(signal.SIGKILL)


def chunks(prompts: list[list[int]]) -> int:
    """Return how many whole chunks prompts have."""
    return sum(len(prompt) // CHUNK_TOKENS for prompt in prompts)


def wait_stored(tier, count: int) -> None:
    """Wait until the tier has handed so many blocks to the daemon, and these are on disk."""
    until = time.monotonic() + 10
    while tier.statistics()["stored"] < count and time.monotonic() < until:
        time.sleep(0.01)
    assert tier.statistics()["stored"] >= count, tier.statistics()
    with AdminClient(tier.daemon_address) as admin:
        admin.wait_idle(30)


def damage(folder: Path) -> None:
    """Flip bits in every block on disk."""
    path = folder / SLAB_NAME
    data = bytearray(path.read_bytes())
    for place in range(1 << 16, len(data), 1 << 10):
        data[place] ^= 0x40
    path.write_bytes(data)


def test_blocks_come_from_disk_after_a_restart(engine_on, prompts, reference, tmp_path):
    settings = {"tiers": f"host:32MiB,disk:{tmp_path / 'kv'}:64MiB"}
    with tiered(engine_on, settings) as (engine, tier):
        cold = engine.ask(prompts)
        assert [each.tokens for each in cold] == reference
        assert not any(each.cached for each in cold)
        wait_stored(tier, chunks(prompts) + CANARY)
        engine.forget()
        warm = engine.ask(prompts)
        assert [each.tokens for each in warm] == reference
        assert tier.statistics()["loaded"] == CANARY, (
            "vLLM's CPU tier answered, only the canary came"
        )
    with tiered(engine_on, settings) as (engine, tier):
        again = engine.ask(prompts)
        assert [each.tokens for each in again] == reference
        assert sum(each.cached for each in again) == chunks(prompts) * CHUNK_TOKENS
        assert tier.statistics()["loaded"] == chunks(prompts) + CANARY
        # A reset of the connector ends the use of what was kept: the weights may be others.
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        fresh = engine.ask(prompts)
        assert [each.tokens for each in fresh] == reference
        assert not any(each.cached for each in fresh)
    damage(tmp_path / "kv")
    with tiered(engine_on, settings) as (engine, tier):
        spoilt = engine.ask(prompts)
        assert [each.tokens for each in spoilt] == reference
        assert not any(each.cached for each in spoilt)
        assert tier.statistics()["found"] == CANARY
        with AdminClient(tier.daemon_address) as admin:
            assert admin.stats()["node"]["counters"]["corrupt_blocks"] >= len(prompts)


def settled(engine, tier, router):
    """Return the events up to a later step, and how many blocks are, and are believed to be, in
    the host and on disk."""
    for _ in range(2):  # vLLM hands on what a step has computed in a later one
        engine.ask([[7] * 5], max_tokens=4)
        tier._keeper.drain()
    with AdminClient(tier.daemon_address) as admin:
        admin.wait_idle(30)
        tiers = admin.stats()["node"]["tiers"]
    for _ in range(2):  # in the first of them the daemon is asked again
        time.sleep(0.15)
        engine.ask([[7] * 5], max_tokens=4)
    told = router.received()
    held = [router.held.get((f"kvstrata.{name}", 0), ()) for name in ("host", "disk")]
    kept = [tiers[name]["total"] - tiers[name]["free"] for name in ("host", "disk")]
    return told, kept, [len(each) for each in held]


def test_an_outside_subscriber_sees_what_the_tier_holds(
    engine_on, make_llama, prompts, reference, router_at, tmp_path
):
    """Over vLLM's own publisher, in the words that vLLM has for its own tiers."""
    from vllm.config import KVEventsConfig

    address = f"ipc://{tmp_path}/events.sock"
    published = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=address)
    config = transfer(tiers=f"host:512KiB,disk:{tmp_path / 'kv'}:64MiB")  # room for 8 in the host
    config.kv_connector_extra_config["self_describing_kv_events"] = True
    with (
        engine_on(kv_transfer_config=config, kv_events_config=published) as engine,
        router_at(address) as router,
    ):
        (tier,) = engine.connector.scheduler.manager.secondary_tiers

        def settle():
            return settled(engine, tier, router)

        def ask(index):
            (answer,) = engine.ask(prompts[index : index + 1])
            assert answer.tokens == reference[index]
            return settle()

        told, kept, held = ask(1)
        assert held == kept == [4, 4]
        own = [name for each in told if each.medium == "GPU" for name in each.block_hashes][:4]
        for where, medium in (("host", "CPU"), ("disk", "STORAGE")):
            ours = [each for each in told if each.ownership == f"kvstrata.{where}"]
            assert {name for each in ours for name in each.block_hashes} == set(own)
            assert {(each.medium, each.locality) for each in ours} == {(medium, "LOCAL")}
            assert router.tokens(prompts[1], f"kvstrata.{where}") == 128
        assert router.groups == {0: ("full_attention", 32, None)}
        told, kept, held = ask(2)  # takes slots of the host
        assert held == kept
        gone = [each for each in told if not hasattr(each, "token_ids") and each.ownership]
        assert {name for each in gone for name in each.block_hashes} <= set(own)
        assert {(each.medium, each.ownership) for each in gone} == {("CPU", "kvstrata.host")}
        assert router.tokens(prompts[1], "kvstrata.host") < 128
        assert router.tokens(prompts[1], "kvstrata.disk") == 128
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        _, still, held = settle()
        assert still == kept, "the daemon knows nothing of the reset"
        assert held == [0, 0], "but nobody can load them any more"
        _, _, held = ask(1)
        assert held == [4, 4]
        model = make_llama(tmp_path / "other", seed=1)
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model)})
        engine.ask(prompts[:1])
        assert settle()[2] == [0, 0], "of other weights"
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        engine.ask(prompts[1:2])
        assert settle()[2] == [4, 4], "it goes on"
        os.kill(tier.daemon_pid, signal.SIGKILL)
        for _ in range(3):
            time.sleep(0.15)
            engine.ask([[7] * 5], max_tokens=4)
        router.received()
        assert not any(router.held.values()), "nobody can follow it now"


def test_a_lost_daemon_costs_time_only(engine_on, prompts, reference, daemon):
    with tiered(engine_on, {"address": daemon.address, "staging_timeout_s": 1.0}) as (engine, tier):
        engine.ask(prompts[:1])
        for number in (signal.SIGSTOP, signal.SIGKILL):
            daemon.signal(number)
            began = time.monotonic()
            assert [each.tokens for each in engine.ask(prompts)] == reference
            assert time.monotonic() - began < REQUEST_DEADLINE_S
            assert engine.llm.reset_prefix_cache(reset_connector=True)
        counted = tier.statistics()
        assert counted["unstored"] >= chunks(prompts)
        daemon.start()
        until = time.monotonic() + 10
        while tier.statistics()["stored"] == counted["stored"] and time.monotonic() < until:
            assert engine.llm.reset_prefix_cache(reset_connector=True)
            assert [each.tokens for each in engine.ask(prompts)] == reference
        assert tier.statistics()["stored"] > counted["stored"], "the daemon was not found again"


def test_only_the_same_model_and_salt_find_blocks(
    engine_on, make_llama, prompts, reference, daemon, tmp_path
):
    settings = {"address": daemon.address}
    with tiered(engine_on, settings) as (engine, tier):
        assert [each.tokens for each in engine.ask(prompts)] == reference
        wait_stored(tier, chunks(prompts) + CANARY)
        layout = tier._session_at_start.layout
    with tiered(engine_on, settings) as (engine, tier):
        salted = engine.ask(prompts, cache_salt="another tenant")
        assert [each.tokens for each in salted] == reference
        assert tier.statistics()["found"] == CANARY
        assert tier.statistics()["asked"] == chunks(prompts) + CANARY
        assert sum(each.cached for each in engine.ask(prompts)) == chunks(prompts) * CHUNK_TOKENS
    other = make_llama(tmp_path / "other", seed=1)
    with engine_on(model=other) as engine:
        expected = [each.tokens for each in engine.ask(prompts)]
    assert expected != reference
    with tiered(engine_on, settings, model=other) as (engine, tier):
        assert tier._session_at_start.layout == layout, "else the daemon refuses it anyway"
        assert [each.tokens for each in engine.ask(prompts)] == expected
        assert tier.statistics()["found"] == CANARY
    with pytest.raises(ConfigError, match="layout"), tiered(engine_on, settings, dtype="bfloat16"):
        pass


def test_new_weights_are_noticed_without_a_reset(
    engine_on, make_llama, tiny_model, prompts, reference, tmp_path, caplog
):
    other = make_llama(tmp_path / "other", seed=1)
    with engine_on(model=other) as engine:
        expected = [each.tokens for each in engine.ask(prompts)]
    settings = {"tiers": f"host:32MiB,disk:{tmp_path / 'kv'}:64MiB"}
    long = [prompts[2] + prompts[1]]  # goes on where an old block ends
    with tiered(engine_on, settings) as (engine, tier):

        def load(model):
            engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model)})

        def move(work):
            """Return what the tier found and stored meanwhile."""
            tier._keeper.drain()
            before = tier.statistics()
            work()
            tier._keeper.drain()
            after = tier.statistics()
            return [after[name] - before[name] for name in ("found", "stored")]

        assert move(lambda: engine.ask(prompts)) == [0, chunks(prompts)]
        engine.forget()
        load(other)
        with caplog.at_level("WARNING", "kvstrata.vllm"):
            assert move(lambda: engine.ask(long)) == [0, 0]
        assert caplog.text.count("the model's weights have changed") == 1
        load(tiny_model)
        assert move(lambda: engine.ask(long)) == [0, 0], "vLLM's CPU tier has blocks of both"
        # The reset and the change in either order; then all goes on, under other names.
        load(other)
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        assert move(lambda: engine.ask(prompts)) == [0, chunks(prompts)]
        assert [each.tokens for each in engine.ask(prompts)] == expected
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        load(tiny_model)
        assert move(lambda: engine.ask(prompts)) == [0, chunks(prompts)]
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        load(other)
        assert move(lambda: engine.ask(long)) == [0, chunks(long)]
        with AdminClient(tier.daemon_address) as admin:
            admin.wait_idle(30)
    # On disk are blocks of the other weights, too: who has the files' weights must not find them.
    with tiered(engine_on, settings) as (engine, tier):
        assert [each.tokens for each in engine.ask(prompts)] == reference
        assert tier.statistics()["found"] == chunks(prompts) + CANARY, "those stored first"
        engine.ask(long)
        assert tier.statistics()["found"] == chunks(prompts) + CANARY


def test_what_was_being_loaded_when_the_weights_changed_is_not_used(
    engine_on, make_llama, prompts, tmp_path
):
    """The copy is held up until the new weights are there."""
    from vllm import SamplingParams

    other = make_llama(tmp_path / "other", seed=1)
    with engine_on(model=other) as engine:
        (expected,) = engine.ask(prompts[2:3], max_tokens=8)
    settings = {"tiers": f"host:32MiB,disk:{tmp_path / 'kv'}:64MiB"}
    with tiered(engine_on, settings) as (engine, tier):
        engine.ask(prompts)
        wait_stored(tier, chunks(prompts) + CANARY)
    with tiered(engine_on, settings) as (engine, tier):
        core, keeper = engine.llm.llm_engine, tier._keeper
        go, began = threading.Event(), threading.Event()
        copy_in = keeper._copy_in

        def held(*arguments):
            began.set()
            assert go.wait(30)
            return copy_in(*arguments)

        keeper._copy_in = held
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        core.add_request("new", {"prompt_token_ids": prompts[2]}, sampling)
        while not began.is_set():
            core.step()
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        go.set()
        keeper.drain()
        assert tier.statistics()["loaded"] == CANARY + chunks(prompts[2:3])
        outputs = []
        while core.has_unfinished_requests():
            outputs += [each for each in core.step() if each.finished]
        assert outputs[0].num_cached_tokens == 0
        assert tuple(outputs[0].outputs[0].token_ids) == expected.tokens


def test_a_reset_while_a_request_runs_ends_all_storing(engine_on, make_llama, prompts, tmp_path):
    """vLLM could not forget its own blocks then: new requests find them, and it hands them on."""
    from vllm import SamplingParams

    other = make_llama(tmp_path / "other", seed=1)
    with tiered(engine_on, {"tiers": "host:32MiB"}) as (engine, tier):
        core = engine.llm.llm_engine
        scheduler = core.engine_core.engine_core.scheduler

        def add(name, tokens, **transfer):
            extra = {"kv_transfer_params": transfer}
            sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, extra_args=extra)
            core.add_request(name, {"prompt_token_ids": prompts[2]}, sampling)

        add("long", 100, max_offload_tokens=0)  # else vLLM's CPU tier has them from it
        while not scheduler.running:
            core.step()
        core.step()
        assert not engine.llm.reset_prefix_cache(reset_connector=True)
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        before = tier.statistics()["stored"]
        add("short", 8)
        cached = 0
        while core.has_unfinished_requests():
            cached = max([cached, *(each.num_cached_tokens or 0 for each in core.step())])
        assert cached >= CHUNK_TOKENS, "of the weights that were"
        tier._keeper.drain()
        assert tier.statistics()["stored"] == before
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        engine.ask(prompts)
        wait_stored(tier, before + chunks(prompts))


def test_vllm_goes_on_when_the_thread_fails(engine_on, prompts, reference):
    with tiered(engine_on, {"tiers": "host:32MiB"}) as (engine, tier):
        keeper = tier._keeper
        keeper._rows = keeper._rows[:, :-1]  # no copy fits any more
        assert [each.tokens for each in engine.ask(prompts)] == reference
        keeper._thread.join(10)
        assert not keeper._thread.is_alive()
        keeper.drain()  # would wait for ever
        engine.forget()
        assert [each.tokens for each in engine.ask(prompts)] == reference
        assert keeper.statistics()["stored"] == CANARY


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("lora_config", object(), "LoRA"),
        ("weight_transfer_config", object(), "weight_transfer_config"),
        ("model_config.is_multimodal_model", True, "images"),
        ("model_config.enable_prompt_embeds", True, "prompt_embeds"),
        ("model_config.runner_type", "pooling", "pooling"),
        ("model_config.enable_sleep_mode", True, "sleep_mode"),
        ("cache_config.prefix_caching_hash_algo", "xxhash", "xxhash"),
        ("model_config.use_mla", True, "MLA"),
        ("spec.parallel.world_size", 2, "more than one worker"),
        ("spec.canonical_layout", True, "canonical_layout"),
    ],
)
def test_what_vllms_hash_does_not_say_is_refused(place, value, said):
    from kvstrata.connectors.vllm.tiering.identity import refuse_unknown

    plain = SimpleNamespace(
        lora_config=None,
        weight_transfer_config=None,
        model_config=SimpleNamespace(
            is_multimodal_model=False,
            enable_prompt_embeds=False,
            runner_type="generate",
            enable_sleep_mode=False,
            use_mla=False,
        ),
        cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256"),
        spec=SimpleNamespace(parallel=SimpleNamespace(world_size=1), canonical_layout=False),
    )
    refuse_unknown(plain, SimpleNamespace(config=plain.spec))
    *path, name = place.split(".")
    holder = plain
    for each in path:
        holder = getattr(holder, each)
    setattr(holder, name, value)
    with pytest.raises(ConfigError, match=said):
        refuse_unknown(plain, SimpleNamespace(config=plain.spec))


def test_settings_and_versions_that_it_does_not_know_are_refused(engine_on, monkeypatch):
    import vllm

    with pytest.raises(ConfigError, match="block_tokens"), tiered(engine_on, {"block_tokens": 64}):
        pass
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(LayoutError, match="not a version"), tiered(engine_on, {}):
        pass


def test_what_a_request_asks_for_its_blocks_is_done(engine_on, prompts, reference):
    def ask(index, **hints):
        """Return how many blocks the tier has stored for one more answer."""
        before = tier.statistics()["stored"]
        extra = {"extra_args": {"kv_transfer_params": {"kvstrata": hints}}}
        (answer,) = engine.ask([prompts[index]], sampling=extra)
        assert answer.tokens == reference[index]
        tier._keeper.drain()
        return tier.statistics()["stored"] - before

    with tiered(engine_on, {"tiers": "host:32MiB", "tenant": "house"}) as (engine, tier):
        assert ask(0, store=False) == 0
        assert ask(0) == 0, "vLLM's CPU tier has them and hands them to nobody again"
        assert ask(1, tenant="guest") == chunks(prompts[1:2])
        assert ask(2, retention=[{"start": 128, "ttl_s": 0.2}]) == chunks(prompts[2:3])
        with AdminClient(tier.daemon_address) as admin:
            rows = admin.stats()["node"]["tenants"]
        held = {each["tenant"]: each["slots"]["host"] for each in rows}
        assert held["guest"] == chunks(prompts[1:2])
        time.sleep(0.3)
        manager = engine.connector.scheduler.manager
        engine.ask(prompts[3:])  # vLLM ends the requests before it only now
        tier._keeper.drain()
        engine.ask([[7] * 5], max_tokens=2)  # what was stored is no work at hand any more
        engine.forget()
        manager.primary_tier.reset_cache()  # only vLLM's: what is below is asked for
        (again,) = engine.ask(prompts[2:3])
        assert again.tokens == reference[2]
        assert again.cached == 128


def test_hints_are_of_the_blocks_that_vllm_hands_on():
    from kvstrata.connectors.vllm.tiering.hints import block_hints
    from kvstrata.core.retention import BlockHint, Retention

    ranges = [Retention(0, 64, 80), Retention(96, None, 50)]
    assert block_hints([], 32, [32]) == []
    assert block_hints(ranges, 32, [32, 64, 96, 128]) == [BlockHint(0, 2, 80), BlockHint(3, 1, 50)]
    # The second and the fourth are in vLLM's CPU tier; of one the place is not known.
    assert block_hints(ranges, 32, [32, 96, None, 160, 192]) == [
        BlockHint(0, 1, 80),
        BlockHint(3, 2, 50),
    ]
    assert len(block_hints([Retention(priority=1)] * 1024, 32, [32, 96])) == 1024


def test_a_reset_ends_what_waits_to_be_stored(engine_on, prompts, reference):
    with tiered(engine_on, {"tiers": "host:32MiB"}) as (engine, tier):
        keeper = tier._keeper
        go, began = threading.Event(), threading.Event()
        store = keeper._store

        def held(work):
            began.set()
            assert go.wait(30)
            return store(work)

        keeper._store = held
        engine.ask(prompts)
        assert began.wait(10)
        before = tier.statistics()
        waiting = sum(len(each.rows) for each in keeper._stores)
        assert waiting, "else there is nothing to end"
        threading.Timer(0.2, go.set).start()
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        after = tier.statistics()
        assert after["cancelled"] - before["cancelled"] == waiting
        assert after["stored"] == before["stored"], "the one at hand ended, too"
        assert not engine.connector.scheduler.manager._jobs
        assert [each.tokens for each in engine.ask(prompts)] == reference
        wait_stored(tier, before["stored"] + chunks(prompts))


def test_a_first_look_comes_before_anything_is_computed():
    import torch

    from kvstrata.connectors.vllm.tiering.weights import WeightsGuard
    from kvstrata.connectors.vllm.weights import WeightsEye

    layer = torch.nn.Linear(4, 4)
    layer.load_weights = set
    guard = WeightsGuard(WeightsEye(layer))
    guard.reset()
    layer.weight.data.fill_(1.0)  # between the reset and the next step: nothing is of before
    guard.scheduled()
    assert guard.may_find()
    guard.scheduled()
    assert guard.may_store()
    layer.weight.data.fill_(2.0)
    assert guard.may_store(), "what is stored now was computed before"
    guard.scheduled()
    assert not guard.may_store()
    assert not guard.may_find()
    guard.reset()
    assert guard.may_find()
    guard.reset()
    guard.scheduled()  # a prompt without a whole block: nobody asked about it
    layer.weight.data.fill_(3.0)
    guard.scheduled()
    assert not guard.may_store(), "its first tokens were computed before"


def test_weights_that_cannot_be_seen_are_refused(engine_on, monkeypatch):
    from kvstrata.connectors.vllm.tiering import tier

    monkeypatch.setattr(tier, "calling_model", lambda: None)  # as with vLLM's other executors
    with pytest.raises(ConfigError, match="cannot see the model's weights"), tiered(engine_on, {}):
        pass


def test_only_what_can_be_loaded_is_told_of():
    """In vLLM's words, whether it remembers what a key stands for or has the hash alone."""
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.events import (
        OffloadingEventsTracker,
    )
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
    from vllm.v1.kv_offload.base import OffloadingKVEventsConfig, make_offload_key

    from kvstrata.connectors.following import Moved
    from kvstrata.connectors.vllm.tiering.events import RowEvents, RowName

    hashes = [bytes([place]) * 32 for place in range(3)]
    keys = [make_offload_key(each, 0) for each in hashes]
    places = {maybe_convert_block_hash(each): place for place, each in enumerate(hashes)}
    vllm = OffloadingEventsTracker(
        OffloadingKVEventsConfig(enable_kv_cache_events=True, self_describing_kv_events=False)
    )
    rows = RowEvents()

    def take(mark, *moves):
        """Return (tier, whether stored, blocks) of each event that vLLM makes."""
        moved = [
            Moved(tier, stored, [RowName(of, keys[place]) for place in which])
            for tier, stored, of, which in moves
        ]
        return sorted(
            (each.ownership, hasattr(each, "token_ids"), places[name])
            for each in vllm.take_events(rows.take(mark, moved))
            for name in each.block_hashes
        )

    host, disk = "kvstrata.host", "kvstrata.disk"
    assert take("", ("host", True, "", [0, 1]), ("disk", True, "", [0])) == [
        (disk, True, 0), (host, True, 0), (host, True, 1),
    ]  # fmt: skip
    assert take("", ("host", True, "", [1, 2]), ("host", True, "other", [0])) == [(host, True, 2)]
    assert take("", ("host", False, "", [0]), ("host", False, "", [0])) == [(host, False, 0)]
    assert take("") == []
    after = take("next", ("host", True, "", [0]), ("host", True, "next", [1]))
    assert after == [
        (disk, False, 0), (host, False, 1), (host, False, 2), (host, True, 1),
    ], "what was kept before a reset is of no use"  # fmt: skip
    assert take("next", ("host", False, "", [1])) == [], "that of before the reset"
    assert take(None, ("host", True, "next", [0])) == [(host, False, 1)], "weights have changed"
    assert take(None, ("host", False, "next", [0, 1])) == []


def test_events_that_vllm_would_tell_half_of_are_not_made():
    from kvstrata.connectors.vllm.tiering.events import publishes

    def answer(*, wanted, described, pages):
        asked = SimpleNamespace(enable_kv_cache_events=wanted, self_describing_kv_events=described)
        return publishes(SimpleNamespace(kv_events_config=asked, blocks_per_chunk=pages))

    assert answer(wanted=True, described=True, pages=1)
    assert answer(wanted=True, described=False, pages=4)
    assert not answer(wanted=True, described=True, pages=2)
    assert not answer(wanted=False, described=False, pages=1)
