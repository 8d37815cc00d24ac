"""Moves blocks between memory and a keyed store, several at once, and verifies what arrives.

One end of a transfer is a `MemoryRegion`, the other a `KeyedEnd`. Op by op: a write makes header
and payload from a block in memory, a read fetches both, checks every field against what was asked
for, decodes, and compares the seal. A block that is damaged is fetched once more, since the damage
may have happened on the way; if it is damaged again, it is deleted, so that the next write heals
it. What was read into memory and not found good fails its op: the owner does not use the slot.

Concurrency: `threads` workers named `kvstrata-keyed-<n>` take single ops, so the blocks of one
transfer move side by side; at most `queue_transfers_max` transfers are under way. One lock guards
what is under way; completions go through a SimpleQueue that only the owner polls. A worker waits
for its store alone; one that hangs for ever, as a dead NFS mount does, holds the workers of this
backend, so give each store a backend of its own. `close` skips what has not begun and joins for
at most `close_timeout_s`; what hangs longer never completes, and its place is never free.
"""

from __future__ import annotations

import logging
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, NamedTuple

from kvstrata.core.errors import ChecksumError, ConfigError, TransferError
from kvstrata.core.ids import SequenceHash, TransferId
from kvstrata.storage.base import MemoryRegion
from kvstrata.storage.codecs import BlockFacts, CodecChain
from kvstrata.storage.envelope import (
    HEADER_BYTES,
    NO_TAG,
    PLAIN,
    Envelope,
    Refusal,
    decode_envelope,
    encode_envelope,
)
from kvstrata.storage.keyed import KeyedStore, PutAnswer
from kvstrata.storage.seal import seal
from kvstrata.transfer.base import Completion, Outcome

__all__ = [
    "KeyedAnswer",
    "KeyedBackend",
    "KeyedEnd",
    "KeyedErase",
    "KeyedOp",
    "KeyedProbe",
    "KeyedResult",
    "MoverStatistics",
]

log = logging.getLogger("kvstrata.transfer")

_KEPT: Final = frozenset({Refusal.NEWER, Refusal.OTHER_TENANT, Refusal.OTHER_CODEC})
"""Blocks that are whole, only not ours to read: somebody else's good copy is never deleted."""
_READS_MAX: Final = 2
_OPS_EACH: Final = 64  # of a transfer, on average, before no more are queued


@dataclass(frozen=True, slots=True)
class KeyedOp:
    """One block between memory and a keyed store."""

    key: SequenceHash
    """Its key."""
    offset: int
    """Where it is or goes, in bytes from the start of the memory region."""
    length: int
    """Its length in bytes, before encoding."""
    first: int = 0
    """Its index in the plan."""
    parent: SequenceHash | None = None
    """A write records it: the key of the block before it."""
    seal: bytes = b""
    """A write records it: the block's seal, computed by who knows it to be good; empty: now."""
    namespace: bytes = NO_TAG
    """Tag of its namespace; a read refuses a block of another one unless this is unknown."""
    tenant: bytes = NO_TAG
    """Tag of its tenant; the same."""

    @property
    def count(self) -> int:
        """How many blocks of the plan it covers."""
        return 1


@dataclass(frozen=True, slots=True)
class KeyedErase:
    """Blocks to be deleted from the store that is a transfer's target; its source is not used."""

    keys: tuple[SequenceHash, ...]
    """Their keys; together they are one request, or few."""
    first: int = 0
    """Index of the first one in the plan."""

    @property
    def count(self) -> int:
        """How many blocks of the plan it covers."""
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class KeyedProbe:
    """Blocks that the store at the transfer's source is asked for; its target is not used."""

    keys: tuple[SequenceHash, ...]
    """Their keys."""
    first: int = 0
    """Index of the first one in the plan."""

    @property
    def count(self) -> int:
        """How many blocks of the plan it covers."""
        return len(self.keys)


class KeyedResult(Enum):
    """What became of one op."""

    CREATED = "created"
    EXISTED = "existed"
    FULL = "full"
    LOADED = "loaded"
    ERASED = "erased"
    PROBED = "probed"
    MISSED = "missed"
    REFUSED = "refused"
    DAMAGED = "damaged"
    FAILED = "failed"


_GOOD: Final = frozenset(
    {
        KeyedResult.CREATED,
        KeyedResult.EXISTED,
        KeyedResult.LOADED,
        KeyedResult.ERASED,
        KeyedResult.PROBED,
    }
)


