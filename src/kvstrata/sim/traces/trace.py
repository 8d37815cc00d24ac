"""A trace as a thing that can be read again and again, whatever its format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvstrata.core.config import BLOCK_TOKENS_DEFAULT
from kvstrata.sim.traces.events import events_block_tokens, read_events
from kvstrata.sim.traces.hashed import (
    BAILIAN_BLOCK_TOKENS,
    MOONCAKE_BLOCK_TOKENS,
    read_bailian,
    read_mooncake,
)
from kvstrata.sim.traces.lines import Progress, first_record
from kvstrata.sim.traces.model import TraceError, TraceInfo, TraceRequest
from kvstrata.sim.traces.plain import read_recording, read_tokens, recording_block_tokens
from kvstrata.sim.traces.sessions import read_sessions, session_block_tokens, session_files

__all__ = ["FORMATS", "Trace", "open_trace"]

FORMATS: Final = {
    "mooncake": "JSONL of the Mooncake authors: hash_ids of 512 tokens, timestamp in ms",
    "bailian": "JSONL of Alibaba Bailian: chat_id, hash_ids of 16 tokens, timestamp in s",
    "sessions": "session files of kv-cache-tester, or a directory of them: hash_ids of 64 tokens",
    "vllm-events": "JSONL of vLLM's KV event batches, [ts, [{type: BlockStored, ...}]]",
    "tokens": "JSONL with the token ids of each prompt, timestamp in s",
    "kvstrata": "recording by kvstrata itself",
}
"""Every format by name."""


class Trace:
    """Iterating reads the file from its start, one request at a time."""

    def __init__(self, path: Path, info: TraceInfo) -> None:
        self.path, self.info = path, info

    @property
    def size_bytes(self) -> int:
        """Length of the file: what `progress` adds up to."""
        return sum(file.stat().st_size for file in session_files(self.path))

    def read(self, progress: Progress | None = None) -> Iterator[TraceRequest]:
        """Yield the requests; `progress` is told of bytes as they are read.

        Raises TraceError at the first line that is wrong.
        """
        match self.info.format:
            case "mooncake":
                return read_mooncake(self.path, progress)
            case "bailian":
                return read_bailian(self.path, progress)
            case "sessions":
                return read_sessions(self.path, progress)
            case "vllm-events":
                return read_events(self.path, progress)
            case "tokens":
                return read_tokens(self.path, self.info.block_tokens, progress)
            case _:
                return read_recording(self.path, progress)

    def __iter__(self) -> Iterator[TraceRequest]:
        return self.read()


def open_trace(path: Path, name: str | None = None, block_tokens: int | None = None) -> Trace:
    """Return the trace at `path`; its format is told by its first line unless it is named.

    A directory, and a file whose name ends in .json, are session files.

    `block_tokens` is for token traces, whose blocks are made here. Raises TraceError.
    """
    found = name or _guess(path)
    if found not in FORMATS:
        raise TraceError(
            f"format: unknown format {found!r}", hint=f"known formats: {', '.join(FORMATS)}"
        )
    sizes = {"mooncake": MOONCAKE_BLOCK_TOKENS, "bailian": BAILIAN_BLOCK_TOKENS}
    if found == "kvstrata":
        sizes[found] = recording_block_tokens(path)
    elif found == "vllm-events":
        sizes[found] = events_block_tokens(path)
    elif found == "sessions":
        sizes[found] = session_block_tokens(path)
    if found in sizes and block_tokens not in {None, sizes[found]}:
        raise TraceError(
            f"block_tokens: blocks of this trace are {sizes[found]} tokens, not {block_tokens}",
            hint="leave block_tokens out; only token traces can be cut anew",
        )
    return Trace(path, TraceInfo(found, sizes.get(found, block_tokens or BLOCK_TOKENS_DEFAULT)))


def _guess(path: Path) -> str:
    if path.is_dir() or path.suffix == ".json":
        return "sessions"
    fields = first_record(path)
    if isinstance(fields, list):
        return "vllm-events"
    if "kvstrata_trace" in fields:
        return "kvstrata"
    if "tokens" in fields:
        return "tokens"
    if "hash_ids" in fields:
        return "bailian" if "chat_id" in fields else "mooncake"
    raise TraceError(
        f"{path.name}, line 1: no known trace has these fields",
        hint=f"name the format if it is one of {', '.join(FORMATS)}",
    )
