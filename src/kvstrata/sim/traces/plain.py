"""Traces of our own: token ids for those who have prompts, and what `Recorder` writes.

tokens: one object a line, `{"timestamp": s, "tokens": [...], "output_tokens": n}` and, if known,
`"session"` and `"tenant"`. Only full blocks count. Tenants do not find each other's.

kvstrata: a first line `{"kvstrata_trace": 1, "block_tokens": n}`, then a line for each request with
the keys of its blocks in hexadecimal: no tokens, so that a recording can be shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import msgspec

from kvstrata.core.ids import HASH_BYTES, SequenceHash
from kvstrata.sim.traces.lines import Progress, first_record, records
from kvstrata.sim.traces.model import TraceError, TraceRequest
from kvstrata.tokens import lineage_digests, sequence_hashes
from kvstrata.tokens.namespace import ModelKey, salted_key

__all__ = [
    "RECORDING_VERSION",
    "Recorder",
    "TokensLine",
    "read_recording",
    "read_tokens",
    "recording_block_tokens",
]

RECORDING_VERSION = 1
"""Version of the recorder's format."""

_NO_MODEL = ModelKey(bytes(32))  # a trace has one

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_Time = Annotated[float, msgspec.Meta(ge=0)]


class TokensLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a token trace."""

    timestamp: _Time
    """Arrival in seconds."""
    tokens: list[_Token]
    """The prompt."""
    output_tokens: _Count = 0
    """Answer tokens."""
    session: str = ""
    """The conversation."""
    tenant: str = ""
    """Whose request it is."""


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kvstrata_trace: int
    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class _Recorded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    arrival_s: _Time
    blocks: str
    prompt_tokens: _Count
    output_tokens: _Count = 0
    session: str = ""
    tenant: str = ""


def read_tokens(
    path: Path, block_tokens: int, progress: Progress | None = None
) -> Iterator[TraceRequest]:
    """Yield the requests of a token trace; raises TraceError at the first bad line."""
    first = last = None
    for number, line in records(path, TokensLine, progress):
        first = line.timestamp if first is None else first
        if last is not None and line.timestamp < last:
            raise TraceError(
                f"{path.name}, line {number}: timestamp {line.timestamp:g} is before the previous "
                f"line's {last:g}",
                hint="sort the file by timestamp",
            )
        last = line.timestamp
        yield TraceRequest(
            line.timestamp - first,
            _hashed(line, block_tokens),
            len(line.tokens),
            line.output_tokens,
            line.session,
            line.tenant,
        )


def _hashed(line: TokensLine, block_tokens: int) -> list[SequenceHash]:
    digests = lineage_digests(line.tokens, block_tokens)
    if not line.tenant:
        return [SequenceHash(each[:HASH_BYTES]) for each in digests]
    return sequence_hashes(salted_key(_NO_MODEL, "", line.tenant), digests)


def recording_block_tokens(path: Path) -> int:
    """Return the block size that a recording names; raises TraceError for another version."""
    try:
        header = msgspec.convert(first_record(path), _Header)
    except msgspec.ValidationError as error:
        raise TraceError(
            f"{path.name}, line 1: {error}", hint="record it again with this version"
        ) from error
    if header.kvstrata_trace != RECORDING_VERSION:
        raise TraceError(
            f"{path.name}, line 1: kvstrata_trace is version {header.kvstrata_trace}, this is "
            f"{RECORDING_VERSION}",
            hint="record it again with this version",
        )
    return header.block_tokens


def read_recording(path: Path, progress: Progress | None = None) -> Iterator[TraceRequest]:
    """Yield the requests of a recording; raises TraceError at the first bad line."""
    recording_block_tokens(path)
    for number, line in records(path, _Recorded, progress, skip=1):
        yield TraceRequest(
            line.arrival_s,
            _keys(f"{path.name}, line {number}", line.blocks),
            line.prompt_tokens,
            line.output_tokens,
            line.session,
            line.tenant,
        )


class Recorder:
    """Writes requests to a file that `read_recording` gives back as they were."""

    def __init__(self, path: Path, block_tokens: int) -> None:
        """Make a new file; raises FileExistsError rather than write over one."""
        self._file = path.open("xb")
        self._encode = msgspec.json.Encoder().encode
        self._write(_Header(RECORDING_VERSION, block_tokens))

    def add(self, request: TraceRequest) -> None:
        """Append one request."""
        blocks = b"".join(request.blocks).hex()
        self._write(
            _Recorded(
                request.arrival_s,
                blocks,
                request.prompt_tokens,
                request.output_tokens,
                request.session,
                request.tenant,
            )
        )

    def close(self) -> None:
        """Finish the file; twice is harmless."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, line: msgspec.Struct) -> None:
        self._file.write(self._encode(line) + b"\n")


def _keys(where: str, text: str) -> list[SequenceHash]:
    try:
        data = bytes.fromhex(text)
    except ValueError as error:
        raise TraceError(
            f"{where}: blocks is not hexadecimal ({error})", hint="mend or drop the line"
        ) from error
    if len(data) % HASH_BYTES or len(text) != 2 * len(data):
        raise TraceError(
            f"{where}: blocks has {len(text)} digits, not a multiple of {2 * HASH_BYTES}",
            hint="the line looks cut off: fetch the file again",
        )
    return [SequenceHash(data[at : at + HASH_BYTES]) for at in range(0, len(data), HASH_BYTES)]
