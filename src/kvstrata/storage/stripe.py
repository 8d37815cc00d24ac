"""A disk tier over several files or devices: each a slab of its own, slots dealt round-robin.

Slot s of the tier is slot s // n of the (s modulo n)-th slab, and so is its index line. A slab
knows nothing of the others: one whose device fails takes only its own slots along. Write counters
are the tier's, so a clear that reached one slab covers every other one that missed it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstrata.core.errors import ConfigError
from kvstrata.core.ids import SlotId
from kvstrata.layout import BlockLayout
from kvstrata.storage.base import PAGE_BYTES, SlotGrid, StoredBlock, StripedRegion, align
from kvstrata.storage.entry import ENTRY_BYTES
from kvstrata.storage.slab import Slab, newest, without_collector

__all__ = ["Stripe", "open_slab"]


def open_slab(places: Sequence[str], capacity_bytes: int, layout: BlockLayout) -> Slab | Stripe:
    """Open the slab at the one place, or one stripe over all `places`; errors as `Slab.open`."""
    if len(places) == 1:
        return Slab.open(places[0], capacity_bytes, layout)
    return Stripe.open(places, capacity_bytes, layout)


class Stripe:
    """Several open slabs as one store."""

    merges = False
    """Neighbouring slots lie on different devices: one that fails must fail its own only."""

    def __init__(self, slabs: Sequence[Slab]) -> None:
        """Wrap open slabs of equal grids. Use `open`."""
        self._slabs = list(slabs)
        each = self._slabs[0].grid
        slots = each.slots * len(self._slabs)
        self._grid = SlotGrid(
            base_bytes=align(PAGE_BYTES + slots * ENTRY_BYTES),
            stride_bytes=each.stride_bytes,
            block_bytes=each.block_bytes,
            slots=slots,
        )
        members = tuple(slab.region for slab in self._slabs)
        self._region = StripedRegion(members, each, self._grid, PAGE_BYTES, ENTRY_BYTES)

    @classmethod
    def open(cls, places: Sequence[str], capacity_bytes: int, layout: BlockLayout) -> Stripe:
        """Open a slab at each of `places`, each of an equal share of `capacity_bytes`.

        Errors as `Slab.open`, of the first place that has one; then none is left open.
        """
        if len({Path(place).expanduser().resolve() for place in places}) < len(places):
            raise ConfigError(
                f"tiers.disk: {'|'.join(places)!r} names a place twice",
                hint="name each directory or device once",
            )
        with contextlib.ExitStack() as opened:
            slabs = [
                opened.enter_context(
                    contextlib.closing(Slab.open(place, capacity_bytes // len(places), layout))
                )
                for place in places
            ]
            opened.pop_all()
            return cls(slabs)

    @property
    def path(self) -> Path:
        """The first file or device."""
        return self._slabs[0].path

    @property
    def region(self) -> StripedRegion:
        """All of them as one address space."""
        return self._region

    @property
    def grid(self) -> SlotGrid:
        """Where each slot lies in that space."""
        return self._grid

    def entry_offset(self, slot: int) -> int:
        """Return where the index line of `slot` lies in that space."""
        return PAGE_BYTES + slot * ENTRY_BYTES

    @property
    def torn_entries(self) -> int:
        """Index lines that `recover` found neither blank nor whole."""
        return sum(slab.torn_entries for slab in self._slabs)

    @property
    def torn_floors(self) -> int:
        """How many floors were torn when they were opened."""
        return sum(slab.torn_floors for slab in self._slabs)

    @property
    def floor(self) -> int:
        """The highest write counter up to which blocks were cleared somewhere."""
        return max(slab.floor for slab in self._slabs)

    def forget_until(self, written: int) -> None:
        """Never recover a block written up to `written` again, not even after a loss of power.

        Raises OSError only if no device took it: `recover` believes the highest of them.
        """
        errors = []
        for slab in self._slabs:
            try:
                slab.forget_until(written)
            except OSError as error:
                slab.region.health.failed_to(error, write=True)
                errors.append(error)
        if len(errors) == len(self._slabs):
            raise errors[0]

    def recover(self) -> list[StoredBlock]:
        """Read every index; as `Slab.recover`. A torn floor cleared its own slab only."""
        with without_collector():
            found: list[StoredBlock] = []
            count, floor = len(self._slabs), self.floor
            for member, slab in enumerate(self._slabs):
                found += [
                    block._replace(slot=SlotId(block.slot * count + member))
                    for block in slab.lines(floor)
                ]
            return newest(found)

    @property
    def failed_slots(self) -> list[int]:
        """Slots that are lost because their device is left alone."""
        count = len(self._slabs)
        return [
            slot * count + member
            for member, slab in enumerate(self._slabs)
            for slot in slab.failed_slots
        ]

    @property
    def failed_devices(self) -> int:
        """How many devices failed so often that they are left alone."""
        return sum(slab.failed_devices for slab in self._slabs)

    def statistics(self) -> list[dict[str, Any]]:
        """Return the state of each device or file, as plain names and numbers."""
        return [state for slab in self._slabs for state in slab.statistics()]

    def sync(self) -> None:
        """Flush every device."""
        for slab in self._slabs:
            slab.sync()

    def close(self) -> None:
        """Close all of them and let others open them."""
        for slab in self._slabs:
            slab.close()
