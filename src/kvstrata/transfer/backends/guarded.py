"""The fence around a mover of files that is not our own threads: NIXL, or one of another package.

What the executor may rely on holds whatever the backend inside does:

* It is given whole pages between page-aligned memory and one file, under a descriptor of the
  fence's own that goes past the page cache where there is one. Everything else, index lines above
  all, goes through our threads; a stripe is cut into its files.
* An op outside its regions never reaches it. A completion that names no transfer under way, or
  that is none, is counted and ignored; one that does not say what failed fails everything.
* A transfer that it refuses waits and is offered again; if it refuses while it has nothing to do,
  the transfer fails.
* While it has work and nothing has ended for `stall_s`, and for good once one of its methods
  raised, new transfers fail at once. What it has stays under way: bytes may still arrive, so that
  memory is given back only when it says that it ended.
* `close` waits `close_timeout_s` for it. What has not ended then is told as cancelled, and its
  memory and descriptors are kept until the process ends.

Concurrency: the owner's thread only. The backend inside has threads of its own and calls `notify`
from them; its `close` runs on a thread `kvstrata-close`, so that it can be left behind.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from kvstrata.core.ids import TransferId
from kvstrata.core.plugins import said
from kvstrata.storage.base import PAGE_BYTES, FileRegion, Health, MemoryRegion, Piece, StripedRegion
from kvstrata.transfer.base import Completion, CopyOp, Outcome, TransferBackend

__all__ = ["FILE_PAIRS", "GuardedBackend"]

log = logging.getLogger("kvstrata.transfer")

FILE_PAIRS: Final = frozenset({("file", "memory"), ("memory", "file")})
"""What a mover of the daemon serves."""

_TEXT_MAX: Final = 300
_kept: list[object] = []  # what a backend that did not end may still touch, until the process ends


@dataclass(slots=True)
class _Whole:
    """A transfer of the executor."""

    transfer: TransferId
    ops: int
    parts: int = 0  # not ended
    failed: set[int] = field(default_factory=set)
    reason: str = ""
    cancelled: bool = False


@dataclass(slots=True)
class _Part:
    """What one backend is given of it: ops between memory and one file."""

    name: TransferId
    whole: _Whole
    region: FileRegion  # as the store knows it; its health is ours to note
    inside: bool  # whether it is for the backend in the fence, not for our threads
    write: bool
    memory: MemoryRegion
    ops: list[CopyOp] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)  # of its ops in the whole


class GuardedBackend:
    """A `TransferBackend` between memory and files, over one that may do anything."""

    def __init__(
        self,
        inner: TransferBackend,
        ours: TransferBackend,
        *,
        name: str,
        queue_transfers_max: int = 1024,
        stall_s: float = 10.0,
        close_timeout_s: float = 5.0,
        page_bytes: int = PAGE_BYTES,
    ) -> None:
        """Own `inner`, called `name` for people, and `ours`, which moves what is not whole pages.

        `page_bytes` is what `inner` gets multiples of.
        """
        self._inner, self._ours, self.name = inner, ours, name
        self._queue_max = queue_transfers_max
        self._stall_s, self._close_timeout_s = stall_s, close_timeout_s
        self._page_bytes = page_bytes
        self._names = itertools.count(1)
        self._wholes: dict[TransferId, _Whole] = {}
        self._parts: dict[TransferId, _Part] = {}  # given to a backend and not ended
        self._waiting: deque[_Part] = deque()  # refused, to be offered again
        self._ready: list[Completion] = []
        self._files: dict[Health, FileRegion] = {}  # each open file under a descriptor of our own
        self._working = 0  # parts that `inner` has
        self._progress = time.monotonic()  # when one of them ended, or the first was given
        self._broken = ""
        self._closed = False
        self._counts = {"failed_transfers": 0, "refused_transfers": 0, "odd_completions": 0}

    def submit(self, transfer: TransferId, ops: Sequence[CopyOp], source: Any, target: Any) -> bool:
        """Accept the transfer, or return False because as many as allowed are under way."""
        if self._closed or len(self._wholes) >= self._queue_max:
            return False
        assert transfer not in self._wholes, f"{transfer=} is already under way"
        whole = _Whole(transfer, len(ops))
        self._wholes[transfer] = whole
        parts = self._cut(whole, ops, source, target)
        whole.parts = len(parts)
        for part in parts:
            self._offer(part)
        if not parts:
            self._finish(whole)
        return True

    def poll(self) -> list[Completion]:
        """Return the completions since the last poll."""
        if not self._closed:  # `close` took the rest
            self._take(self._ours, inside=False)
            self._take(self._inner, inside=True)
        for _ in range(len(self._waiting)):
            part = self._waiting.popleft()
            self._offer(part)
            if self._waiting and self._waiting[-1] is part:
                break  # it is full; the next poll begins behind this one
        ready, self._ready = self._ready, []
        return ready

    def cancel(self, transfer: TransferId) -> None:
        """End what waits; ask for an early end of what is under way."""
        whole = self._wholes.get(transfer)
        if whole is None:
            return
        for part in [part for part in self._waiting if part.whole is whole]:
            self._waiting.remove(part)
            self._end(part, part.indices, "cancelled", cancelled=True)
        for part in [part for part in self._parts.values() if part.whole is whole]:
            if part.inside:
                self._ask(partial(self._inner.cancel, part.name))
            else:
                self._ours.cancel(part.name)

    def capabilities(self) -> frozenset[tuple[str, str]]:
        """Between memory and files, whatever else the backend inside can."""
        return FILE_PAIRS

    def statistics(self) -> dict[str, Any]:
        """Return what it did that no backend should, and whether it is still given work."""
        return {**self._counts, "in_flight": self._working, "left_alone": self._left_alone()}

    def close(self) -> None:
        """Cancel what waits, give both backends a bounded time to end; twice is harmless."""
        if self._closed:
            return
        self._closed = True
        while self._waiting:
            part = self._waiting.popleft()
            self._end(part, part.indices, "cancelled", cancelled=True)
        self._ours.close()
        ended = self._close_inner()
        self._take(self._ours, inside=False)
        if ended:  # else it may hold a lock of its own, for which its `poll` would wait
            self._take(self._inner, inside=True)
        if ended and not self._parts:
            for file in self._files.values():
                os.close(file.descriptor)
            self._files.clear()
            return
        log.warning(
            "backend %s did not end: memory and files of %d transfers are kept",
            self.name,
            len(self._parts),
        )
        views = [memoryview(part.memory.view) for part in self._parts.values()]
        _kept.append((self._inner, self._files, views))
        reason = f"backend {self.name} was closed in mid-transfer; its memory is kept"
        for part in list(self._parts.values()):
            self._end(part, part.indices, reason, cancelled=True)

    # -- cutting ---------------------------------------------------------------------------------

    def _cut(self, whole: _Whole, ops: Sequence[CopyOp], source: Any, target: Any) -> list[_Part]:
        """Return the parts of a transfer; ops that are outside their regions have failed."""
        file, memory, write = source, target, False
        if isinstance(source, MemoryRegion):
            file, memory, write = target, source, True
        if not isinstance(memory, MemoryRegion) or not isinstance(file, FileRegion | StripedRegion):
            whole.failed.update(range(len(ops)))
            whole.reason = f"{self.name} moves between memory and a file only"
            return []
        parts: dict[tuple[int, bool], _Part] = {}
        for index, op in enumerate(ops):
            place, start = op.target_offset, op.source_offset
            if write:
                place, start = start, place
            why = _outside(place, start, op.length, len(memory.view))
            pieces = [] if why else file.pieces(start, op.length)
            if not pieces:
                whole.failed.add(index)
                whole.reason = whole.reason or why or f"{op} is outside its region"
            for piece in pieces:
                inside = self._is_whole(piece, place, memory)
                at = (piece.region.descriptor, inside)
                if at not in parts:
                    name = TransferId(next(self._names))
                    parts[at] = _Part(name, whole, piece.region, inside, write, memory)
                ends = (place, piece.offset) if write else (piece.offset, place)
                parts[at].ops.append(CopyOp(*ends, piece.length, len(parts[at].ops)))
                parts[at].indices.append(index)
                place += piece.length
        return list(parts.values())

    def _is_whole(self, piece: Piece, place: int, memory: MemoryRegion) -> bool:
        """Whether a piece may move past the page cache, and so by the backend inside."""
        aligned = memory.page_aligned or self._page_bytes == 1
        return aligned and not (place | piece.offset | piece.length) % self._page_bytes

    def _file(self, region: FileRegion) -> FileRegion:
        """Return the file under a descriptor of our own: the store's number may be given away."""
        if region.health not in self._files:
            direct = region.direct >= 0
            own = os.dup(region.direct if direct else region.descriptor)
            self._files[region.health] = FileRegion(own, own if direct else -1)
        return self._files[region.health]

    # -- the backends ----------------------------------------------------------------------------

    def _offer(self, part: _Part) -> None:
        """Give a part to its backend, keep it for later, or fail it."""
        health = part.region.health
        if not part.inside:
            ends = (part.memory, part.region) if part.write else (part.region, part.memory)
            self._parts[part.name] = part
            if not self._ours.submit(part.name, part.ops, *ends):
                del self._parts[part.name]
                self._waiting.append(part)
            return
        why = self._left_alone() or (f"left alone after {health.reason}" if health.failed else "")
        if why:
            self._end(part, part.indices, why)
            return
        try:
            file = self._file(part.region)
        except OSError as error:
            self._end(part, part.indices, str(error))
            return
        ends = (part.memory, file) if part.write else (file, part.memory)
        self._parts[part.name] = part
        if not self._working:
            self._progress = time.monotonic()
        self._working += 1
        accepted = self._ask(lambda: self._inner.submit(part.name, part.ops, *ends))
        if accepted or self._broken:  # who raised may have begun: it is under way
            return
        del self._parts[part.name]
        self._working -= 1
        self._counts["refused_transfers"] += 1
        if self._working:
            self._waiting.append(part)
        else:
            self._end(part, part.indices, f"backend {self.name} accepts no transfer")

    def _ask(self, call: Callable[[], Any]) -> Any:
        """Call the backend inside; what it raises is the end of giving it work."""
        try:
            return call()
        except Exception as error:
            if not self._broken:
                log.exception("backend %s failed and is left alone", self.name)
            self._broken = f"backend {self.name} failed: {said(error)}"
            return None

    def _left_alone(self) -> str:
        if self._broken or not self._working:
            return self._broken
        quiet_s = time.monotonic() - self._progress
        stalled = quiet_s > self._stall_s
        return f"backend {self.name} ended nothing for {quiet_s:.0f} s" if stalled else ""

    def _take(self, backend: TransferBackend, *, inside: bool) -> None:
        """Take what ended; nothing of it is believed that no transfer of ours explains."""
        found = self._ask(lambda: list(backend.poll())) or [] if inside else backend.poll()
        for completion in found:
            name = completion.transfer if isinstance(completion, Completion) else None
            part = self._parts.get(name) if isinstance(name, int) else None
            if part is None or part.inside != inside:
                self._counts["odd_completions"] += 1
                continue
            del self._parts[part.name]
            failed = _failed(completion, len(part.ops))
            reason = _words(completion)
            cancelled = completion.outcome is Outcome.CANCELLED
            if inside:
                self._working -= 1
                self._progress = time.monotonic()
                self._note(part, bool(failed), reason, cancelled=cancelled)
            self._end(part, [part.indices[op] for op in failed], reason, cancelled=cancelled)

    def _note(self, part: _Part, failed: bool, reason: str, *, cancelled: bool) -> None:  # noqa: FBT001
        """Tell the file's health, which our own threads tell themselves."""
        health = part.region.health
        if failed and not cancelled:
            self._counts["failed_transfers"] += 1
            health.failed_to(OSError(errno.EIO, f"backend {self.name}: {reason}"), write=part.write)
        elif not failed:
            health.succeeded(write=part.write)

    def _close_inner(self) -> bool:
        closer = threading.Thread(
            target=lambda: self._ask(self._inner.close), name="kvstrata-close", daemon=True
        )
        closer.start()
        closer.join(self._close_timeout_s)
        return not closer.is_alive()

    # -- ends ------------------------------------------------------------------------------------

    def _end(
        self, part: _Part, failed: Sequence[int], reason: str, *, cancelled: bool = False
    ) -> None:
        self._parts.pop(part.name, None)
        whole = part.whole
        whole.parts -= 1
        whole.failed.update(failed)
        whole.cancelled |= cancelled
        if failed:
            whole.reason = whole.reason or reason
        if not whole.parts:
            self._finish(whole)

    def _finish(self, whole: _Whole) -> None:
        del self._wholes[whole.transfer]
        failed, outcome = tuple(sorted(whole.failed)), Outcome.DONE
        if whole.cancelled:
            failed, outcome = tuple(range(whole.ops)), Outcome.CANCELLED
        elif failed:
            outcome = Outcome.FAILED
        self._ready.append(Completion(whole.transfer, outcome, failed, whole.reason))


def _outside(place: int, start: int, length: int, memory_bytes: int) -> str:
    """Say why a move is outside its regions; a file has no end that we know."""
    if length < 0 or start < 0:
        return f"a file has no {length} bytes at {start}"
    if not 0 <= place <= memory_bytes - length:
        return f"bytes {place} to {place + length} are outside a region of {memory_bytes}"
    return ""


def _failed(completion: Completion, ops: int) -> list[int]:
    """Return which ops failed: all of them where the completion does not make sense."""
    every = list(range(ops))
    try:
        named = [every[op] for op in completion.failed_ops if op >= 0]
        makes_sense = len(named) == len(completion.failed_ops)
    except (TypeError, IndexError):
        return every
    if completion.outcome is Outcome.DONE and makes_sense:
        return named
    return named if completion.outcome is Outcome.FAILED and makes_sense and named else every


def _words(completion: Completion) -> str:
    """Return why it failed, whatever a backend put there."""
    return str(completion.reason)[:_TEXT_MAX] or "it did not say why"
