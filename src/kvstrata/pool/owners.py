"""Who occupies which slots of a tier: an owner a slot, counted by owner and by account.

An owner is a small number that the brain gives to one tenant in one namespace. Until a pool meets
a second owner there is no table: a node with one model and one tenant pays a comparison a call.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

from kvstrata.core.ids import SlotId

__all__ = ["Owners"]


class Owners:
    """Owned by one pool, which says what becomes occupied and what becomes free."""

    def __init__(
        self, slots_total: int, occupied: Callable[[], int], accounts: Sequence[int] | None
    ) -> None:
        """Know no owner yet; `occupied` counts the pool's slots that are not free.

        `accounts` is the live view owner -> account, None where nobody is guaranteed anything.
        """
        self.sole = 0
        self.table: array[int] | None = None
        self._slots_total, self._occupied, self._accounts = slots_total, occupied, accounts
        self._slots: Counter[int] = Counter()  # by owner; empty while there is no table
        self._account_slots: Counter[int] = Counter()

    def meet(self, owner: int) -> None:
        """Take note that `owner` is about to occupy slots."""
        if self.table is not None or owner == self.sole:
            return
        if self._occupied():
            self._spread()
        else:
            self.sole = owner

    def meet_all(self, owners: Collection[int]) -> None:
        """As `meet`, for several at once."""
        if self.table is None and len(owners) > 1:
            self._spread()
        for owner in owners:
            self.meet(owner)

    def take(self, slots: Sequence[SlotId], owner: int) -> None:
        """Charge `slots`, which are not free any more, to `owner`, whom `meet` has met."""
        table = self.table
        if table is None:
            return
        for slot in slots:
            table[slot] = owner
        self._slots[owner] += len(slots)
        if self._accounts is not None:
            self._account_slots[self._accounts[owner]] += len(slots)

    def drop(self, slots: Iterable[SlotId]) -> None:
        """Charge `slots`, which are about to be free, to nobody."""
        table = self.table
        if table is None:
            return
        for owner, count in Counter(map(table.__getitem__, slots)).items():
            self._slots[owner] -= count
            if not self._slots[owner]:
                del self._slots[owner]
            if self._accounts is not None:
                self._account_slots[self._accounts[owner]] -= count

    def of(self, slot: SlotId) -> int:
        """Return the owner of a slot that is not free."""
        return self.sole if self.table is None else self.table[slot]

    def counts(self) -> dict[int, int]:
        """Return how many slots each owner occupies, those with none left out."""
        if self.table is None:
            occupied = self._occupied()
            return {self.sole: occupied} if occupied else {}
        return dict(+self._slots)

    def held(self, account: int) -> int:
        """Return how many slots the owners of `account` occupy."""
        if self.table is not None:
            return self._account_slots[account]
        return self._occupied() if account == (self._accounts or [0])[self.sole] else 0

    def _spread(self) -> None:
        """Make the table; all that is occupied is the sole owner's."""
        self.table = array("H", [self.sole]) * self._slots_total
        occupied = self._occupied()
        self._slots[self.sole] = occupied
        if self._accounts is not None:
            self._account_slots[self._accounts[self.sole]] = occupied

    def check(self, occupied: Sequence[SlotId]) -> None:
        """Assert that the counts are those of the `occupied` slots; for tests."""
        assert self._occupied() == len(occupied), "occupied slots"
        if self.table is None:
            return
        slots = Counter(self.table[slot] for slot in occupied)
        assert slots == self._slots, f"owners have {slots}, counted were {self._slots}"
        if self._accounts is not None:
            accounts: Counter[int] = Counter()
            for owner, count in slots.items():
                accounts[self._accounts[owner]] += count
            assert +self._account_slots == accounts, "accounts"
