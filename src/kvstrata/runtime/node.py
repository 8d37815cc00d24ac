"""One layout's tiers at work: stores, pools, brain and executor put together."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from kvstrata.core.config import BACKEND_DEFAULT, Limits, NodeConfig, tier_names
from kvstrata.core.errors import CallRefusedError
from kvstrata.core.ids import SequenceHash
from kvstrata.core.tier import HOST, TierName
from kvstrata.layout import BlockLayout
from kvstrata.manager import Costs, LowerTier, Manager
from kvstrata.manager.tenants import Tenants
from kvstrata.pool import Pool
from kvstrata.runtime.keyed import KeyedTiers
from kvstrata.runtime.losing import Losing
from kvstrata.storage.arena import Arena
from kvstrata.storage.hostmemory import HostMemory
from kvstrata.storage.keyed import KeyedStore
from kvstrata.storage.opening import keyed_slots, open_keyed
from kvstrata.storage.slab import Slab, without_collector
from kvstrata.storage.stripe import Stripe, open_slab
from kvstrata.transfer.backends.guarded import GuardedBackend
from kvstrata.transfer.base import Job
from kvstrata.transfer.executor import Executor
from kvstrata.transfer.mover import make_mover

__all__ = ["Node"]


class Node:
    """Owner: the daemon's one thread; `notify` is the only thing called from others."""

    def __init__(
        self,
        config: NodeConfig,
        layout: BlockLayout,
        notify: Callable[[], None],
        secret: bytes | None = None,
        memory: HostMemory | None = None,
        mover: str | None = None,
    ) -> None:
        """Open the stores for `layout`; raises ConfigError and leaves nothing open.

        The arena lies in `memory` if given, which stays the caller's to close. `mover` names the
        backend between host and disk; left out, it is our threads.
        What slabs hold is known from then on; keyed tiers are listed in the background.
        """
        self.layout = layout
        with contextlib.ExitStack() as opened:
            self._slabs: dict[TierName, Slab | Stripe] = {}
            stores: dict[TierName, KeyedStore] = {}
            for name, tier in config.lower.items():
                if tier.kind.keyed:
                    store = open_keyed(tier, layout, config.limits)
                    stores[name] = opened.enter_context(contextlib.closing(store))
                    continue
                assert tier.places, "a disk tier without a directory"
                slab = open_slab(tier.places, tier.capacity_bytes, layout)
                self._slabs[name] = opened.enter_context(contextlib.closing(slab))
            self.arena = Arena.create(config.host.capacity_bytes, layout, memory)
            opened.callback(self.arena.close)
            self._policy = config.policy
            self.manager = self._make_manager(config)
            self._losing = {
                tier.name: Losing(tier, self._slabs[tier.name])
                for tier in self._lower
                if tier.name in self._slabs
            }
            self._keyed = KeyedTiers(
                config, layout, stores, self.arena, self.manager, secret, notify=notify
            )
            opened.callback(self._keyed.close)
            self._mover = make_mover(mover or BACKEND_DEFAULT, config.limits, notify=notify)
            opened.callback(self._mover.close)
            self._executor = Executor(
                self.arena,
                self._slabs,
                layout.fingerprint,
                config.limits,
                notify=notify,
                mover=self._mover,
                keyed=self._keyed.movers,
            )
            opened.pop_all()
        self._waiting: deque[Job] = deque()

    def _make_manager(self, config: NodeConfig) -> Manager:
        policy, tenants = config.policy, Tenants(config.tenants)
        slots = {HOST: self.arena.grid.slots}
        for name, tier in config.lower.items():
            keyed = tier.kind.keyed
            slots[name] = keyed_slots(tier, self.layout) if keyed else self._slabs[name].grid.slots
        orders = {
            name: tenants.policy_for(policy, name, tier.capacity_bytes, slots[name])
            for name, tier in zip(tier_names(config.tiers), config.tiers, strict=True)
        }
        host = Pool(slots[HOST], orders[HOST], self.arena.generations)
        self._lower = [
            LowerTier(
                name,
                Pool(slots[name], orders[name]),
                tier.admission,
                keyed=tier.kind.keyed,
            )
            for name, tier in config.lower.items()
        ]
        self._host = host
        manager = Manager(
            host,
            self._lower,
            config.limits,
            policy,
            tenants,
            self._make_costs(config.limits),
            bypass=config.host.bypass,
        )
        with without_collector():
            for name, slab in self._slabs.items():
                manager.recover(slab.recover(), slab.floor, name)
        return manager

    def _make_costs(self, limits: Limits) -> Costs | None:
        if not limits.weigh_costs:
            return None
        return Costs(
            self.layout.block_tokens,
            self.layout.block_bytes,
            margin=limits.cost_margin,
            probe_interval_s=limits.cost_probe_interval_s,
        )

    def work(self, now: float) -> None:
        """Take what has ended, decide, start what follows; never waits."""
        for transfer in self.manager.late(now):
            self._executor.cancel(transfer)
        for done in self._executor.poll():
            self.manager.complete(done)
        for losing in self._losing.values():
            losing.look(self.manager)
        self._keyed.adopt()
        self._waiting += self.manager.step(now)
        while self._waiting and self._executor.try_submit(self._waiting[0]):
            self._waiting.popleft()

    @property
    def tier_names(self) -> list[TierName]:
        """The tiers' names, the host first."""
        return [HOST, *(tier.name for tier in self._lower)]

    def clear(self, tiers: Collection[TierName]) -> int:
        """Forget every block in `tiers`, for a restart too; return how many there were.

        Raises CallRefusedError if a disk does not take note of it.
        """
        count = self.manager.clear(tiers)
        for name, slab in self._slabs.items():
            if name in tiers:
                try:
                    slab.forget_until(self.manager.written(name))
                except OSError as error:
                    raise CallRefusedError(
                        f"tiers: {name} is cleared, but its disk did not take note of it "
                        f"({error.strerror}): a restart may find the blocks again"
                    ) from error
        self._keyed.cleared(tiers)
        return count

    def forget(self, key: SequenceHash) -> int:
        """Forget `key` and what is behind it, in every tier; return how many copies there were."""
        self._keyed.repeat(lambda: self.manager.forget(key))
        return self.manager.forget(key)

    def clear_owned(self, namespace: str, tenant: str | None) -> int:
        """Forget what a tenant stored in a namespace; see `Tenants.matching` and its errors."""
        owners = self.manager.tenants.matching(namespace, tenant)
        self._keyed.repeat(lambda: self.manager.clear_owned(owners))
        return self.manager.clear_owned(owners)

    @property
    def busy(self) -> bool:
        """Whether anything is on its way or held, so that time matters."""
        return bool(self.manager.pending or self.manager.holds or self._keyed.listing)

    @property
    def writing(self) -> int:
        """Blocks being stored, written below the host or deleted; 0 once a stop loses nothing."""
        return self.manager.storing + self.manager.deleting

    def statistics(self) -> dict[str, Any]:
        """Return counters and tier states as plain names and numbers."""
        return {
            "layout": self.layout.describe(),
            "block_bytes": self.layout.block_bytes,
            "block_tokens": self.layout.block_tokens,
            "pending": self.manager.pending + self._keyed.listing,
            "holds": self.manager.holds,
            "leased_blocks": self.manager.leased,
            "counters": dataclasses.asdict(self.manager.counters)
            | {
                "forgotten_changes": self.manager.forgotten_changes,
                "torn_index_entries": sum(slab.torn_entries for slab in self._slabs.values()),
                "torn_floors": sum(slab.torn_floors for slab in self._slabs.values()),
            },
            "policy": self._policy,
            "would_have_hit": self.manager.gauges(),
            "costs": self.manager.costs(),
            **self.manager.tenants.statistics(),
            "tiers": {HOST: self._host_statistics()}
            | {
                tier.name: dataclasses.asdict(tier.pool.statistics())
                | {"hit_blocks": tier.hit_blocks, "admission": tier.admission.value}
                | self._disk_statistics(tier.name)
                | self._keyed.statistics(tier.name)
                for tier in self._lower
            },
        }

    def mover_statistics(self) -> dict[str, Any]:
        """Return what a mover that is not ours did; nothing of our threads."""
        mover = self._mover
        return mover.statistics() if isinstance(mover, GuardedBackend) else {}

    def _host_statistics(self) -> dict[str, Any]:
        hits = self.manager.counters.hit_blocks_host
        return dataclasses.asdict(self._host.statistics()) | {"hit_blocks": hits}

    def _disk_statistics(self, name: TierName) -> dict[str, Any]:
        if name not in self._slabs:
            return {}
        return {"lost": self._losing[name].slots, "devices": self._slabs[name].statistics()}

    def close(self) -> None:
        """Stop moving bytes and give everything back; what was written stays."""
        self._keyed.close()
        self._executor.close()
        self.arena.close()
        for slab in self._slabs.values():
            slab.close()
