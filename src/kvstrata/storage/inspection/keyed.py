"""One layout's blocks in a shared directory or an object store, as their own headers say.

Safe beside daemons that write, collect and delete: a block is there whole or not at all. One that
disappears between the listing and the look is gone, not bad.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from kvstrata.core.errors import ChecksumError, TransferError
from kvstrata.core.ids import SequenceHash
from kvstrata.storage.base import PAGE_BYTES, align
from kvstrata.storage.envelope import HEADER_BYTES, STORED_BYTES_MAX, Envelope, Refusal
from kvstrata.storage.inspection.payload import UNREAD, PayloadChecker
from kvstrata.storage.inspection.records import Checked, FoundBlock, Verdict, side_by_side
from kvstrata.storage.keyed import KeyedEntry, KeyedStore

__all__ = ["InspectedKeyed"]

_READS_MAX: Final = 2


class _Buffers(threading.local):
    """Each thread's own header and room for a payload, on whole pages."""

    def __init__(self) -> None:
        self.header = memoryview(bytearray(HEADER_BYTES))
        self.room = mmap.mmap(-1, PAGE_BYTES)

    def payload(self, length: int) -> memoryview:
        if len(self.room) < length:
            self.room = mmap.mmap(-1, align(length))
        return memoryview(self.room)


class InspectedKeyed:
    """A store that was opened for looking, and the layout that its marker names."""

    total: int | None = None

    def __init__(
        self,
        store: KeyedStore,
        kind: str,
        name: str,
        layout: tuple[bytes, str],
        place_of: Callable[[SequenceHash], str],
        secrets: Sequence[bytes],
        threads: int,
    ) -> None:
        """Look at `store`; `place_of` spells a block's name, `threads` look at once."""
        self.store = store
        self.kind = kind
        self.name = name
        self.fingerprint, self.description = layout
        self._place_of = place_of
        self._checker = PayloadChecker(*layout, secrets)
        self._threads = threads
        self._buffers = _Buffers()

    def blocks(self) -> Iterator[FoundBlock]:
        """Stream the listing, each with what its header says; one request or read each."""

        def look(entry: KeyedEntry) -> FoundBlock | None:
            header = self.store.peek(entry.key)
            return None if header is None else self._found(entry, header)

        found = side_by_side(look, self.store.entries(), self._threads)
        return (each for each in found if each is not None)

    def verify(self) -> Iterator[Checked]:
        """Stream the listing, each block read whole; a bad one is read twice, as a daemon does."""
        return side_by_side(self._check, self.store.entries(), self._threads)

    def quarantine(self, checked: Checked) -> None:
        """Delete the block, so that the next write of its key makes it anew."""
        assert checked.block.key is not None, "a name is made from a key"
        self.store.delete([checked.block.key])

    def notes(self) -> list[str]:
        """Say how many names are not ours."""
        foreign = self.store.statistics().foreign
        return [f"{foreign} names that are not kvstrata's, left alone"] if foreign else []

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def _check(self, entry: KeyedEntry) -> Checked:
        unknown = self._found(entry, b"")
        if entry.stored_bytes > STORED_BYTES_MAX + 2 * PAGE_BYTES:
            return Checked(unknown, Verdict.BAD, Refusal.LONG.value)
        header, room = self._buffers.header, self._buffers.payload(entry.stored_bytes)
        found, reason = unknown, ""
        for _ in range(_READS_MAX):
            try:
                length = self.store.get(entry.key, header, room)
            except ChecksumError:
                reason, room = Refusal.UNFIT.value, self._larger(entry.key, room)
                continue
            except TransferError as error:
                if self.kind != "directory" or self.store.statistics().vanished:
                    raise  # the whole store does not answer
                return Checked(unknown, Verdict.UNREADABLE, str(error))
            if length is None:
                return Checked(unknown, Verdict.GONE, "deleted meanwhile")
            found = self._found(entry, bytes(header))
            refusal = self._refusal(entry.key, header, room[:length])
            if refusal is None:
                return Checked(found, Verdict.GOOD)
            if refusal in UNREAD:
                return Checked(found, Verdict.UNCHECKABLE, refusal.value)
            reason = refusal.value
        return Checked(found, Verdict.BAD, reason)

    def _larger(self, key: SequenceHash, room: memoryview) -> memoryview:
        """Return room for what is there now: since it was listed it may have been stored anew."""
        envelope = self._checker.header(key, self.store.peek(key) or b"")
        if isinstance(envelope, Envelope) and envelope.stored_bytes > len(room):
            return self._buffers.payload(envelope.stored_bytes)
        return room

    def _refusal(
        self, key: SequenceHash, header: memoryview, payload: memoryview
    ) -> Refusal | None:
        envelope = self._checker.header(key, header)
        if isinstance(envelope, Refusal):
            return envelope
        return self._checker.refusal(envelope, payload)

    def _found(self, entry: KeyedEntry, header: bytes) -> FoundBlock:
        envelope = self._checker.header(entry.key, header)
        place, used_s = self._place_of(entry.key), entry.used_s
        if not isinstance(envelope, Envelope):
            return FoundBlock(
                key=entry.key,
                place=place,
                fingerprint=self.fingerprint,
                block_bytes=0,
                stored_bytes=entry.stored_bytes,
                codec="",
                used_s=used_s,
                fault=envelope.value,
            )
        return FoundBlock(
            key=entry.key,
            place=place,
            fingerprint=self.fingerprint,
            block_bytes=envelope.raw_bytes,
            stored_bytes=entry.stored_bytes,
            codec=envelope.codec,
            namespace=envelope.namespace,
            tenant=envelope.tenant,
            used_s=used_s,
        )
