"""vLLM's events: its own tell of blocks that we load, and a recording of them can be replayed."""

from __future__ import annotations

import pytest

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
    """Of our tiers it tells nothing: who routes by events sees what an engine has, as before."""
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
    stored = [event for event in told if isinstance(event, BlockStored)]
    assert [token for event in stored for token in event.token_ids] == prompts[1]
    assert {event.medium for event in stored} == {"GPU"}
