"""Eviction where tenants have guarantees: who gives up slots for whom.

A reservation by one account may take idle leaves

    of its own account          always
    of any other account        while that one holds more than its guarantee

and takes them from the account that holds most for its weight (`TenantPolicy`), each victim
counted, until there is enough. The slots that the reservation brings count for its account before
it has them; an account within its guarantee even then gives its own slots last. What nobody may be
made to give is a refusal.

Leaf-first holds across accounts too: a block on which another tenant's block hangs waits for that
one. What a protected block hangs on is therefore protected as well, whoever is charged for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.policy import RankedPolicy, TenantPolicy
from kvstrata.pool.owners import Owners

__all__ = ["Chains", "Shares"]


@dataclass(frozen=True, slots=True)
class Chains:
    """What a pool knows of who hangs on whom; live views."""

    children: Sequence[int]
    """How many resident blocks name each slot's key as parent."""
    parents: Sequence[SequenceHash | None]
    """Parent key of the block in each slot."""
    add_child: Callable[[SequenceHash], None]
    """Counts a child of a parent key more."""
    drop_child: Callable[[SequenceHash], SlotId | None]
    """Counts one less; returns the parent's slot if it is resident."""


@dataclass(slots=True)
class _Side:
    """One account during one eviction."""

    order: RankedPolicy
    held: int  # slots, those to come included
    guarantee: int
    weight: int
    own: bool  # it is the account that makes the reservation
    taken: list[SlotId] = field(default_factory=list)  # out of the order, in this order
    aside: dict[SlotId, None] = field(default_factory=dict)  # of these, what children hang on
    bared: list[SlotId] = field(default_factory=list)  # of these, whose children were all chosen

    @property
    def may_give(self) -> bool:
        return bool((self.own or self.held > self.guarantee) and (self.bared or len(self.order)))

    @property
    def excess(self) -> float:
        """What decides who gives first; the most gives."""
        if self.own and self.held <= self.guarantee:
            return -1.0
        return self.held / self.weight if self.weight else inf

    def may_give_until(self, excess: float) -> int:
        """Return how many slots it gives before somebody of `excess` is asked; at least 1."""
        if self.own and self.held <= self.guarantee:
            return max(self.held, 1)
        floor = self.guarantee
        if excess > 0 and self.weight:
            floor = max(floor, int(excess * self.weight))
        return max(self.held - floor, 1)


class Shares:
    """The pool's part that evicts for one account among several."""

    def __init__(
        self,
        policy: TenantPolicy,
        owners: Owners,
        chains: Chains,
    ) -> None:
        """Look at the pool's live views."""
        self._policy, self._owners, self._chains = policy, owners, chains

    def idle_for(self, owner: int) -> int:
        """Return how many idle slots a reservation by `owner` may hope for."""
        found = 0
        for side in self._sides(owner, 0):
            idle = len(side.order)
            found += idle if side.own else min(idle, max(side.held - side.guarantee, 0))
        return found

    def allowed(self, owner: int, slots: Sequence[SlotId], reserved: int) -> list[SlotId]:
        """Return those of `slots`, given up already, that a reservation by `owner` may take."""
        sides = self._sides(owner, reserved)
        found = []
        for slot in slots:
            side = sides[self._policy.account_of(slot)]
            if side.own or side.held > side.guarantee:
                side.held -= 1
                found.append(slot)
        return found

    def evict(
        self,
        owner: int,
        count: int,
        reserved: int,
        coming: Sequence[SequenceHash],
        leaving: Sequence[SlotId] = (),
    ) -> list[SlotId] | None:
        """Take `count` idle leaves out of the policy for `owner`, or change nothing.

        `reserved` slots are to be charged to it, free ones included; `coming` is as in
        `EvictionPolicy.victims`; `leaving` are slots that leave for it besides.
        """
        sides = self._sides(owner, reserved)
        for slot in leaving:
            sides[self._policy.account_of(slot)].held -= 1
        return self._take(sides, count, coming)

    def give_up(self, count: int) -> list[SlotId] | None:
        """Take `count` idle leaves out of the policy ahead of eviction, or change nothing.

        Whose slots they will be is not known yet: the accounts with most for their weight give.
        """
        sides = self._sides(0, 0)
        for side in sides:
            side.own = True
        return self._take(sides, count, ())

    def _take(
        self, sides: list[_Side], count: int, coming: Sequence[SequenceHash]
    ) -> list[SlotId] | None:
        chosen: list[SlotId] = []
        while len(chosen) < count:
            asked = sorted(
                (side for side in sides if side.may_give),
                key=lambda side: (side.excess, side.own),
                reverse=True,
            )
            if not asked:
                self._undo(sides, chosen)
                return None
            runner_up = asked[1].excess if len(asked) > 1 else 0.0
            wanted = min(count - len(chosen), asked[0].may_give_until(runner_up))
            self._ask(asked[0], wanted, sides, chosen, coming)
        for side in sides:
            side.order.spare([*side.aside, *side.bared])
        return chosen

    def _sides(self, owner: int, reserved: int) -> list[_Side]:
        policy, owners = self._policy, self._owners
        mine = policy.accounts[owner]
        return [
            _Side(
                order,
                owners.held(account) + (reserved if account == mine else 0),
                policy.guarantees[account],
                policy.weights[account],
                account == mine,
            )
            for account, order in enumerate(policy.orders)
        ]

    def _ask(
        self,
        side: _Side,
        wanted: int,
        sides: list[_Side],
        chosen: list[SlotId],
        coming: Sequence[SequenceHash],
    ) -> None:
        """Choose up to `wanted` leaves of one account, or put one of its blocks aside."""
        if side.bared:  # colder than all that is left of its account: it was offered before
            self._choose(side.bared.pop(0), side, sides, chosen)
            return
        if side.order.ranked and side.aside:
            wanted = 1  # a parent that this bares must leave before a block of a higher priority
        batch = side.order.victims(min(wanted, len(side.order)), coming if side.own else ())
        side.taken += batch
        for slot in batch:
            if self._chains.children[slot]:
                side.aside[slot] = None
            else:
                self._choose(slot, side, sides, chosen)

    def _choose(self, slot: SlotId, side: _Side, sides: list[_Side], chosen: list[SlotId]) -> None:
        chosen.append(slot)
        side.held -= 1
        parent = self._chains.parents[slot]
        above = None if parent is None else self._chains.drop_child(parent)
        if above is None or self._chains.children[above]:
            return
        theirs = sides[self._policy.account_of(above)]
        if above in theirs.aside:
            del theirs.aside[above]
            theirs.bared.append(above)

    def _undo(self, sides: list[_Side], chosen: list[SlotId]) -> None:
        """Put everything back in the order of before: a refusal changes nothing."""
        for parent in map(self._chains.parents.__getitem__, chosen):
            if parent is not None:
                self._chains.add_child(parent)
        for side in sides:
            if side.taken:
                rest = side.order.victims(len(side.order))
                side.order.spare(side.taken + rest)
