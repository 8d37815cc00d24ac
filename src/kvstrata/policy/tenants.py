"""Quotas over any policy: one order for each tenant with a guarantee, one for everybody else.

An *account* is such a tenant, or all tenants without a guarantee together (account 0). Names come
from clients and may be many, so tenants without a guarantee have no order of their own.

Each account has a weight: its guarantee, or, for account 0, what the guarantees leave of the tier.
The one that holds most for its weight gives first, so accounts that all want more than there is end
up with slots in the ratio of their weights. Account 0's weight is no guarantee: it can lose
everything to tenants that are below theirs. Priorities hold within an account, never across.

Who may take what from whom is decided in the pool, which knows the chains (`pool/shares.py`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf
from typing import Protocol

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.policy.base import EvictionPolicy
from kvstrata.policy.ranked import RankedPolicy

__all__ = ["OwnerTable", "TenantPolicy"]


class OwnerTable(Protocol):
    """Which owner occupies each slot; the pool's, and live."""

    sole: int
    """The one owner of all occupied slots, while there is no `table`."""
    table: array[int] | None
    """Owner of each occupied slot, once there has been a second owner."""

    def held(self, account: int) -> int:
        """Return how many slots the owners of `account` occupy."""


class TenantPolicy:
    """An order an account. Held slots belong to the account of the owner that occupies them."""

    def __init__(
        self,
        make: Callable[[], EvictionPolicy],
        guarantees: Sequence[int],
        accounts: Sequence[int],
    ) -> None:
        """Make an order for account 0 and for each of `guarantees`, in slots, of accounts 1 and on.

        `accounts` is the live view owner -> account.
        """
        self.guarantees = [0, *guarantees]
        self.accounts = accounts
        self.orders = [RankedPolicy(make()) for _ in self.guarantees]
        self._owners: OwnerTable | None = None

    def bind(self, capacity: int, keys: Sequence[SequenceHash | None]) -> None:
        """Size the order of each account: any of them may come to hold the whole tier."""
        self.weights = [max(capacity - sum(self.guarantees), 0), *self.guarantees[1:]]
        for order in self.orders:
            order.bind(capacity, keys)

    def bind_owners(self, owners: OwnerTable) -> None:
        """Learn the live view slot -> owner; without it every slot is account 0's."""
        self._owners = owners

    def account_of(self, slot: SlotId) -> int:
        """Return the account whose owner occupies `slot`."""
        owners = self._owners
        if owners is None:
            return 0
        return self.accounts[owners.sole if owners.table is None else owners.table[slot]]

    @property
    def ranked(self) -> bool:
        """Whether any slot was ever given a priority."""
        return any(order.ranked for order in self.orders)

    def priority_of(self, slot: SlotId) -> int:
        """Return the priority last given to `slot` in the account that it is in."""
        return self.orders[self.account_of(slot)].priority_of(slot)

    def rank(self, slots: Iterable[SlotId], priority: int) -> None:
        """Give `slots`, which the caller guarantees are not held, another priority."""
        for order, part in self._parts(slots):
            order.rank(part, priority)

    def admit(self, slots: Iterable[SlotId]) -> None:
        """Admit each slot to the order of its account."""
        for order, part in self._parts(slots):
            order.admit(part)

    def reclaim(self, slots: Iterable[SlotId]) -> None:
        """Reclaim each slot from the order of its account."""
        for order, part in self._parts(slots):
            order.reclaim(part)

    def spare(self, slots: Iterable[SlotId]) -> None:
        """Give each slot back to the order of its account."""
        for order, part in self._parts(slots):
            order.spare(part)

    def victims(self, count: int, coming: Sequence[SequenceHash] = ()) -> list[SlotId]:
        """Take `count` slots for nobody in particular: guarantees are broken last."""
        if count > len(self):
            return []
        chosen: list[SlotId] = []
        for protect in (True, False):
            for account in sorted(range(len(self.orders)), key=self._excess, reverse=True):
                order = self.orders[account]
                take = min(count - len(chosen), len(order))
                if protect and self._owners is not None:
                    above = self._owners.held(account) - self.guarantees[account]
                    take = min(take, max(above, 0))
                if take:
                    chosen += order.victims(take, coming)
        return chosen

    def forget(self, slots: Iterable[SlotId]) -> None:
        """Drop each slot from the order of its account."""
        for order, part in self._parts(slots):
            order.forget(part)

    def __len__(self) -> int:
        return sum(map(len, self.orders))

    def _excess(self, account: int) -> float:
        held = self._owners.held(account) if self._owners else 0
        weight = self.weights[account]
        if not held:
            return 0.0
        return held / weight if weight else inf

    def _parts(self, slots: Iterable[SlotId]) -> Iterator[tuple[RankedPolicy, list[SlotId]]]:
        """Yield each order concerned and its share of `slots`, in the order given."""
        owners = self._owners
        if owners is None or owners.table is None:
            account = 0 if owners is None else self.accounts[owners.sole]
            yield self.orders[account], list(slots)
            return
        table, accounts = owners.table, self.accounts
        parts: dict[int, list[SlotId]] = {}
        for slot in slots:
            parts.setdefault(accounts[table[slot]], []).append(slot)
        for account, part in parts.items():
            yield self.orders[account], part
