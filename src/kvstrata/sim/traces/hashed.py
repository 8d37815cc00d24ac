"""Published traces that name each group of prompt tokens by a number.

mooncake: FAST'25 release of the Mooncake authors (github.com/kvcache-ai/Mooncake, FAST25-release):
one object a line, `timestamp` in ms, one id for every 512 tokens of the prompt, the last of them
for what is left.

bailian: Alibaba's anonymous Qwen traces (github.com/alibaba-edu/qwen-bailian-usagetraces-anon):
`timestamp` in seconds, `chat_id` and `parent_chat_id` (-1 at a conversation's start), one id for
every 16 tokens.

In both an id stands for its group and everything before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import msgspec

from kvstrata.core.ids import HASH_BYTES, SequenceHash
from kvstrata.sim.traces.lines import Progress, records
from kvstrata.sim.traces.model import TraceError, TraceRequest

__all__ = [
    "BAILIAN_BLOCK_TOKENS",
    "MOONCAKE_BLOCK_TOKENS",
    "BailianLine",
    "MooncakeLine",
    "read_bailian",
    "read_mooncake",
]

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens behind one id of the Mooncake traces."""
BAILIAN_BLOCK_TOKENS = 16
"""Tokens behind one id of the Bailian traces."""

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Id = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Time = Annotated[float, msgspec.Meta(ge=0)]


class MooncakeLine(msgspec.Struct, frozen=True):
    """One line of a Mooncake trace; other fields are not read."""

    timestamp: _Time
    """Arrival in milliseconds."""
    input_length: _Count
    """Prompt tokens."""
    output_length: _Count
    """Answer tokens."""
    hash_ids: list[_Id]
    """One id per 512 tokens of the prompt."""


class BailianLine(msgspec.Struct, frozen=True):
    """One line of a Bailian trace; other fields are not read."""

    chat_id: int
    """This request."""
    parent_chat_id: int
    """The request before it in its conversation, -1 for none."""
    timestamp: _Time
    """Arrival in seconds."""
    input_length: _Count
    """Prompt tokens."""
    output_length: _Count
    """Answer tokens."""
    hash_ids: list[_Id]
    """One id per 16 tokens of the prompt."""


def read_mooncake(path: Path, progress: Progress | None = None) -> Iterator[TraceRequest]:
    """Yield the requests of a Mooncake trace; raises TraceError at the first bad line."""
    first = last = None
    for number, line in records(path, MooncakeLine, progress):
        where = f"{path.name}, line {number}"
        first = line.timestamp if first is None else first
        _check_order(where, last, line.timestamp)
        _check_ids(where, line.hash_ids, line.input_length, MOONCAKE_BLOCK_TOKENS)
        last = line.timestamp
        yield TraceRequest(
            (line.timestamp - first) / 1000,
            [SequenceHash(each.to_bytes(HASH_BYTES, "big")) for each in line.hash_ids],
            line.input_length,
            line.output_length,
        )


def read_bailian(path: Path, progress: Progress | None = None) -> Iterator[TraceRequest]:
    """Yield the requests of a Bailian trace; raises TraceError at the first bad line."""
    first = last = None
    session_of: dict[int, str] = {}
    for number, line in records(path, BailianLine, progress):
        where = f"{path.name}, line {number}"
        first = line.timestamp if first is None else first
        _check_order(where, last, line.timestamp)
        _check_ids(where, line.hash_ids, line.input_length, BAILIAN_BLOCK_TOKENS)
        last = line.timestamp
        session_of[line.chat_id] = _session(where, line, session_of)
        yield TraceRequest(
            line.timestamp - first,
            [SequenceHash(each.to_bytes(HASH_BYTES, "big")) for each in line.hash_ids],
            line.input_length,
            line.output_length,
            session_of[line.chat_id],
        )


def _session(where: str, line: BailianLine, session_of: dict[int, str]) -> str:
    if line.chat_id in session_of:
        raise TraceError(
            f"{where}: chat_id {line.chat_id} was used before", hint="mend or drop the line"
        )
    if line.parent_chat_id == -1:
        return str(line.chat_id)
    session = session_of.get(line.parent_chat_id)
    if session is None:
        raise TraceError(
            f"{where}: parent_chat_id {line.parent_chat_id} is no earlier chat_id",
            hint="a piece of a trace must hold its conversations from their starts (parent -1)",
        )
    return session


def _check_order(where: str, before: float | None, now: float) -> None:
    if before is not None and now < before:
        raise TraceError(
            f"{where}: timestamp {now:g} is before the previous line's {before:g}",
            hint="sort the file by timestamp",
        )


def _check_ids(where: str, ids: list[int], tokens: int, block_tokens: int) -> None:
    """Complain of ids that cannot stand for these tokens; the last part group may lack one."""
    if len(ids) not in {tokens // block_tokens, -(-tokens // block_tokens)}:
        raise TraceError(
            f"{where}: hash_ids has {len(ids)} ids, but input_length {tokens} is "
            f"{-(-tokens // block_tokens)} groups of {block_tokens} tokens",
            hint="check that this is the format that you named",
        )
    if len(ids) > 1 and any(one == other for one, other in pairwise(ids)):
        raise TraceError(
            f"{where}: hash_ids names the same id twice in a row",
            hint="an id stands for its whole prefix, so no prompt has one twice",
        )
