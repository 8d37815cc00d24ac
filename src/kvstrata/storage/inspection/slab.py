"""A slab, or a stripe of several, as its superblocks and index lines say; no layout is needed.

Looking at the index is safe beside a daemon that writes: a line that is read while it is written
fails its CRC, and nothing is served from here. Reading payloads is not, since a slot may be given
on between its line and its bytes: `verify` and `reclaim` hold the lock that a daemon holds.
"""

from __future__ import annotations

import mmap
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstrata.core.errors import ConfigError, LayoutError
from kvstrata.core.ids import SlotId
from kvstrata.core.tenants import TAG_BYTES
from kvstrata.storage.base import PAGE_BYTES, StoredBlock
from kvstrata.storage.entry import BLANK_ENTRY, ENTRY_BYTES, decode_entries, decode_entry
from kvstrata.storage.envelope import PLAIN, Refusal
from kvstrata.storage.footing import length_of, lock, open_device, unreadable
from kvstrata.storage.inspection.records import Checked, FoundBlock, Verdict, side_by_side
from kvstrata.storage.seal import seal
from kvstrata.storage.superblock import (
    FLOOR_BYTES,
    FLOOR_OFFSET,
    Superblock,
    decode_floor,
    decode_superblock,
)

__all__ = ["InspectedSlab", "LineCounts"]

_LINES_EACH: Final = 8192
_THREADS: Final = 4
_READS_MAX: Final = 2
_TORN: Final = "index line torn or damaged"


class LineCounts(NamedTuple):
    """Lines that no daemon believes."""

    torn: int
    """Neither blank nor whole."""
    cleared: int
    """Of blocks that were cleared since."""


class _Line(NamedTuple):
    member: int
    slot: int
    block: StoredBlock | None


