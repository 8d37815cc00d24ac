"""vLLM's events: its own tell of blocks that we load, and a recording of them can be replayed."""

from __future__ import annotations

import os
import signal
import time

import pytest

from kvstrata.core.ids import HASH_BYTES, SequenceHash
from kvstrata.core.tier import HOST, TierName
from kvstrata.manager.changes import Changes
from kvstrata.runtime import messages as wire
from kvstrata.runtime.admin import AdminClient

pytestmark = pytest.mark.engine


def test_what_vllm_publishes_can_be_read(tmp_path) -> None:
    import msgspec
    from vllm.distributed.kv_events import (
        AllBlocksCleared,
        BlockRemoved,
        BlockStored,
        EventBatch,
    )

    from kvstrata.sim.traces import open_trace

    def stored(parent, *names):
        return BlockStored(
            block_hashes=list(names),
            parent_block_hash=parent,
            token_ids=[1] * 16 * len(names),
            block_size=16,
            lora_id=None,
            medium="GPU",
            lora_name=None,
        )

    batches = [
        EventBatch(ts=1.0, events=[stored(None, b"a" * 32, b"b" * 32)]),
        EventBatch(ts=2.0, events=[stored(b"b" * 32, 7), BlockRemoved([7], "GPU")]),
        EventBatch(ts=3.0, events=[AllBlocksCleared()], data_parallel_rank=0),
    ]
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(batch) + b"\n" for batch in batches))
    first, second = open_trace(path)
    assert [len(first.blocks), len(second.blocks)] == [2, 3]
    assert second.blocks[:2] == first.blocks
    assert second.arrival_s == 1.0


def test_vllm_tells_of_blocks_that_were_loaded(engine_on, prompts):
    """In its own memory, as of blocks that it has computed."""
    from vllm.config import KVEventsConfig
    from vllm.distributed.kv_events import BlockStored

    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    with engine_on({"tiers": "host:64MiB"}, kv_events_config=events) as engine:
        scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
        told = []
        scheduler.kv_event_publisher.publish = lambda batch: told.extend(batch.events)
        for _ in range(2):
            told.clear()
            (answer,) = engine.ask(prompts[1:2], max_tokens=2)
            engine.forget()
    assert answer.tokens_from["host"] == 128
    stored = [each for each in told if isinstance(each, BlockStored) and not each.ownership]
    assert [token for each in stored for token in each.token_ids] == prompts[1]
    assert {each.medium for each in stored} == {"GPU"}


def names(told, kind, medium):
    """Return vLLM's names of the blocks that events of one kind tell of."""
    found = [each for each in told if type(each).__name__ == kind and each.medium == medium]
    return [name for each in found for name in each.block_hashes]


def test_an_outside_subscriber_sees_what_the_tiers_hold(
    engine_on, prompts, reference, router_at, tmp_path
):
    """Over vLLM's own ZeroMQ publisher, as a router would."""
    from vllm.config import KVEventsConfig

    address = f"ipc://{tmp_path}/events.sock"
    published = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=address)
    tiers = f"host:512KiB,disk:{tmp_path / 'kv'}:64MiB"  # the host has room for 4 blocks
    with (
        engine_on({"tiers": tiers}, kv_events_config=published) as engine,
        router_at(address) as router,
    ):
        held = router.held

        def ask(index):
            """Return the events up to a later step, after everything is on disk."""
            (answer,) = engine.ask(prompts[index : index + 1])
            assert answer.tokens == reference[index]
            engine.wait_idle()
            engine.forget()
            time.sleep(0.15)  # the daemon is asked again
            engine.ask([[7] * 5], max_tokens=2)
            told = router.received()
            with AdminClient(engine.connector.daemon_address) as admin:
                tiers = admin.stats()["node"]["tiers"]
            for tier in ("host", "disk"):  # two pages to a block
                kept = tiers[tier]["total"] - tiers[tier]["free"]
                believed = held.get((f"kvstrata.{tier}", 0), ())
                assert len(believed) == 2 * kept, "what a router believes is true"
            return told

        told = ask(1)  # 128 tokens: 4 pages, 2 blocks
        assert router.groups == {0: ("full_attention", 32, None)}, "as vLLM says of its own"
        assert router.tokens(prompts[1], "kvstrata.host") == 128
        own = names(told, "BlockStored", "GPU")[:4]
        assert len(own) == 4
        for medium, tier in (("CPU", "host"), ("STORAGE", "disk")):
            assert names(told, "BlockStored", medium) == own, "vLLM's own names"
            stored = [each for each in told if getattr(each, "ownership", "") == f"kvstrata.{tier}"]
            assert [each.token_ids for each in stored] == [prompts[1][:64], prompts[1][64:]]
            assert [each.parent_block_hash for each in stored] == [None, own[1]]
            assert {(each.block_size, each.locality) for each in stored} == {(32, "LOCAL")}
        assert not names(told, "BlockRemoved", "CPU")
        told = ask(2)  # takes the host's slots from those before
        removed = names(told, "BlockRemoved", "CPU")
        assert removed
        assert set(removed) <= set(own)
        assert not names(told, "BlockRemoved", "STORAGE")
        told = ask(1)  # found on disk, staged into the host
        assert set(removed) <= set(names(told, "BlockStored", "CPU"))
        assert not names(told, "BlockStored", "STORAGE"), "told of already"
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        ask(3)
        assert not any(held.values()), "the last prompt has no whole block"
        ask(1)
        assert all(held.values())
        os.kill(engine.connector.daemon_pid, signal.SIGKILL)
        engine.ask([[7] * 5], max_tokens=4)
        told = router.received()
        for medium in ("CPU", "STORAGE"):
            assert set(names(told, "BlockRemoved", medium)) == set(own), "nobody can follow it now"


