"""The disk tier's bytes: one preallocated file or one block device, its index at the front.

    | superblock and floor: 1 page | index: 128 bytes a slot, padded | slot 0 | slot 1 | ...

The floor is a write counter: what was written up to it has been cleared, whatever the index says.

The slab never grows, so a full disk shows at start and not later. Writers put the payload down
first and its index line after it; a crash in between leaves the old line over new bytes, which
the seal exposes as not the block that the line names. Nothing is trusted for having been found:
see docs/contracts/storage.md for what survives what.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from kvstrata.core.errors import ConfigError
from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.layout import BlockLayout
from kvstrata.storage.base import PAGE_BYTES, FileRegion, SlotGrid, StoredBlock, align
from kvstrata.storage.entry import ENTRY_BYTES, decode_entries
from kvstrata.storage.footing import SLAB_NAME, Footing, blank, open_footing, unreadable
from kvstrata.storage.superblock import (
    FLOOR_BYTES,
    FLOOR_OFFSET,
    Superblock,
    decode_floor,
    encode_floor,
)

__all__ = ["SLAB_NAME", "Slab", "newest", "without_collector"]

_READ_BYTES: Final = 1 << 20


class Slab:
    """An open slab; exclusively ours while open."""

    merges = True
    """Whether neighbouring slots may be moved by one operation."""

    def __init__(self, footing: Footing, superblock: Superblock) -> None:
        """Wrap what is open, locked and checked. Use `open`."""
        self._footing = footing
        self._closed = False
        self.torn_entries = 0
        """Index lines that `recover` found neither blank nor whole."""
        self.torn_floor = False
        """Whether the floor was damaged when the slab was opened, so that nothing was found."""
        self._grid = SlotGrid(
            base_bytes=superblock.index_end,
            stride_bytes=superblock.stride_bytes,
            block_bytes=superblock.block_bytes,
            slots=superblock.slots,
        )
        floor = decode_floor(self._read(FLOOR_BYTES, FLOOR_OFFSET))
        if floor is None:
            self.torn_floor, floor = True, 0
            self._clear_all()
        self._floor = floor

    @classmethod
    def open(cls, place: str, capacity_bytes: int, layout: BlockLayout) -> Slab:
        """Open the slab in directory or on device `place`, or make one of at most `capacity_bytes`.

        Raises ConfigError for a place or size that cannot be used and for a slab that another
        process has open; LayoutError for one that another layout or version wrote, and for a
        device that holds something else; both are left as they are.
        """
        stride = align(layout.block_bytes)
        slots = (capacity_bytes - 2 * PAGE_BYTES) // (stride + ENTRY_BYTES)
        if slots < 1:
            raise ConfigError(
                f"tiers.disk: {capacity_bytes} bytes hold not one block of {layout.block_bytes}",
                hint="use a larger disk tier",
            )
        wanted = Superblock(
            layout.fingerprint, slots, stride, layout.block_bytes, layout.describe()
        )
        footing = open_footing(place, wanted, capacity_bytes)
        try:
            return cls(footing, wanted)
        except BaseException:
            footing.close()
            raise

    @property
    def path(self) -> Path:
        """The file, or the device's node."""
        return self._footing.path

    @property
    def region(self) -> FileRegion:
        """The whole file or device."""
        return self._footing.region

    @property
    def grid(self) -> SlotGrid:
        """Where each slot lies in it."""
        return self._grid

    def entry_offset(self, slot: int) -> int:
        """Return where the index line of `slot` lies."""
        return PAGE_BYTES + slot * ENTRY_BYTES

    @property
    def floor(self) -> int:
        """The write counter up to which every block was cleared."""
        return self._floor

    def forget_until(self, written: int) -> None:
        """Never recover a block written up to `written` again, not even after a loss of power.

        Raises OSError if the device does not take it.
        """
        record = [encode_floor(written)]
        os.pwritev(self.region.descriptor, record, FLOOR_OFFSET, os.RWF_DSYNC)
        self._floor = written

    def recover(self) -> list[StoredBlock]:
        """Read the index, and only it: O(slots), whatever the blocks' size.

        Where two lines name one key, the one written last counts. Lines up to `floor` are not
        returned: their blocks were cleared. Raises ConfigError if the index cannot be read.
        """
        with without_collector():
            return newest(self.lines(self.floor))

    def lines(self, floor: int) -> list[StoredBlock]:
        """Return what every whole line above `floor` says, by slot; count the torn ones."""
        found: list[StoredBlock] = []
        self.torn_entries = 0
        step = _READ_BYTES // ENTRY_BYTES
        for slot in range(0, self._grid.slots, step):
            count = min(step, self._grid.slots - slot)
            data = self._read(count * ENTRY_BYTES, self.entry_offset(slot))
            whole = data[: len(data) // ENTRY_BYTES * ENTRY_BYTES]  # it may have been cut short
            blocks, torn = decode_entries(whole, slot, self._grid.block_bytes, floor)
            found += blocks
            self.torn_entries += torn
        return found

    def _clear_all(self) -> None:
        """Blank every line, then mend a floor that does not say what was cleared.

        In this order: whenever this is cut short, the floor still is torn and it is done again.
        Counting from a floor above everything instead would not survive a second torn one.
        """
        try:
            blank(self.region.descriptor, PAGE_BYTES, self._grid.base_bytes)
            self.forget_until(0)
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _read(self, length: int, offset: int) -> bytes:
        try:
            return os.pread(self.region.descriptor, length, offset)
        except OSError as error:
            raise unreadable(self.path, error) from error

    @property
    def torn_floors(self) -> int:
        """How many floors were torn when the slab was opened."""
        return int(self.torn_floor)

    @property
    def failed_slots(self) -> range:
        """Slots that are lost because their device is left alone: none, or all."""
        return range(self._grid.slots if self.region.health.failed else 0)

    @property
    def failed_devices(self) -> int:
        """How many devices failed so often that they are left alone."""
        return int(self.region.health.failed)

    def statistics(self) -> list[dict[str, Any]]:
        """Return the state of each device or file, as plain names and numbers."""
        health = self.region.health
        because = self._footing.buffered_because
        return [
            {
                "path": str(self.path),
                "io": "buffered" if because else "direct",
                "buffered_because": because,
                "slots": self._grid.slots,
                "torn_index_entries": self.torn_entries,
                "torn_floor": self.torn_floor,
                "read_errors": health.read_errors,
                "write_errors": health.write_errors,
                "direct_refusals": health.direct_refusals,
                "failed": health.failed,
                "last_error": health.reason,
            }
        ]

    def sync(self) -> None:
        """Flush file data to the device."""
        os.fdatasync(self.region.descriptor)

    def close(self) -> None:
        """Close the file or device and let others open it."""
        if not self._closed:
            self._closed = True
            self._footing.close()


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Keep the garbage collector from walking a million new objects, none of them garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def newest(blocks: list[StoredBlock]) -> list[StoredBlock]:
    """Return `blocks` oldest first, and of those with one key only the one written last."""
    blocks.sort(key=attrgetter("written"))
    keys, slots = map(attrgetter("key"), blocks), map(attrgetter("slot"), blocks)
    latest: dict[SequenceHash, SlotId] = dict(zip(keys, slots, strict=True))
    if len(latest) == len(blocks):
        return blocks
    return [block for block in blocks if latest[block.key] == block.slot]