class _Member:
    """One open slab."""

    def __init__(self, path: Path, *, alone: bool, write: bool) -> None:
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC
        self.path, self.direct = path, -1
        device = stat.S_ISBLK(path.stat().st_mode)
        try:
            self.descriptor = open_device(path, flags) if device and alone else os.open(path, flags)
        except OSError as error:
            raise ConfigError(
                f"{str(path)!r} cannot be opened ({error.strerror})",
                hint="run this as the user of the daemon",
            ) from error
        try:
            if alone and not device:
                _lock(self.descriptor, path)
            self.superblock = decode_superblock(self.read(PAGE_BYTES, 0), str(path))
            self.superblock.check_length(length_of(self.descriptor), str(path))
            self.floor = decode_floor(self.read(FLOOR_BYTES, FLOOR_OFFSET))
            with suppress(OSError):  # then payloads are read through the page cache
                link = f"/proc/self/fd/{self.descriptor}"
                self.direct = os.open(link, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except BaseException:
            os.close(self.descriptor)
            raise

    def read(self, length: int, offset: int) -> bytes:
        try:
            return os.pread(self.descriptor, length, offset)
        except OSError as error:
            raise unreadable(self.path, error) from error

    def blank(self, slot: int) -> None:
        os.pwrite(self.descriptor, BLANK_ENTRY, PAGE_BYTES + slot * ENTRY_BYTES)

    def close(self) -> None:
        if self.descriptor >= 0:
            if self.direct >= 0:
                os.close(self.direct)
            os.close(self.descriptor)
            self.descriptor = self.direct = -1


def _lock(descriptor: int, path: Path) -> None:
    try:
        lock(descriptor, path)
    except ConfigError as error:
        raise ConfigError(
            f"{str(path)!r} is in use by a kvstrata daemon, or being verified",
            hint="stop the daemon first; `kvstrata ls` works beside it",
        ) from error


class _Buffers(threading.local):
    """Each thread's own room for a slot, on whole pages."""

    def __init__(self) -> None:
        self.room = mmap.mmap(-1, PAGE_BYTES)

    def view(self, length: int) -> memoryview:
        if len(self.room) < length:
            self.room = mmap.mmap(-1, length)
        return memoryview(self.room)[:length]


class InspectedSlab:
    """Open slabs of one stripe, or the one slab."""

    kind = "slab"

    def __init__(self, members: Sequence[_Member]) -> None:
        """Use what is open. Use `open`."""
        self._members = list(members)
        first: Superblock = self._members[0].superblock
        self.name = "|".join(str(each.path) for each in self._members)
        self.fingerprint = first.fingerprint
        self.description = first.description
        self._block_bytes, self._stride = first.block_bytes, first.stride_bytes
        # Over several places the highest floor counts, as when a daemon opens them.
        self._floor = max(each.floor or 0 for each in self._members)
        self._buffers = _Buffers()
        self._torn = self._cleared = 0
        self.total: int | None = None

    @classmethod
    def open(cls, paths: Sequence[Path], *, alone: bool, write: bool) -> InspectedSlab:
        """Open the files or devices; `alone` refuses those that a daemon has open.

        Raises ConfigError for a place that cannot be used, LayoutError for what is no slab, is
        damaged at its front, or has another layout than the first one.
        """
        if len({path.resolve() for path in paths}) < len(paths):
            raise ConfigError("a place is named twice", hint="name each slab of a stripe once")
        with ExitStack() as opened:
            members = []
            for path in paths:
                members.append(_Member(path, alone=alone, write=write))
                opened.callback(members[-1].close)
                if members[-1].superblock != members[0].superblock:
                    raise LayoutError(
                        f"{str(path)!r} and {str(paths[0])!r} are of different layouts or sizes",
                        hint="name the places of one disk tier, as its daemon does",
                    )
            opened.pop_all()
        return cls(members)

    @property
    def torn_floors(self) -> int:
        """How many members have a damaged floor."""
        return sum(each.floor is None for each in self._members)

    def blocks(self) -> Iterator[FoundBlock]:
        """Stream lines above the floor, by slot; torn and cleared ones are counted."""
        for line in self._lines():
            if line.block is not None and line.block.written > self._floor:
                yield self._found(line)

    def verify(self) -> Iterator[Checked]:
        """Read every block that a daemon would find, and judge every other line."""
        stale = self._superseded()  # a line of the same key counts only if it is the newest
        for member, each in enumerate(self._members):
            if each.floor is None:
                block = self._found(_Line(member, -1, None))
                yield Checked(block, Verdict.BAD, "floor torn: a daemon clears all when it starts")

        def check(line: _Line) -> Checked:
            found = self._found(line)
            if line.block is None:
                return Checked(found, Verdict.BAD, _TORN)
            if line.block.written <= self._floor:
                return Checked(found, Verdict.STALE, "cleared")
            if stale[line.member][line.slot]:
                return Checked(found, Verdict.STALE, "stored again in another slot")
            return Checked(found, *self._judge(line))

        yield from side_by_side(check, self._lines(), _THREADS)

    def quarantine(self, checked: Checked) -> None:
        """Blank the line; a torn floor is left to the daemon, which clears and mends it."""
        member, _, slot = checked.block.place.rpartition(":")
        if int(slot) >= 0:
            self._members[int(member or 0)].blank(int(slot))

    def unbelieved(self) -> LineCounts:
        """Return how many torn and cleared lines there are."""
        for _ in self._lines():
            pass
        return LineCounts(self._torn, self._cleared)

    def blank_unbelieved(self) -> LineCounts:
        """Blank torn lines and those of cleared blocks; nothing if a floor is torn."""
        if self.torn_floors:
            return LineCounts(0, 0)
        torn = cleared = 0
        for line in self._lines():
            if line.block is None or line.block.written <= self._floor:
                self._members[line.member].blank(line.slot)
                torn += line.block is None
                cleared += line.block is not None
        for each in self._members:
            os.fdatasync(each.descriptor)
        return LineCounts(torn, cleared)

    def notes(self) -> list[str]:
        """Say how many lines were left out."""
        notes = []
        if self._torn:
            notes.append(f"{self._torn} index lines torn or damaged")
        if self._cleared:
            notes.append(f"{self._cleared} lines of blocks that were cleared")
        if self.torn_floors:
            notes.append("floor torn: a daemon clears all when it starts")
        return notes

    def close(self) -> None:
        """Close all and let others open them."""
        for each in self._members:
            each.close()

    # -- lines ---------------------------------------------------------------------------------

    def _lines(self) -> Iterator[_Line]:
        """Stream every line that is not blank, a bounded number of them in memory."""
        self._torn = self._cleared = 0
        for member, each in enumerate(self._members):
            slots = each.superblock.slots
            for first in range(0, slots, _LINES_EACH):
                count = min(_LINES_EACH, slots - first)
                data = each.read(count * ENTRY_BYTES, PAGE_BYTES + first * ENTRY_BYTES)
                whole, torn = decode_entries(data, first, self._block_bytes)
                lines = [_Line(member, block.slot, block) for block in whole]
                if torn:
                    lines += (_Line(member, slot, None) for slot in self._torn_slots(data, first))
                    lines.sort(key=lambda line: line.slot)
                self._torn += torn
                self._cleared += sum(block.written <= self._floor for block in whole)
                yield from lines

    def _torn_slots(self, data: bytes, first: int) -> Iterator[int]:
        for place in range(len(data) // ENTRY_BYTES):
            line = data[place * ENTRY_BYTES :][:ENTRY_BYTES]
            slot = SlotId(first + place)
            if any(line) and decode_entry(line, slot, self._block_bytes) is None:
                yield slot

    def _superseded(self) -> list[NDArray[np.bool_]]:
        """Return for each member which slots' keys have a newer line somewhere; 40 bytes a slot."""
        keys: list[bytes] = []
        numbers: list[NDArray[np.int64]] = []
        lines = (each for each in self._lines() if each.block is not None)
        batch: list[tuple[int, int, int]] = []
        names: list[bytes] = []

        def flush() -> None:
            keys.append(b"".join(names))
            numbers.append(np.array(batch, np.int64).reshape(len(batch), 3))
            batch.clear()
            names.clear()

        count = 0
        for member, slot, block in lines:
            assert block is not None, "torn lines were left out"
            count += 1
            if block.written > self._floor:
                batch.append((block.written, member, slot))
                names.append(block.key)
            if len(batch) == _LINES_EACH:
                flush()
        flush()
        self.total = count + self._torn
        halves = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
        table = np.concatenate(numbers)
        order = np.lexsort((table[:, 0], halves[:, 1], halves[:, 0]))
        same = (halves[order[:-1]] == halves[order[1:]]).all(axis=1)
        stale = [np.zeros(each.superblock.slots, np.bool_) for each in self._members]
        for _, member, slot in table[order[:-1][same]].tolist():
            stale[member][slot] = True
        return stale

    def _found(self, line: _Line) -> FoundBlock:
        member, slot, block = line
        place = f"{member}:{slot}" if len(self._members) > 1 else str(slot)
        if block is None:
            return FoundBlock(None, place, self.fingerprint, 0, 0, "", fault=_TORN)
        return FoundBlock(
            key=block.key,
            place=place,
            fingerprint=self.fingerprint,
            block_bytes=self._block_bytes,
            stored_bytes=self._stride,
            codec=PLAIN,
            namespace=block.owner[:TAG_BYTES],
            tenant=block.owner[TAG_BYTES:],
            written=block.written,
        )

    def _judge(self, line: _Line) -> tuple[Verdict, str]:
        """Read the bytes, twice if they are not the block of their line."""
        member, block = self._members[line.member], line.block
        assert block is not None, "a torn line names no block"
        offset = member.superblock.index_end + line.slot * self._stride
        view = self._buffers.view(self._stride)
        found = Verdict.GOOD, ""
        for _ in range(_READS_MAX):
            try:
                moved = self._read(member, view, offset)
            except OSError as error:
                found = Verdict.UNREADABLE, str(error.strerror)
                continue
            if moved < self._block_bytes:
                found = Verdict.BAD, f"{Refusal.SHORT.value}: {moved} bytes"
            elif seal(block.key + self.fingerprint, view[: self._block_bytes]) == block.checksum:
                return Verdict.GOOD, ""
            else:
                found = Verdict.BAD, Refusal.OTHER_BYTES.value
        return found

    @staticmethod
    def _read(member: _Member, view: memoryview, offset: int) -> int:
        if member.direct >= 0:
            with suppress(OSError):  # some file systems refuse only the read
                return os.preadv(member.direct, [view], offset)
        return os.preadv(member.descriptor, [view], offset)
