"""Which idle blocks of a pool may leave: the policy proposes, and parents wait for their children.

Leaf-first: a block is never evicted while a resident block names it as parent. Blocks are given
to the policy deepest first, so a chain ages from its end and the rule almost never has to
intervene. Where it does (a parent colder than a child that came later), the parent is put back
as the hottest slot: it is at least as useful as the child that needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.policy import RankedPolicy, TenantPolicy

__all__ = ["PIECE", "Leaves"]

PIECE = 256
"""Blocks of a chain that are looked at at once."""


class Leaves:
    """Counts the children of a pool's blocks and takes victims; shares the pool's tables."""

    def __init__(
        self,
        policy: RankedPolicy | TenantPolicy,
        slot_of: dict[SequenceHash, SlotId],
        hashes: list[SequenceHash | None],
        parents: list[SequenceHash | None],
    ) -> None:
        """Watch the tables of a pool, which stay the same objects for its life."""
        self._policy, self._slot_of, self._hash, self._parent = policy, slot_of, hashes, parents
        self.children = [0] * len(hashes)
        """Resident blocks that name each slot's key as parent."""
        self.orphans: dict[SequenceHash, int] = {}
        """The same for parents that are not resident."""

    def take(self, count: int, coming: Sequence[SequenceHash]) -> list[SlotId] | None:
        """Take `count` idle leaves out of policy and parents' counts, or change nothing."""
        policy = self._policy
        taken: list[SlotId] = []
        chosen: list[SlotId] = []
        parents: dict[SlotId, None] = {}  # victims that a resident block hangs on
        while len(chosen) < count:
            before = len(chosen)
            # A parent that this batch bares must leave before a block of a higher priority does.
            wanted = 1 if policy.ranked and parents else count - before
            batch = policy.victims(wanted, coming) or policy.victims(len(policy))
            if not batch:
                break
            taken += batch
            self._choose(batch, chosen, parents)
            if policy.ranked and parents:
                above = [self._slot_of.get(self._parent[slot]) for slot in chosen[before:]]  # type: ignore[arg-type]
                self._choose_bared(dict.fromkeys(above), count, chosen, parents)
        if len(chosen) < count:  # nothing but parents is left
            self._choose_bared(parents, count, chosen, parents)
        if len(chosen) < count:
            for slot in chosen:
                self.add_parent_of(slot)
            self._return_victims(taken)
            return None
        policy.spare(parents)
        return chosen

    def add_parent_of(self, slot: SlotId) -> None:
        """Count `slot` again, which was taken and stays resident, as a child of its parent."""
        parent = self._parent[slot]
        if parent is not None:
            self.add_child(parent)

    def add_child(self, parent: SequenceHash) -> None:
        """Count a child more."""
        above = self._slot_of.get(parent)
        if above is not None:
            self.children[above] += 1
        else:
            self.orphans[parent] = self.orphans.get(parent, 0) + 1

    def drop_child(self, parent: SequenceHash) -> SlotId | None:
        """Count a child less; returns the parent's slot if it is resident."""
        above = self._slot_of.get(parent)
        if above is not None:
            self.children[above] -= 1
        elif left := self.orphans.pop(parent) - 1:
            self.orphans[parent] = left
        return above

    def _choose(
        self, batch: list[SlotId], chosen: list[SlotId], parents: dict[SlotId, None]
    ) -> None:
        """Sort victims into leaves, which are chosen, and slots that a resident block needs."""
        for first in range(0, len(batch), PIECE):
            piece = batch[first : first + PIECE]
            if self._is_chain_end(piece):  # parents too, for their children leave before them
                lowest = piece[-1]
                self.children[lowest : lowest + len(piece)] = [0] * len(piece)
                chosen += piece
                parent = self._parent[lowest]
                if parent is not None:
                    self.drop_child(parent)
            else:
                self._choose_each(piece, chosen, parents)

    def _is_chain_end(self, piece: list[SlotId]) -> bool:
        """Return whether these are the end of one chain, deepest first, in neighbouring slots."""
        count, lowest = len(piece), piece[-1]
        last = lowest + count - 1
        return (
            piece[0] == last
            and piece == list(range(last, lowest - 1, -1))
            and self.children[lowest : last + 1] == [1] * (count - 1) + [0]
            and self._parent[lowest + 1 : last + 1] == self._hash[lowest:last]
        )

    def _choose_each(
        self, batch: list[SlotId], chosen: list[SlotId], parents: dict[SlotId, None]
    ) -> None:
        slot_of, children, parent_of = self._slot_of, self.children, self._parent
        for slot in batch:
            if children[slot]:
                parents[slot] = None
                continue
            chosen.append(slot)
            parent = parent_of[slot]
            if parent is None:
                continue
            above = slot_of.get(parent)
            if above is not None:  # as _drop_child does, without a call for each block
                children[above] -= 1
            else:
                self.drop_child(parent)

    def _choose_bared(
        self,
        among: Iterable[SlotId | None],
        count: int,
        chosen: list[SlotId],
        parents: dict[SlotId, None],
    ) -> None:
        """Choose those of `parents`, from `among` them up, whose children have all been chosen."""
        children = self.children
        leaves = [slot for slot in among if slot in parents and not children[slot]]
        while leaves and len(chosen) < count:
            slot = leaves.pop()
            del parents[slot]
            chosen.append(slot)
            parent = self._parent[slot]
            if parent is not None:
                above = self.drop_child(parent)
                if above in parents and not self.children[above]:
                    leaves.append(above)

    def _return_victims(self, taken: list[SlotId]) -> None:
        rest = self._policy.victims(len(self._policy))
        self._policy.spare(taken + rest)  # the order of before: a refusal changes nothing
