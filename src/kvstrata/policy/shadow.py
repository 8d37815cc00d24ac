"""A cache of keys alone: what another policy, or another size of the tier, would have hit.

Shadows see a sample of the keys and have the same fraction of the tier's slots, the method of
Waldspurger et al., "Efficient MRC Construction with SHARDS", FAST 2015. They run the very policies
that serve, so what they report is what a switch would bring.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.policy.base import EvictionPolicy

__all__ = ["Shadow", "sample_mask"]

SAMPLED_SLOTS_MIN = 512
_MASK_MAX = 255


def sample_mask(capacity: int, slots_min: int = SAMPLED_SLOTS_MIN) -> int:
    """Return the mask of a key's last byte that leaves `slots_min` slots of a tier of this size."""
    rate = 1
    while capacity // (2 * rate) >= slots_min and rate <= _MASK_MAX // 2 + 1:
        rate *= 2
    return min(rate - 1, _MASK_MAX)


class Shadow:
    """`policy` over `slots` places that hold a key each."""

    def __init__(self, policy: EvictionPolicy, slots: int) -> None:
        self.policy = policy
        self.uses = self.hits = 0
        self._keys: list[SequenceHash | None] = [None] * slots
        self._slot_of: dict[SequenceHash, SlotId] = {}
        self._free = [SlotId(slot) for slot in range(slots)]
        policy.bind(slots, self._keys)

    def use(self, keys: Iterable[SequenceHash]) -> int:
        """Use each of `keys`, coldest first, keeping those that are new; return the hits."""
        policy, slot_of, names = self.policy, self._slot_of, self._keys
        hits = uses = 0
        for key in keys:
            uses += 1
            slot = slot_of.get(key)
            if slot is not None:
                hits += 1
                policy.reclaim((slot,))
            else:
                slot = self._free.pop() if self._free else self._make_room(key)
                names[slot] = key
                slot_of[key] = slot
            policy.admit((slot,))
        self.uses += uses
        self.hits += hits
        return hits

    def _make_room(self, key: SequenceHash) -> SlotId:
        slot = self.policy.victims(1, (key,))[0]
        gone = self._keys[slot]
        assert gone is not None, f"{slot=} left without a key"
        del self._slot_of[gone]
        return slot
