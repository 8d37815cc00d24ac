"""Blocks that a keyed tier has had before we knew of them: what their headers say of them.

A listing names keys only. Header by header the brain learns parents, for leaf-first eviction and
for `forget`, and owners; at the latest when a block is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstrata.core.ids import SequenceHash
from kvstrata.manager.state import BrainState, LowerTier
from kvstrata.storage.base import NOBODY
from kvstrata.transfer.base import Lineage

__all__ = ["Found", "adopt", "learn"]


@dataclass(frozen=True, slots=True)
class Found:
    """A block that a keyed tier lists."""

    key: SequenceHash
    """Its key."""
    lineage: Lineage | None = None
    """What its header says; None if it was not read."""


def adopt(
    state: BrainState, tier: LowerTier, found: Sequence[Found], *, evict: bool
) -> list[SequenceHash]:
    """Register `found`, none of which `tier` has, as far as there is room; return who left for it.

    Without `evict` only free slots are room.
    """
    taken = list({each.key: each for each in found}.values())
    room = len(taken) if evict else tier.pool.free
    state.counters.unadopted_blocks += len(taken[room:])
    return _enter(state, tier, taken[:room])


def learn(
    state: BrainState,
    tier: LowerTier,
    keys: Sequence[SequenceHash],
    lineage: Sequence[Lineage | None],
) -> None:
    """Take note of what was read of `keys`, where `tier` did not know it and nobody uses them."""
    pool = tier.pool
    new = []
    for key, said in zip(keys, lineage, strict=False):
        slot = pool.scan([key])[0]
        if slot is None or said is None or pool.is_pinned(slot):
            continue
        nobodys = pool.owner_of(slot) == 0 and said.owner != NOBODY
        if pool.parent_of(slot) is None and (said.parent is not None or nobodys):
            new.append(Found(key, said))
    pool.withdraw([each.key for each in new])
    state.changes.note(tier.name, [each.key for each in new], stored=False)
    before = state.counters.adopted_blocks
    _enter(state, tier, new)
    state.counters.adopted_blocks = before


def _enter(state: BrainState, tier: LowerTier, found: Sequence[Found]) -> list[SequenceHash]:
    recall = state.tenants.recall
    evicted: list[SequenceHash] = []
    for each in found:
        said = each.lineage
        reserved = tier.pool.reserve(1, [each.key], recall(said.owner) if said else 0)
        if reserved is None:  # all slots are held, or guaranteed to others
            state.counters.unadopted_blocks += 1
            continue
        evicted += reserved.evicted
        tier.pool.stage(reserved.slots)
        tier.pool.register(reserved.slots, [each.key], [said.parent if said else None])
        state.arrived([each.key], tier.name)
        state.counters.adopted_blocks += 1
    return evicted
