"""vLLM's events: its own tell of blocks that we load, and a recording of them can be replayed."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager

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


@contextmanager
def subscribed(address):
    """A router's end of vLLM's publisher: `received()` returns what has come."""
    import msgspec
    import zmq
    from vllm.distributed.kv_events import KVEventBatch

    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.linger = 0
        subscriber.connect(address)
        subscriber.subscribe("")
        time.sleep(0.3)  # until the publisher knows of it

        def received():
            told = []
            while subscriber.poll(300):
                data = subscriber.recv_multipart()[-1]
                told += msgspec.msgpack.decode(data, type=KVEventBatch).events
            return told

        yield received


def test_an_outside_subscriber_sees_what_the_tiers_hold(engine_on, prompts, reference, tmp_path):
    """Over vLLM's own ZeroMQ publisher, as a router would."""
    from vllm.config import KVEventsConfig

    address = f"ipc://{tmp_path}/events.sock"
    published = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=address)
    tiers = f"host:512KiB,disk:{tmp_path / 'kv'}:64MiB"  # the host has room for 4 blocks
    held = {"kvstrata.host": set(), "kvstrata.disk": set()}
    with (
        engine_on({"tiers": tiers}, kv_events_config=published) as engine,
        subscribed(address) as received,
    ):

        def ask(index):
            """Return the events up to a later step, after everything is on disk."""
            (answer,) = engine.ask(prompts[index : index + 1])
            assert answer.tokens == reference[index]
            engine.wait_idle()
            engine.forget()
            time.sleep(0.15)  # the daemon is asked again
            engine.ask([[7] * 5], max_tokens=2)
            told = received()
            for each in told:
                if getattr(each, "ownership", None):
                    change = "update" if hasattr(each, "token_ids") else "difference_update"
                    getattr(held[each.ownership], change)(each.block_hashes)
            with AdminClient(engine.connector.daemon_address) as admin:
                tiers = admin.stats()["node"]["tiers"]
            for tier in ("host", "disk"):  # two pages to a block
                kept = tiers[tier]["total"] - tiers[tier]["free"]
                assert len(held[f"kvstrata.{tier}"]) == 2 * kept, "what a router believes is true"
            return told

        told = ask(1)  # 128 tokens: 4 pages, 2 blocks
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
        told = received()
        for medium in ("CPU", "STORAGE"):
            assert set(names(told, "BlockRemoved", medium)) == set(own), "nobody can follow it now"


class Followed:
    """A session's standing, and a record of changes as the daemon keeps it."""

    def __init__(self, limit):
        self.welcome, self.epoch, self.record = object(), 1, Changes(limit)

    def changes(self, cursor):
        got = self.record.since(cursor)
        rows = [(str(each.tier), each.stored, b"".join(each.keys)) for each in got.changes]
        return wire.Changed(got.cursor, got.lost, got.more, rows)


@pytest.fixture
def followed(monkeypatch):
    """`followed(known_max=..., limit=...)` gives events, what they count, their session, and the
    keys of a request's five blocks."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    from kvstrata.connectors.vllm import events
    from kvstrata.connectors.vllm.metrics import ConnectorStats

    monkeypatch.setattr(events, "_INTERVAL_S", 0.0)

    def make(known_max=100, limit=1000):
        session, stats = Followed(limit), ConnectorStats()
        told = events.TierEvents(16, 32, stats, known_max=known_max)
        told.take(session)
        request = Request("r", list(range(160)), SamplingParams(), None, cache_salt="salt")
        request.block_hashes = [bytes([page] * 32) for page in range(10)]
        keys = [SequenceHash(bytes([block] * HASH_BYTES)) for block in range(5)]
        told.know(request, keys, 0)
        return told, stats, session, keys

    return make


def test_a_block_is_told_in_vllms_words(followed):
    told, stats, session, keys = followed()
    session.record.note(HOST, keys[:2], stored=True)
    session.record.note(TierName("shared"), keys[:1], stored=True)
    session.record.note(HOST, [SequenceHash(b"?" * HASH_BYTES)], stored=True)
    first, second, shared = told.take(session)
    assert first.extra_keys == [("salt",), None]
    assert second.extra_keys in (None, [None, None])
    assert second.parent_block_hash == first.block_hashes[1]
    assert second.token_ids == list(range(32, 64))
    assert (shared.medium, shared.locality, shared.ownership) == (
        "STORAGE", "REMOTE", "kvstrata.shared",
    )  # fmt: skip
    assert stats.data == {"untold_blocks": 1}, "another engine's"
    assert told.take(session) == []


@pytest.mark.parametrize("how", ["missed", "another daemon", "no daemon", "new weights"])
def test_what_cannot_be_followed_is_told_as_removed(followed, how):
    told, stats, session, keys = followed(limit=8)
    session.record.note(HOST, keys[:2], stored=True)
    assert len(told.take(session)) == 2
    if how == "missed":
        session.record.note(HOST, keys * 2, stored=False)
        session.record.note(HOST, keys * 2, stored=True)
    elif how == "another daemon":
        session.epoch = 2
    elif how == "no daemon":
        session.welcome = None
    else:
        told.forget()
    (event,) = told.take(session)
    assert type(event).__name__ == "BlockRemoved"
    assert len(event.block_hashes) == 4
    assert stats.data.get("missed_changes", 0) == (how == "missed")
    assert told.take(session) == []
    session.welcome = object()
    told.take(session)
    session.record.note(HOST, keys[:1], stored=True)
    assert len(told.take(session)) == 1, "it goes on"


def test_no_more_is_remembered_than_there_is_room_for(followed):
    told, stats, session, keys = followed(known_max=2)
    session.record.note(HOST, keys, stored=True)
    events = [type(each).__name__ for each in told.take(session)]
    assert events == ["BlockStored"] * 2, "the others were forgotten first"
    assert stats.data == {"untold_blocks": 3}
