"""Recordings of vLLM's KV events: one batch a line, as JSON.

A line is what `msgspec.json.encode` makes of an `EventBatch` that `--kv-events-config` publishes:
`[ts, [{"type": "BlockStored", "block_hashes": [...], "parent_block_hash": ..., "token_ids": [...],
"block_size": 16, ...}, ...]]`.

Such a recording says what the engine's own cache stored, not what was asked of it: a prompt that
the engine had whole leaves no trace, and one that was computed in pieces leaves one event a piece.
Each stored run of blocks is replayed as a request for it and everything before it, so the order of
policies and sizes can be trusted, the level of the hit rate cannot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from kvstrata.core.ids import HASH_BYTES, SequenceHash
from kvstrata.sim.traces.lines import Progress, records
from kvstrata.sim.traces.model import TraceError, TraceRequest

__all__ = ["events_block_tokens", "read_events"]

_Hash = int | str  # an integer, or bytes in base64, as the engine was told


class _Stored(msgspec.Struct, frozen=True, tag="BlockStored"):
    block_hashes: list[_Hash]
    parent_block_hash: _Hash | None
    token_ids: list[int]
    block_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    medium: str | None = None
    group_idx: int | None = None
    session_id: str | None = None


class _Removed(msgspec.Struct, frozen=True, tag="BlockRemoved"):
    block_hashes: list[_Hash]


class _Cleared(msgspec.Struct, frozen=True, tag="AllBlocksCleared"):
    pass


class _Batch(msgspec.Struct, frozen=True, array_like=True):
    ts: Annotated[float, msgspec.Meta(ge=0)]
    events: list[_Stored | _Removed | _Cleared]
    data_parallel_rank: int | None = None


def events_block_tokens(path: Path) -> int:
    """Return the block size of the first stored blocks; raises TraceError if there are none."""
    for event in _stored(path, None):
        return event[2].block_size
    raise TraceError(
        f"{path.name}: no blocks were stored", hint="record while requests are being served"
    )


def read_events(path: Path, progress: Progress | None = None) -> Iterator[TraceRequest]:
    """Yield a request for each stored run of blocks; raises TraceError at the first bad line."""
    block_tokens = events_block_tokens(path)
    before: dict[_Hash, _Hash | None] = {}
    first = last = None
    for number, ts, event in _stored(path, progress):
        where = f"{path.name}, line {number}"
        first = ts if first is None else first
        if last is not None and ts < last:
            raise TraceError(
                f"{where}: ts {ts:g} is before the previous line's {last:g}",
                hint="record one engine to a file; ranks have clocks of their own",
            )
        last = ts
        _check(where, event, block_tokens, before)
        parent = event.parent_block_hash
        for name in event.block_hashes:
            before[name] = parent
            parent = name
        chain = _chain(parent, before)
        yield TraceRequest(ts - first, chain, len(chain) * block_tokens, 0, event.session_id or "")


def _stored(path: Path, progress: Progress | None) -> Iterator[tuple[int, float, _Stored]]:
    """Yield (line number, time, event) of what the device's first group of layers stored."""
    for number, batch in records(path, _Batch, progress):
        for event in batch.events:
            if isinstance(event, _Stored) and event.medium in {None, "GPU"} and not event.group_idx:
                yield number, batch.ts, event


def _check(
    where: str, event: _Stored, block_tokens: int, before: dict[_Hash, _Hash | None]
) -> None:
    if event.block_size != block_tokens:
        raise TraceError(
            f"{where}: block_size is {event.block_size}, before {block_tokens}",
            hint="record engines of one block size together",
        )
    if len(event.token_ids) != block_tokens * len(event.block_hashes):
        raise TraceError(
            f"{where}: token_ids has {len(event.token_ids)} tokens for "
            f"{len(event.block_hashes)} blocks of {block_tokens}",
            hint="mend or drop the line",
        )
    if event.parent_block_hash is not None and event.parent_block_hash not in before:
        raise TraceError(
            f"{where}: parent_block_hash {event.parent_block_hash} was never stored",
            hint="record from the engine's start",
        )


def _chain(last: _Hash | None, before: dict[_Hash, _Hash | None]) -> list[SequenceHash]:
    chain: list[SequenceHash] = []
    while last is not None:
        digest = hashlib.blake2b(repr(last).encode(), digest_size=HASH_BYTES).digest()
        chain.append(SequenceHash(digest))
        last = before[last]
    chain.reverse()
    return chain
