"""Whole nodes with guarantees: crashes, late reads and torn writes, and quotas all the while."""

from __future__ import annotations

from collections import Counter

import pytest

from kvstrata.core.config import parse_tenants
from kvstrata.manager import Manager
from kvstrata.manager.tenants import Tenants
from kvstrata.policy import TenantPolicy
from kvstrata.pool import Pool
from kvstrata.pool.owners import Owners
from kvstrata.testing.simworld import LIMITS, SimWorld

NAMES = ["a", "b", "", "c"]
GUARANTEES = ["a=30%", "b=host:50%,disk:20%"]


class WatchedPool(Pool):
    """Asserts that no reservation takes an account below its guarantee, but its own."""

    def reserve(self, count, coming=(), owner=0):
        policy = self._policy
        assert isinstance(policy, TenantPolicy)
        if count == self.slots_total:  # the world asks, at its end, whether each slot can be had
            policy.guarantees[:] = [0] * len(policy.guarantees)
        before, accounts = self.owned(), policy.accounts
        found = super().reserve(count, coming, owner)
        after, lost = self.owned(), Counter()
        held = Counter()
        for each in {*before, *after}:
            lost[accounts[each]] += before.get(each, 0) - after.get(each, 0)
            held[accounts[each]] += after.get(each, 0)
        for account, gone in lost.items():
            if account != accounts[owner] and gone > 0:
                assert held[account] >= policy.guarantees[account], (
                    f"account {account} has {held[account]}"
                )
        return found


class TenantManager(Manager):
    """Each session belongs to a tenant."""

    def reserve(self, holder, parent, hashes, hints=(), now=0.0, owner=0):
        owner = self.tenants.owner(b"model-01", NAMES[holder.session % len(NAMES)])
        return super().reserve(holder, parent, hashes, hints, now, owner)


class TenantWorld(SimWorld):
    refused = staged = 0

    def _start_daemon(self) -> None:
        self._tenants = Tenants(parse_tenants(GUARANTEES))
        super()._start_daemon()

    def _make_pool(self, tier, slots, policy):
        return WatchedPool(slots, self._tenants.policy_for(policy, tier, slots, slots))

    def _make_manager(self, lower, policy):
        tenants, bypass = self._tenants, self._bypass
        return TenantManager(self._host, lower, LIMITS, policy, tenants, None, bypass=bypass)

    def _clear(self) -> None:
        if self._random.random() < 0.5:
            super()._clear()
            return
        pools = [self._host, *self._lower.values()]
        held = sorted({owner for pool in pools for owner in pool.owned()})
        owners = {self._random.choice(held)} if held else set()
        gone = [{*pool.keys_of(owners)} for pool in pools]
        others = [{*pool.resident()} - keys for pool, keys in zip(pools, gone, strict=True)]
        self._note(f"clear {owners}")
        self._manager.clear_owned(owners)
        for pool, rest in zip(pools, others, strict=True):
            assert {*pool.resident()} == rest, "a clear took what was somebody else's"
        self._ledger.forgotten(set.intersection(*gone))

    def _work(self) -> None:
        super()._work()
        self.refused = max(self.refused, self.counters.throttled_quota_blocks)


def run(seeds) -> tuple[int, int]:
    refused = restarts = 0
    for seed in seeds:
        world = TenantWorld(seed)
        world.run(120)
        refused += world.refused
        restarts += world.restarts
    return refused, restarts


def test_worlds_with_guarantees_hold() -> None:
    refused, restarts = run(range(1, 61))
    assert refused > 10
    assert restarts > 10


def test_the_same_seed_takes_the_same_steps() -> None:
    digests = []
    for _ in range(2):
        world = TenantWorld(5)
        world.run(60)
        digests.append(world.digest)
    assert digests[0] == digests[1]


@pytest.mark.parametrize("bug", ["nothing is guaranteed", "a freed slot stays charged"])
def test_a_planted_bug_is_found(bug, monkeypatch) -> None:
    if bug == "nothing is guaranteed":
        monkeypatch.setattr(
            "kvstrata.pool.shares._Side.may_give",
            property(lambda side: bool(side.bared or side.order)),
        )
    else:
        monkeypatch.setattr(Owners, "drop", lambda *_: None)
    with pytest.raises(AssertionError):
        run(range(1, 30))