class Followed:
    """A session's standing, and a record of changes as the daemon keeps it."""

    def __init__(self):
        self.welcome, self.epoch, self.record = object(), 1, Changes(1000)

    def changes(self, cursor):
        got = self.record.since(cursor)
        rows = [(str(each.tier), each.stored, b"".join(each.keys)) for each in got.changes]
        return wire.Changed(got.cursor, got.lost, got.more, rows)


KEYS = [SequenceHash(bytes([block] * HASH_BYTES)) for block in range(5)]


def followed(groups, block_tokens, hash_tokens=16):
    """Return events of a cache of `groups`, what they count, their session, and what vLLM calls
    the pages of a request's 160 tokens; each group is (layer group, kind, window)."""
    from vllm import SamplingParams
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
    from vllm.v1.request import Request

    from kvstrata.connectors.vllm.events import EventGroup, EventWords, TierEvents
    from kvstrata.connectors.vllm.metrics import ConnectorStats
    from kvstrata.layout import GroupedCache

    words = EventWords(
        GroupedCache(tuple(group for group, _, _ in groups)),
        block_tokens,
        hash_tokens,
        tuple(
            EventGroup(index, group.cache.page_tokens, kind, window)
            for index, (group, kind, window) in enumerate(groups)
        ),
    )
    session, stats = Followed(), ConnectorStats()
    told = TierEvents(words, stats, interval_s=0.0)
    told.take(session)
    request = Request("r", list(range(160)), SamplingParams(), None, cache_salt="salt")
    request.block_hashes = [bytes([page] * 32) for page in range(160 // hash_tokens)]
    told.know(request, KEYS[: 160 // block_tokens], 0)
    return told, stats, session, list(map(maybe_convert_block_hash, request.block_hashes))


def layers(places, page_tokens, window=0, states=0):
    """Return a group of layers."""
    from kvstrata.layout import LayerGroup, PagedCache

    packing = {"packing": "state"} if states else {}
    dtype, channels = ("uint8", 32) if states else ("float16", 16)
    pages = PagedCache(len(places), 1, page_tokens, channels, dtype, **packing)
    return LayerGroup(pages, places, window, states)


WHOLE = "full_attention"


def test_a_block_is_told_in_vllms_words():
    told, stats, session, _ = followed([(layers((0,), 16), WHOLE, None)], 32)
    session.record.note(HOST, KEYS[:2], stored=True)
    session.record.note(TierName("shared"), KEYS[:1], stored=True)
    session.record.note(TierName("disk2"), KEYS[:1], stored=True)
    session.record.note(HOST, [SequenceHash(b"?" * HASH_BYTES)], stored=True)
    first, second, shared, disk = told.take(session)
    assert first.extra_keys == [("salt",), None]
    assert second.extra_keys in (None, [None, None])
    assert second.parent_block_hash == first.block_hashes[1]
    assert second.token_ids == list(range(32, 64))
    assert (first.group_idx, first.kv_cache_spec_kind, first.block_size) == (0, WHOLE, 16)
    assert (shared.medium, shared.locality, shared.ownership) == (
        "STORAGE", "REMOTE", "kvstrata.shared",
    )  # fmt: skip
    assert (disk.medium, disk.locality, disk.ownership) == ("STORAGE", "LOCAL", "kvstrata.disk2")
    assert stats.data == {"untold_blocks": 1}, "another engine's"
    assert told.take(session) == []
    told.forget()
    assert len(told.take(session)) == 3, "in each tier, as removed"
    assert told.take(session) == []


def test_a_block_of_all_groups_is_told_of_in_each():
    """Their pages differ in length; vLLM has a hash behind each 16 tokens."""
    told, _, session, pages = followed(
        [(layers((1, 3), 32, 100), "sliding_window", 100), (layers((0, 2), 16), WHOLE, None)], 64
    )
    session.record.note(HOST, KEYS[1:2], stored=True)
    windowed, whole = told.take(session)
    assert (windowed.group_idx, windowed.block_size) == (0, 32)
    assert (windowed.kv_cache_spec_kind, windowed.kv_cache_spec_sliding_window) == (
        "sliding_window", 100,
    )  # fmt: skip
    assert windowed.block_hashes == [pages[5], pages[7]], "a long page has its last hash"
    assert (whole.group_idx, whole.block_size) == (1, 16)
    assert (whole.kv_cache_spec_kind, whole.kv_cache_spec_sliding_window) == (WHOLE, None)
    assert whole.block_hashes == pages[4:8]
    assert windowed.parent_block_hash == whole.parent_block_hash == pages[3]
    assert windowed.token_ids == whole.token_ids == list(range(64, 128))
    session.record.note(HOST, KEYS, stored=False)
    gone = {each.group_idx: each.block_hashes for each in told.take(session)}
    assert gone == {0: windowed.block_hashes, 1: whole.block_hashes}


def test_a_state_is_told_of_in_its_own_group():
    from kvstrata.connectors.vllm.states import chains
    from kvstrata.layout import GroupedCache

    state, attention, other = layers((0,), 32, 0, 500), layers((1,), 32), layers((2,), 32, 0, 500)
    told, _, session, pages = followed(
        [(state, "mamba", None), (attention, WHOLE, None), (other, "mamba", None)], 32
    )
    keys = chains(GroupedCache((state, attention, other)), KEYS)
    session.record.note(HOST, keys[:3], stored=True)  # attention's
    assert [each.group_idx for each in told.take(session)] == [1, 1, 1]
    session.record.note(HOST, [keys[5 + 2], keys[10 + 2]], stored=True)  # behind the third
    first, second = told.take(session)
    assert [first.group_idx, second.group_idx] == [0, 2]
    assert first.block_hashes == second.block_hashes == [pages[5]]
    assert (first.parent_block_hash, first.token_ids) == (pages[3], list(range(64, 96)))
    session.record.note(HOST, [keys[5 + 2]], stored=False)
    (gone,) = told.take(session)
    assert (gone.group_idx, gone.block_hashes) == (0, [pages[5]]), "the other one is there"


def test_what_vllm_has_not_named_yet_is_not_told_of():
    from vllm import SamplingParams
    from vllm.v1.request import Request

    told, stats, session, _ = followed([(layers((0,), 16), WHOLE, None)], 32)
    request = Request("s", list(range(200, 264)), SamplingParams(), None)
    request.block_hashes = [b"0" * 32, b"1" * 32, b"2" * 32]  # one short of two blocks
    keys = [SequenceHash(bytes([block] * HASH_BYTES)) for block in (100, 101)]
    told.know(request, keys, 0)
    session.record.note(HOST, keys, stored=True)
    (event,) = told.take(session)
    assert event.token_ids == list(range(200, 232))
    assert stats.data == {"untold_blocks": 1}


@pytest.mark.parametrize(
    ("version", "hash_tokens", "windows", "said"),
    [
        ("0.32.0", 16, [0, 64], ""),
        ("0.32.0", 32, [0], "a hash each 32 tokens only"),
        ("0.31.0", 16, [64], "several cache groups or windows with vLLM 0.31.0"),
        ("0.31.0", 16, [0], ""),
    ],
)
def test_events_that_were_not_tried_are_not_made(
    monkeypatch, caplog, version, hash_tokens, windows, said
):
    from types import SimpleNamespace

    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from kvstrata.connectors.vllm import events, releases
    from kvstrata.connectors.vllm.metrics import ConnectorStats
    from kvstrata.layout import GroupedCache

    cache = GroupedCache(
        tuple(layers((place,), 16, window) for place, window in enumerate(windows))
    )
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float16)
    groups = [SimpleNamespace(kv_cache_spec=spec) for _ in windows]
    monkeypatch.setattr(releases.vllm, "__version__", version)
    monkeypatch.setattr(
        events, "resolve_kv_cache_block_sizes", lambda *_: (hash_tokens, hash_tokens)
    )
    with caplog.at_level("WARNING", "kvstrata.vllm"):
        made = releases.tier_events(
            None,
            SimpleNamespace(kv_cache_groups=groups),
            cache,
            cache.block_layout(32),
            ConnectorStats(),
            Followed(),
        )
    assert (made is None) == bool(said)
    assert said in caplog.text
