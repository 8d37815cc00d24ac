"""Session files of kv-cache-tester: coding agents' conversations, one JSON object a file.

Format: github.com/callanjfox/kv-cache-tester, docs/trace_replay_tester.md. A file has `block_size`
(64 tokens) and `requests`, each with `t` in seconds from the conversation's start, `in`, `out` and
one id for each full block of the prompt. Ids mean something within one file only, unless
`hash_id_scope` is "global"; an entry of type "subagent" holds `requests` of its own, which share
the file's ids.

The files have no start times. Conversation n of a directory, by name, starts n times
`SESSION_GAP_S` after the first; its own pace is kept. Files are read when their conversations
start and dropped when they end, so a directory of any size streams.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from kvstrata.core.ids import HASH_BYTES, SequenceHash
from kvstrata.sim.traces.lines import Progress
from kvstrata.sim.traces.model import TraceError, TraceRequest

__all__ = ["SESSION_GAP_S", "read_sessions", "session_block_tokens", "session_files"]

SESSION_GAP_S: Final = 60.0
"""Seconds between the starts of two conversations of a directory."""

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Id = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Time = Annotated[float, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct, frozen=True):
    t: _Time
    type: str = ""
    tokens_in: _Count = msgspec.field(default=0, name="in")
    tokens_out: _Count = msgspec.field(default=0, name="out")
    hash_ids: list[_Id] = msgspec.field(default_factory=list)
    requests: list[_Entry] = msgspec.field(default_factory=list)


class _Session(msgspec.Struct, frozen=True):
    id: str
    block_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    requests: list[_Entry]
    hash_id_scope: Literal["local", "global"] = "local"


def session_files(path: Path) -> list[Path]:
    """Return the session files of a directory by name, or the one file."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.json"))
    if not files:
        raise TraceError(
            f"trace: there is no .json file in {str(path)!r}",
            hint="name the directory that holds the session files themselves",
        )
    return files


def session_block_tokens(path: Path) -> int:
    """Return the block size that the first session file names; raises TraceError."""
    return _load(session_files(path)[0]).block_size


def read_sessions(path: Path, progress: Progress | None = None) -> Iterator[TraceRequest]:
    """Yield the requests of all conversations by arrival; raises TraceError at a bad file."""
    files = session_files(path)
    block_tokens = session_block_tokens(path)
    active: list[tuple[float, int, TraceRequest, Iterator[TraceRequest]]] = []
    for number, file in enumerate(files):
        start = number * SESSION_GAP_S
        yield from _until(active, start)
        requests = _requests(file, start, block_tokens)
        if progress:
            progress(file.stat().st_size)
        first = next(requests, None)
        if first:
            heapq.heappush(active, (first.arrival_s, number, first, requests))
    yield from _until(active, float("inf"))


def _until(
    active: list[tuple[float, int, TraceRequest, Iterator[TraceRequest]]], end: float
) -> Iterator[TraceRequest]:
    """Yield what arrives before `end`, earliest first; of equals the earlier file's."""
    while active and active[0][0] < end:
        _, number, request, later = active[0]
        yield request
        following = next(later, None)
        if following:
            heapq.heapreplace(active, (following.arrival_s, number, following, later))
        else:
            heapq.heappop(active)


def _requests(file: Path, start: float, block_tokens: int) -> Iterator[TraceRequest]:
    session = _load(file)
    if session.block_size != block_tokens:
        raise TraceError(
            f"{file.name}: block_size is {session.block_size}, of the files before {block_tokens}",
            hint="replay files of one block size together",
        )
    scope = "" if session.hash_id_scope == "global" else session.id
    mark = hashlib.blake2b(scope.encode(), digest_size=HASH_BYTES - 8).digest()
    entries = [*_flat(file, session.requests, "requests")]
    for where, entry in sorted(entries, key=lambda each: each[1].t):
        if len(entry.hash_ids) not in {
            entry.tokens_in // block_tokens, -(-entry.tokens_in // block_tokens)
        }:  # fmt: skip
            raise TraceError(
                f"{file.name}, {where}: hash_ids has {len(entry.hash_ids)} ids, but in is "
                f"{entry.tokens_in} tokens, {entry.tokens_in // block_tokens} full blocks",
                hint="check block_size, or drop the request",
            )
        yield TraceRequest(
            start + entry.t,
            [SequenceHash(mark + each.to_bytes(8, "big")) for each in entry.hash_ids],
            entry.tokens_in,
            entry.tokens_out,
            session.id,
        )


def _flat(file: Path, entries: list[_Entry], where: str) -> Iterator[tuple[str, _Entry]]:
    for number, entry in enumerate(entries):
        here = f"{where}[{number}]"
        if entry.type == "subagent":
            yield from _flat(file, entry.requests, f"{here}.requests")
        else:
            yield here, entry


def _load(file: Path) -> _Session:
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Session)
    except OSError as error:
        raise TraceError(
            f"trace: cannot read {str(file)!r} ({error.strerror})", hint="name a readable file"
        ) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TraceError(
            f"{file.name}: {error}", hint="it is no whole session file; fetch it again or drop it"
        ) from error
