"""The disk tier's bytes: one preallocated file, its index at the front.

    | superblock and floor: 1 page | index: 128 bytes a slot, padded | slot 0 | slot 1 | ...

The floor is a write counter: what was written up to it has been cleared, whatever the index says.

The file never grows, so a full disk shows at start and not later. Writers put the payload down
first and its index line after it; a crash in between leaves the old line over new bytes, which
the seal exposes as not the block that the line names. Nothing is trusted for having been found:
see docs/contracts/tier-store.md for what survives what.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from zlib import crc32

from kvstrata.core.errors import ConfigError, LayoutError
from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.layout import BlockLayout
from kvstrata.storage.base import PAGE_BYTES, FileRegion, SlotGrid, StoredBlock, align
from kvstrata.storage.entry import BLANK_ENTRY, ENTRY_BYTES, decode_entry

__all__ = ["SLAB_NAME", "Slab", "check_directory"]

SLAB_NAME: Final = "blocks.slab"
"""Name of the file in the disk tier's directory."""

_VERSION: Final = 1
_MAGIC: Final = b"KVSTRATA"
_HEAD: Final = struct.Struct("<8sI16sQQQH")  # magic version fingerprint slots stride block text
_READ_BYTES: Final = 1 << 20
_FLOOR: Final = struct.Struct("<QI")  # write counter, crc32 of it
_FLOOR_TORN: Final = 1 << 62
_FLOOR_OFFSET: Final = PAGE_BYTES - 512  # a sector of its own: a torn one harms nothing else


@dataclass(frozen=True, slots=True)
class _Superblock:
    fingerprint: bytes
    slots: int
    stride_bytes: int
    block_bytes: int
    description: str

    def encode(self) -> bytes:
        text = self.description.encode()[: _FLOOR_OFFSET - _HEAD.size - 4]
        head = _HEAD.pack(
            _MAGIC,
            _VERSION,
            self.fingerprint,
            self.slots,
            self.stride_bytes,
            self.block_bytes,
            len(text),
        )
        body = (head + text).ljust(_FLOOR_OFFSET - 4, b"\0")
        return body + struct.pack("<I", crc32(body)) + _encode_floor(0)