@dataclass(frozen=True, slots=True)
class KeyedAnswer:
    """What became of one op, and what the block's header said."""

    result: KeyedResult
    """What became of it."""
    envelope: Envelope | None = None
    """The header that was written or read; None if there was none to believe."""
    reason: str = ""
    """What went wrong, for people."""
    retryable: bool = False
    """Whether the same op may succeed later."""
    there: tuple[bool, ...] = ()
    """Of a probe, for each key whether it was there."""


@dataclass(frozen=True, slots=True)
class KeyedEnd:
    """A keyed store as one end of one transfer; the next transfer gets a fresh one."""

    store: KeyedStore
    """Where the blocks are."""
    chain: CodecChain
    """What they are written with, and what may be read."""
    fingerprint: bytes
    """Fingerprint of their layout."""
    answers: dict[int, KeyedAnswer] = field(default_factory=dict)
    """Op's place in its transfer -> its answer; filled before the completion is polled."""


@dataclass(frozen=True, slots=True)
class MoverStatistics:
    """Ops since the start, by what became of them; ops of cancelled transfers may be in none."""

    created: int = 0
    """Blocks written."""
    existed: int = 0
    """Blocks that were there already."""
    full: int = 0
    """Blocks not written for want of room."""
    loaded: int = 0
    """Blocks read and found good."""
    probed: int = 0
    """Ops that asked for blocks."""
    erased: int = 0
    """Ops that deleted blocks."""
    missed: int = 0
    """Blocks asked for and not there."""
    refused: int = 0
    """Blocks of a newer version, another tenant or another codec or key; left where they are."""
    damaged: int = 0
    """Blocks found damaged twice; deleted."""
    failed: int = 0
    """Ops that met an error."""
    read_again: int = 0
    """Blocks that were found damaged once and fetched again."""


class _Work:
    """One transfer under way; the backend's lock guards what changes."""

    __slots__ = ("begun", "cancelled", "failed", "left", "ops", "source", "target", "transfer")

    def __init__(
        self, transfer: TransferId, ops: Sequence[KeyedOp], source: Any, target: Any
    ) -> None:
        self.transfer, self.ops, self.source, self.target = transfer, ops, source, target
        self.left = len(ops)
        self.cancelled = False
        self.begun = 0
        self.failed: dict[int, str] = {}


class _Piece(NamedTuple):
    work: _Work
    place: int


class _Buffers(threading.local):
    """Each worker's own header, and room for a payload that is not plain."""

    def __init__(self) -> None:
        self.header = memoryview(bytearray(HEADER_BYTES))
        self.room = bytearray()

    def payload(self, length: int) -> memoryview:
        """Return at least `length` bytes."""
        if len(self.room) < length:
            self.room = bytearray(length)
        return memoryview(self.room)[:length]


