"""A mover of files as another package would write it, from the page of the seam alone.

It knows one file and one memory, no stripes, no seals, no page cache: what the daemon needs beside
that is the fence's (`transfer/backends/guarded.py`). Tests plug it in by entry point.
"""

from __future__ import annotations

import os
from typing import Any

from kvstrata.core.errors import TransferError
from kvstrata.storage.base import FileRegion, MemoryRegion
from kvstrata.transfer.backends.threaded import ThreadedBackend
from kvstrata.transfer.base import CopyOp

__all__ = ["PlainMover"]


class PlainMover(ThreadedBackend):
    """Memory to file and file to memory, by the file's one descriptor."""

    name = "plain"

    def move(self, op: CopyOp, source: Any, target: Any) -> None:
        """Move one op; what a call leaves over is moved by the next one."""
        write = isinstance(source, MemoryRegion)
        memory, file = (source, target) if write else (target, source)
        assert isinstance(file, FileRegion), "the pairs that it declares have one file"
        place, start = op.target_offset, op.source_offset
        if write:
            place, start = start, place
        if start < 0 or not 0 <= place <= len(memory.view) - op.length:
            raise TransferError(f"{op} is outside its regions", retryable=False)
        call = os.pwritev if write else os.preadv
        done = 0
        while done < op.length:
            part = memory.view[place + done : place + op.length]
            moved = call(file.descriptor, [part], start + done)
            if not moved:
                raise TransferError(f"the file ends at {start + done}", retryable=False)
            done += moved

    def capabilities(self) -> frozenset[tuple[str, str]]:
        """Between memory and files; seals are computed by the daemon's own threads then."""
        return frozenset({("file", "memory"), ("memory", "file")})
