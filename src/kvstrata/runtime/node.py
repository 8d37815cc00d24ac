"""One layout's tiers at work: stores, pools, brain and executor put together."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from kvstrata.core.config import NodeConfig
from kvstrata.core.tier import Tier
from kvstrata.layout import BlockLayout
from kvstrata.manager import Manager
from kvstrata.manager.tenants import Tenants
from kvstrata.pool import Pool
from kvstrata.storage.arena import Arena
from kvstrata.storage.slab import Slab
from kvstrata.transfer.base import Job
from kvstrata.transfer.executor import Executor

__all__ = ["Node"]


class Node:
    """Owner: the daemon's one thread; `notify` is the only thing called from others."""

    def __init__(self, config: NodeConfig, layout: BlockLayout, notify: Callable[[], None]) -> None:
        """Open the stores for `layout`; raises ConfigError and leaves nothing open."""
        self.layout = layout
        self.slab: Slab | None = None
        if config.disk and config.disk.directory:
            self.slab = Slab.open(config.disk.directory, config.disk.capacity_bytes, layout)
        try:
            self.arena = Arena.create(config.host.capacity_bytes, layout)
        except BaseException:
            if self.slab:
                self.slab.close()
            raise
        policy = config.policy
        tenants = Tenants(config.tenants)
        slots = {Tier.HOST: self.arena.grid.slots}
        if self.slab:
            slots[Tier.DISK] = self.slab.grid.slots
        orders = {
            each.tier: tenants.policy_for(
                policy, each.tier.value, each.capacity_bytes, slots[each.tier]
            )
            for each in config.tiers
        }
        host = Pool(slots[Tier.HOST], orders[Tier.HOST], self.arena.generations)
        disk = Pool(slots[Tier.DISK], orders[Tier.DISK]) if self.slab else None
        self.manager = Manager(host, disk, config.limits, policy, tenants)
        if self.slab:
            self.manager.recover(self.slab.recover(), self.slab.floor)
        self._policy = policy
        self._pools = {"host": host} | ({"disk": disk} if disk else {})
        self._executor = Executor(
            self.arena, self.slab, layout.fingerprint, config.limits, notify=notify
        )
        self._waiting: deque[Job] = deque()

    def work(self, now: float) -> None:
        """Take what has ended, decide, start what follows; never waits."""
        for transfer in self.manager.late(now):
            self._executor.cancel(transfer)
        for done in self._executor.poll():
            self.manager.complete(done)
        self._waiting += self.manager.step(now)
        while self._waiting and self._executor.try_submit(self._waiting[0]):
            self._waiting.popleft()

    def clear(self, tiers: Collection[Tier]) -> int:
        """Forget every block in `tiers`, for a restart too; return how many there were."""
        count = self.manager.clear(tiers)
        if self.slab and Tier.DISK in tiers:
            self.slab.forget_until(self.manager.written)
        return count

    @property
    def busy(self) -> bool:
        """Whether anything is on its way or held, so that time matters."""
        return bool(self.manager.pending or self.manager.holds)

    @property
    def writing(self) -> int:
        """Blocks that are being stored or written to disk; 0 once a stop loses nothing."""
        return self.manager.storing

    def statistics(self) -> dict[str, Any]:
        """Return counters and tier states as plain names and numbers."""
        return {
            "layout": self.layout.describe(),
            "block_bytes": self.layout.block_bytes,
            "block_tokens": self.layout.block_tokens,
            "pending": self.manager.pending,
            "holds": self.manager.holds,
            "leased_blocks": self.manager.leased,
            "counters": dataclasses.asdict(self.manager.counters)
            | {"torn_index_entries": self.slab.torn_entries if self.slab else 0},
            "policy": self._policy,
            "would_have_hit": self.manager.gauges(),
            **self.manager.tenants.statistics(),
            "tiers": {
                name: dataclasses.asdict(pool.statistics()) for name, pool in self._pools.items()
            },
        }

    def close(self) -> None:
        """Stop moving bytes and give everything back; what was written stays on disk."""
        self._executor.close()
        self.arena.close()
        if self.slab:
            self.slab.close()