class Slab:
    """An open slab file; exclusively ours while open."""

    def __init__(self, descriptor: int, path: Path, layout: BlockLayout, slots: int) -> None:
        """Wrap an open, locked and checked descriptor. Use `open`."""
        self._descriptor = descriptor
        self.path = path
        self.torn_entries = 0
        """Index lines that `recover` found neither blank nor whole."""
        self.torn_floors = 0
        """1 if the floor was torn at opening, so that everything in the slab was cleared."""
        self._grid = SlotGrid(
            base_bytes=align(PAGE_BYTES + slots * ENTRY_BYTES),
            stride_bytes=align(layout.block_bytes),
            block_bytes=layout.block_bytes,
            slots=slots,
        )

    @classmethod
    def open(cls, directory: str, capacity_bytes: int, layout: BlockLayout) -> Slab:
        """Open the slab in `directory`, or make one of at most `capacity_bytes`.

        Raises ConfigError for a directory or size that cannot be used and for a slab that another
        process has open; LayoutError for one that another layout or version wrote, which is left
        as it is.
        """
        folder = check_directory(directory)
        path = folder / SLAB_NAME
        slots = (capacity_bytes - 2 * PAGE_BYTES) // (align(layout.block_bytes) + ENTRY_BYTES)
        if slots < 1:
            raise ConfigError(
                f"tiers.disk: {capacity_bytes} bytes hold not one block of {layout.block_bytes}",
                hint="use a larger disk tier",
            )
        wanted = _Superblock(
            layout.fingerprint,
            slots,
            align(layout.block_bytes),
            layout.block_bytes,
            layout.describe(),
        )
        if not path.exists():
            _create(path, wanted)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(
                f"tiers.disk: {str(path)!r} cannot be opened ({error.strerror})",
                hint="make it readable and writable for this user, or use another directory",
            ) from error
        try:
            _lock(descriptor, path)
            _check(descriptor, path, wanted, capacity_bytes)
        except BaseException:
            os.close(descriptor)
            raise
        slab = cls(descriptor, path, layout, slots)
        try:
            slab._mend_floor()
        except OSError as error:
            slab.close()
            raise ConfigError(
                f"tiers.disk: the torn floor of {str(path)!r} cannot be mended ({error.strerror})",
                hint="make the file writable, or move it away: all that it holds was cleared",
            ) from error
        return slab

    @property
    def region(self) -> FileRegion:
        """The whole file."""
        return FileRegion(self._descriptor)

    @property
    def grid(self) -> SlotGrid:
        """Where each slot lies in the file."""
        return self._grid

    def entry_offset(self, slot: int) -> int:
        """Return where the index line of `slot` lies in the file."""
        return PAGE_BYTES + slot * ENTRY_BYTES

    @property
    def floor(self) -> int:
        """The write counter up to which every block was cleared."""
        record = os.pread(self._descriptor, _FLOOR.size, _FLOOR_OFFSET)
        written, crc = _FLOOR.unpack(record)
        return written if crc == crc32(record[:8]) else _FLOOR_TORN

    def forget_until(self, written: int) -> None:
        """Never recover a block written up to `written` again, not even after a loss of power."""
        record = [_encode_floor(written)]
        os.pwritev(self._descriptor, record, _FLOOR_OFFSET, os.RWF_DSYNC)

    def _mend_floor(self) -> None:
        """Blank the index if the floor is torn, and only then make the floor whole.

        Nobody knows what it cleared. Counting on above a floor that stays torn would not do: torn
        once more, it would say nothing of what was written and cleared in between.
        """
        if self.floor != _FLOOR_TORN:
            return
        self.torn_floors = 1
        blank, end = bytes(_READ_BYTES), self._grid.base_bytes
        for start in range(PAGE_BYTES, end, _READ_BYTES):
            os.pwrite(self._descriptor, blank[: min(_READ_BYTES, end - start)], start)
        os.fdatasync(self._descriptor)  # a crash before the next line only repeats this
        self.forget_until(0)

    def recover(self) -> list[StoredBlock]:
        """Read the index, and only it: O(slots), whatever the blocks' size.

        Where two lines name one key, the one written last counts. Lines up to `floor` are not
        returned: their blocks were cleared.
        """
        found: dict[SequenceHash, StoredBlock] = {}
        self.torn_entries = 0
        floor = self.floor
        slot = 0
        while slot < self._grid.slots:
            count = min(_READ_BYTES // ENTRY_BYTES, self._grid.slots - slot)
            lines = os.pread(self._descriptor, count * ENTRY_BYTES, self.entry_offset(slot))
            for start in range(0, len(lines), ENTRY_BYTES):
                line = lines[start : start + ENTRY_BYTES]
                if line == BLANK_ENTRY:
                    continue
                block = decode_entry(
                    line, SlotId(slot + start // ENTRY_BYTES), self._grid.block_bytes
                )
                if block is None:
                    self.torn_entries += 1
                    continue
                if block.written <= floor:
                    continue
                rival = found.get(block.key)
                if rival is None or rival.written < block.written:
                    found[block.key] = block
            slot += count
        return sorted(found.values(), key=lambda block: block.written)

    def sync(self) -> None:
        """Flush file data to the device."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close the file and let others open it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _encode_floor(written: int) -> bytes:
    counter = written.to_bytes(8, "little")
    return _FLOOR.pack(written, crc32(counter))


def check_directory(directory: str, field: str = "tiers.disk") -> Path:
    """Return the directory, made if missing; raises ConfigError if it cannot be written."""
    folder = Path(directory).expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = folder / f".kvstrata-probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{field}: directory {directory!r} cannot be written ({error.strerror})",
            hint="choose a directory that this user may write to",
        ) from error
    return folder


def _create(path: Path, superblock: _Superblock) -> None:
    """Make the file under another name and link it: a half-made slab is never found."""
    index_end = align(PAGE_BYTES + superblock.slots * ENTRY_BYTES)
    length = index_end + superblock.slots * superblock.stride_bytes
    _sweep(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.new")
    descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        _allocate(descriptor, length)
        os.pwrite(descriptor, superblock.encode(), 0)
        os.fsync(descriptor)
        os.link(unfinished, path)  # unlike a rename this never replaces another daemon's slab
    except FileExistsError:
        return  # another daemon was faster: the lock decides
    except OSError as error:
        raise ConfigError(
            f"tiers.disk: cannot preallocate {length} bytes at {str(path)!r} ({error.strerror})",
            hint="free space on that file system or use a smaller disk tier",
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
        os.close(descriptor)


def _sweep(path: Path) -> None:
    """Remove slabs that a process began to make and did not live to finish."""
    for left in path.parent.glob(f"{path.name}.*.new"):
        owner = left.name.removeprefix(f"{path.name}.").removesuffix(".new")
        if owner.isdigit() and not Path("/proc", owner).exists():
            left.unlink(missing_ok=True)


def _allocate(descriptor: int, length: int) -> None:
    free = os.fstatvfs(descriptor)
    if length > free.f_bavail * free.f_frsize:  # some systems let fallocate overcommit
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        os.posix_fallocate(descriptor, 0, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, length)  # no fallocate here: a full disk then fails single writes


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"tiers.disk: {str(path)!r} is in use by another kvstrata daemon",
            hint="connect to that daemon by its address, or give this one another directory",
        ) from error


def _check(descriptor: int, path: Path, wanted: _Superblock, capacity_bytes: int) -> None:
    page = os.pread(descriptor, PAGE_BYTES, 0)
    keep = "kvstrata never reads or deletes it: move it away, or use another directory"
    if len(page) < PAGE_BYTES or not page.startswith(_MAGIC):
        raise LayoutError(f"tiers.disk: {str(path)!r} is not a kvstrata slab", hint=keep)
    _, version, fingerprint, slots, stride, block, text = _HEAD.unpack_from(page)
    if version != _VERSION:
        raise LayoutError(
            f"tiers.disk: {str(path)!r} was written by slab version {version}, this is {_VERSION}",
            hint=keep,
        )
    body = page[:_FLOOR_OFFSET]
    if struct.unpack("<I", body[-4:])[0] != crc32(body[:-4]):
        raise LayoutError(f"tiers.disk: the superblock of {str(path)!r} is damaged", hint=keep)
    if fingerprint != wanted.fingerprint or (stride, block) != (
        wanted.stride_bytes,
        wanted.block_bytes,
    ):
        written = page[_HEAD.size : _HEAD.size + text].decode(errors="replace")
        raise LayoutError(
            f"tiers.disk: {str(path)!r} holds blocks of another layout: {written!r}, "
            f"not {wanted.description!r}",
            hint=keep,
        )
    if slots != wanted.slots:
        raise ConfigError(
            f"tiers.disk: {str(path)!r} has {slots} slots, a size of {capacity_bytes} bytes means "
            f"{wanted.slots}",
            hint="keep the size that it was made with, or move the file away",
        )
    length = align(PAGE_BYTES + slots * ENTRY_BYTES) + slots * stride
    if os.fstat(descriptor).st_size < length:
        raise LayoutError(f"tiers.disk: {str(path)!r} has been cut short", hint=keep)
