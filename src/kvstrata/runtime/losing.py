"""What happens to a disk tier's slots once a device of it is left alone: they are used no more.

A device that fails takes its own slots along and nothing else. Its blocks become misses at once,
not one failed read after the other, and its slots are given out no more: whoever evicts a good
block to write to a dead device loses both. Lasts until the daemon starts again.
"""

from __future__ import annotations

import logging

from kvstrata.core.ids import SlotId
from kvstrata.manager import LowerTier, Manager
from kvstrata.storage.slab import Slab
from kvstrata.storage.stripe import Stripe

__all__ = ["Losing"]

log = logging.getLogger("kvstrata.runtime")


class Losing:
    """The lost slots of one tier. Owner: the daemon's one thread."""

    def __init__(self, tier: LowerTier, slab: Slab | Stripe) -> None:
        self._tier, self._slab = tier, slab
        self._devices = 0
        self._left: list[SlotId] = []
        self.slots = 0
        """Slots that are used no more."""

    def look(self, manager: Manager) -> None:
        """Take the slots of devices that failed since the last look out of use."""
        failed = self._slab.failed_devices
        if failed > self._devices:
            self._devices = failed
            lost = [SlotId(slot) for slot in self._slab.failed_slots]
            log.error(
                "tier %s: %d of its devices failed and are left alone: %s",
                self._tier.name,
                failed,
                "; ".join(
                    f"{each['path']}: {each['last_error']}"
                    for each in self._slab.statistics()
                    if each["failed"]
                ),
            )
            manager.lose(self._tier.name, lost)
            self.slots, self._left = len(lost), lost
        if self._left:  # after the first time, those that are being read or written
            self._left = self._tier.pool.retire(self._left)
