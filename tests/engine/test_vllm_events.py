"""A recording made with vLLM's own event classes can be replayed."""

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