class KeyedBackend:
    """A `TransferBackend` between memory and keyed stores."""

    name = "keyed"

    def __init__(
        self,
        *,
        threads: int = 16,
        queue_transfers_max: int = 1024,
        close_timeout_s: float = 30.0,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the workers: 8 to 64, as many as requests shall be under way at once."""
        self._notify = notify
        self._queue_transfers_max = queue_transfers_max
        self._close_timeout_s = close_timeout_s
        self._pieces: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self._under_way: dict[TransferId, _Work] = {}
        self._counts = dict.fromkeys(MoverStatistics.__slots__, 0)
        self._lock = threading.Lock()
        self._closed = False
        self._buffers = _Buffers()
        self._threads = [
            threading.Thread(target=self._run, name=f"kvstrata-{self.name}-{index}", daemon=True)
            for index in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, transfer: TransferId, ops: Sequence[Any], source: Any, target: Any) -> bool:
        """Queue `ops` (`KeyedOp`), or return False if the queue is full or we are closed."""
        work = _Work(transfer, tuple(ops), source, target)
        with self._lock:
            waiting = self._pieces.qsize()  # those of cancelled transfers included
            full = waiting >= _OPS_EACH * self._queue_transfers_max
            if self._closed or full or len(self._under_way) >= self._queue_transfers_max:
                return False
            assert transfer not in self._under_way, f"{transfer=} is already under way"
            self._under_way[transfer] = work
            for place in range(len(work.ops)):  # under the lock: never behind `close`'s last word
                self._pieces.put(_Piece(work, place))
        if not work.ops:
            self._complete(work)
        return True

    def poll(self) -> list[Completion]:
        """Return what completed since the last call."""
        completions = []
        while not self._done.empty():
            completions.append(self._done.get())
        return completions

    def cancel(self, transfer: TransferId) -> None:
        """Skip the ops of `transfer` that have not begun; if none has, it ends here and now.

        So what waits behind a store that hangs can be given up.
        """
        with self._lock:
            work = self._under_way.get(transfer)
            if work is None:
                return
            work.cancelled = True
            if work.begun:
                return
            work.failed = dict.fromkeys(range(len(work.ops)), "cancelled")
            work.left = 0
        self._complete(work)

    def capabilities(self) -> frozenset[tuple[str, str]]:
        """Memory to a keyed store and back."""
        return frozenset({("memory", "keyed"), ("keyed", "memory")})

    def statistics(self) -> MoverStatistics:
        """Return the counters."""
        with self._lock:
            return MoverStatistics(**self._counts)

    def close(self) -> None:
        """Cancel what waits, let what runs finish, stop the workers."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for work in self._under_way.values():
                work.cancelled = True
        for _ in self._threads:
            self._pieces.put(None)
        until_s = time.monotonic() + self._close_timeout_s
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))

    # -- workers -------------------------------------------------------------------------------

    def _run(self) -> None:
        # A signal taken by this thread would not wake the owner's poll, which has to act on it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        while (piece := self._pieces.get()) is not None:
            work = piece.work
            with self._lock:
                if not work.left:
                    continue  # it was cancelled before any of it had begun
                work.begun += 1
            reason = "cancelled" if work.cancelled else self._carry_out(piece)
            with self._lock:
                if reason:
                    work.failed[piece.place] = reason
                work.left -= 1
                last = work.left == 0
            if last:
                self._complete(work)

    def _complete(self, work: _Work) -> None:
        with self._lock:
            del self._under_way[work.transfer]
        failed = tuple(sorted(work.failed))
        reason = work.failed[failed[0]] if failed else ""
        outcome = Outcome.FAILED if failed else Outcome.DONE
        if work.cancelled and failed:
            outcome, reason, failed = Outcome.CANCELLED, "cancelled", tuple(range(len(work.ops)))
        self._done.put(Completion(work.transfer, outcome, failed, reason))
        self._notify()

    def _carry_out(self, piece: _Piece) -> str:
        """Do one op and note its answer; return why it failed, empty if it did not."""
        op, work = piece.work.ops[piece.place], piece.work
        try:
            answer = self._move(op, work.source, work.target)
        except (OSError, TransferError, ConfigError) as error:
            retryable = isinstance(error, TransferError) and error.retryable
            answer = KeyedAnswer(KeyedResult.FAILED, None, str(error), retryable)
        except Exception as error:  # a dead worker would never complete: say so and go on
            log.exception("%s backend failed unexpectedly", self.name)
            answer = KeyedAnswer(KeyedResult.FAILED, None, f"{type(error).__name__}: {error}")
        for each in (work.source, work.target):
            if isinstance(each, KeyedEnd):
                each.answers[piece.place] = answer
        self._count(answer.result.value)
        if answer.result in _GOOD:
            return ""
        return answer.reason or answer.result.value

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    # -- one block -----------------------------------------------------------------------------

    def _move(self, op: KeyedOp | KeyedErase | KeyedProbe, source: Any, target: Any) -> KeyedAnswer:
        if isinstance(op, KeyedProbe) and isinstance(source, KeyedEnd):
            return KeyedAnswer(KeyedResult.PROBED, there=tuple(source.store.exists(op.keys)))
        if isinstance(op, KeyedErase) and isinstance(target, KeyedEnd):
            target.store.delete(op.keys)
            return KeyedAnswer(KeyedResult.ERASED)
        assert isinstance(op, KeyedOp), f"{op=} has no store to erase from"
        if isinstance(source, MemoryRegion) and isinstance(target, KeyedEnd):
            return self._write(op, source, target)
        if isinstance(source, KeyedEnd) and isinstance(target, MemoryRegion):
            return self._read(op, source, target)
        raise TransferError("keyed moves between memory and a store only", retryable=False)

    def _write(self, op: KeyedOp, memory: MemoryRegion, end: KeyedEnd) -> KeyedAnswer:
        raw = _view(memory, op)
        if op.seal and seal(op.key + end.fingerprint, raw) != op.seal:
            raise TransferError(
                f"{op.key.hex()}: host block differs from its seal", retryable=False
            )
        facts = BlockFacts(op.key, end.fingerprint, op.namespace, op.tenant, op.length)
        payload = raw if end.chain.plain else memoryview(end.chain.encode(raw, facts))
        envelope = Envelope(
            key=op.key,
            parent=op.parent,
            fingerprint=end.fingerprint,
            raw_bytes=op.length,
            stored_bytes=len(payload),
            seal=self._seal_for_readers(op, raw, payload, end, facts),
            codec=end.chain.label(facts),
            namespace=op.namespace,
            tenant=op.tenant,
        )
        answer = end.store.put(op.key, encode_envelope(envelope), payload)
        if answer is PutAnswer.FULL:
            return KeyedAnswer(KeyedResult.FULL, None, "the store is full", retryable=True)
        return KeyedAnswer(KeyedResult(answer.value), envelope)

    def _seal_for_readers(
        self, op: KeyedOp, raw: memoryview, payload: memoryview, end: KeyedEnd, facts: BlockFacts
    ) -> bytes:
        """Return the seal of what a reader will get, which a lossy chain changes."""
        if not end.chain.lossy:
            return op.seal or seal(op.key + end.fingerprint, raw)
        back = memoryview(bytearray(op.length))
        refusal = end.chain.decode(end.chain.label(facts), payload, back, facts)
        if refusal is not None:
            raise TransferError(f"{op.key.hex()}: encoded, {refusal.value}", retryable=False)
        return seal(op.key + end.fingerprint, back)

    def _read(self, op: KeyedOp, end: KeyedEnd, memory: MemoryRegion) -> KeyedAnswer:
        target = _view(memory, op)
        for turn in range(1, _READS_MAX + 1):
            found = self._fetch(op, end, target)
            if found is None:
                return KeyedAnswer(KeyedResult.MISSED, None, f"{op.key.hex()}: not there")
            if isinstance(found, Envelope):
                return KeyedAnswer(KeyedResult.LOADED, found)
            reason = f"{op.key.hex()}: {found.value}"
            if found in _KEPT:
                return KeyedAnswer(KeyedResult.REFUSED, None, reason)
            if turn < _READS_MAX:
                self._count("read_again")
        end.store.delete([op.key])
        return KeyedAnswer(KeyedResult.DAMAGED, None, reason)

    def _fetch(self, op: KeyedOp, end: KeyedEnd, target: memoryview) -> Envelope | Refusal | None:
        """Bring one block into `target` and verify it; None is a miss."""
        direct = end.chain.plain  # straight into its slot: nearly all blocks are plain there
        room = target if direct else self._room(op, end)
        found, length = self._get(op, end, room)
        encoded = isinstance(found, Envelope) and found.codec != PLAIN
        if direct and (encoded or found is Refusal.UNFIT):  # an encoding may be longer
            room = self._room(op, end)
            found, length = self._get(op, end, room)
        if not isinstance(found, Envelope):
            return found
        if room is not target:
            facts = BlockFacts(op.key, end.fingerprint, found.namespace, found.tenant, op.length)
            refusal = end.chain.decode(found.codec, room[:length], target, facts)
            if refusal is not None:
                return refusal
        good = seal(op.key + end.fingerprint, target) == found.seal
        return found if good else Refusal.OTHER_BYTES

    def _room(self, op: KeyedOp, end: KeyedEnd) -> memoryview:
        return self._buffers.payload(end.chain.stored_bytes_max(op.length))

    def _get(
        self, op: KeyedOp, end: KeyedEnd, room: memoryview
    ) -> tuple[Envelope | Refusal | None, int]:
        """Return the header if it is the right one, and the payload's length in `room`."""
        header = self._buffers.header
        try:
            length = end.store.get(op.key, header, room)
        except ChecksumError:
            return Refusal.UNFIT, 0
        return (None, 0) if length is None else (_expected(op, end, header, length), length)


def _expected(op: KeyedOp, end: KeyedEnd, header: memoryview, length: int) -> Envelope | Refusal:
    """Return the header if it is the one of the block that was asked for, at this length."""
    envelope = decode_envelope(header)
    if isinstance(envelope, Refusal):
        return envelope
    if envelope.key != op.key:
        return Refusal.OTHER_KEY
    if envelope.fingerprint != end.fingerprint or envelope.raw_bytes != op.length:
        return Refusal.OTHER_LAYOUT
    for asked, found in ((op.namespace, envelope.namespace), (op.tenant, envelope.tenant)):
        if asked not in {NO_TAG, found}:
            return Refusal.OTHER_TENANT
    if length != envelope.stored_bytes:
        return Refusal.SHORT if length < envelope.stored_bytes else Refusal.LONG
    return envelope


def _view(memory: MemoryRegion, op: KeyedOp) -> memoryview:
    """Return the block's place; a slice past the end would be silently short."""
    if op.length < 1 or not 0 <= op.offset <= len(memory.view) - op.length:
        raise TransferError(
            f"bytes {op.offset} to {op.offset + op.length} are outside a region of "
            f"{len(memory.view)}",
            retryable=False,
        )
    return memory.view[op.offset : op.offset + op.length]
