"""The keyed tiers of a node: their movers, and the listings by which they are taken over.

A listing runs in the background while the node serves: until it has ended, some of what a tier
holds is a miss. What is cleared meanwhile is cleared there too: a clear of the tier deletes what
is listed later, and a clear of a part is done once more at the end of the listing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from kvstrata.core.config import NodeConfig
from kvstrata.core.tier import TierName
from kvstrata.layout import BlockLayout
from kvstrata.manager import Manager
from kvstrata.runtime.listing import Listing
from kvstrata.storage.arena import Arena
from kvstrata.storage.codecs import CodecSettings
from kvstrata.storage.keyed import KeyedStore
from kvstrata.storage.opening import keyed_slots, open_chain
from kvstrata.transfer.backends.keyed import KeyedEnd
from kvstrata.transfer.keyed import KeyedMover

__all__ = ["KeyedTiers"]

_REPEATS_MAX: Final = 1024


class KeyedTiers:
    """Owner: the daemon's one thread."""

    def __init__(
        self,
        config: NodeConfig,
        layout: BlockLayout,
        stores: Mapping[TierName, KeyedStore],
        arena: Arena,
        manager: Manager,
        secret: bytes | None,
        *,
        notify: Callable[[], None],
    ) -> None:
        """Start to list `stores`; raises ConfigError for a codec that these blocks cannot have."""
        self._manager = manager
        self._cleared: set[TierName] = set()
        self._repeats: list[Callable[[], object]] = []
        self._codecs = {name: config.lower[name].codec for name in stores}
        settings = CodecSettings(layout.dtype, secret)
        chains = {name: open_chain(config.lower[name], settings) for name in stores}
        self.movers: dict[TierName, KeyedMover] = {
            name: KeyedMover(
                KeyedEnd(store, chains[name], layout.fingerprint),
                arena,
                threads=config.limits.keyed_threads,
                notify=notify,
            )
            for name, store in stores.items()
        }
        """By the name of their tier."""
        self._listings = {
            name: Listing(name, store, keyed_slots(config.lower[name], layout), notify)
            for name, store in stores.items()
        }

    @property
    def listing(self) -> int:
        """Tiers that are still being listed."""
        return len(self._listings)

    def adopt(self) -> None:
        """Let the brain have one batch of each listing under way."""
        for name, listing in list(self._listings.items()):
            ended = listing.ended
            if found := listing.poll():
                self._manager.adopt(name, found, cleared=name in self._cleared)
            elif ended:
                del self._listings[name]
                self._cleared.discard(name)
                if not self._listings:
                    self._repeat_all()

    def cleared(self, tiers: Collection[TierName]) -> None:
        """Take note that `tiers` were cleared: what their listings still bring must go too."""
        self._cleared |= self._listings.keys() & set(tiers)

    def repeat(self, clear: Callable[[], object]) -> None:
        """Call `clear` again once all is listed, if something is being listed."""
        if self._listings:
            self._repeats.append(clear)
            if len(self._repeats) > _REPEATS_MAX:  # then clear more than was asked for
                self._repeats.clear()
                self._cleared |= self._listings.keys()

    def statistics(self, tier: TierName) -> dict[str, Any]:
        """Return what a keyed tier has besides its slots; empty for another one."""
        mover = self.movers.get(tier)
        if mover is None:
            return {}
        return mover.statistics() | {
            "codec": self._codecs[tier],
            "listing": tier in self._listings,
        }

    def close(self) -> None:
        """Stop the listings; the movers are the executor's to close."""
        for listing in self._listings.values():
            listing.close()
        self._listings.clear()

    def _repeat_all(self) -> None:
        repeats, self._repeats = self._repeats, []
        for clear in repeats:
            clear()
