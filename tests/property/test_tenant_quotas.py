"""Quotas against a plain model: who may lose what to whom, also where chains cross tenants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import inf

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.policy import LruPolicy, TenantPolicy, make_policy
from kvstrata.pool import Pin, Pool
from kvstrata.pool.owners import Owners
from kvstrata.pool.shares import Shares, _Side
from kvstrata.testing.contracts.eviction_policy import EvictionPolicyContract
from kvstrata.testing.plants import assert_machine_fails

SLOTS = 9
GROUPS = [0, 1, 2, 0, 1]
"""Owners 0 and 3 have no guarantee; 1 and 4 are one tenant in two namespaces."""
PARENTS = {
    1: None,
    2: 1,
    3: 2,
    4: 3,
    5: 2,
    6: 5,
    7: None,
    8: 7,
    9: None,
    10: None,
    11: 10,
    12: None,
}
GUARANTEES = st.sampled_from([(3, 2), (4, 5), (9, 0), (1, 1), (0, 6), (2, 0)])
OWNERS = st.integers(0, len(GROUPS) - 1)
NUMBERS = st.sampled_from(sorted(PARENTS))


def key(number: int) -> SequenceHash:
    return SequenceHash(number.to_bytes(16, "big"))


def number_of(name: SequenceHash) -> int:
    return int.from_bytes(name, "big")


def path_to(number: int) -> list[int]:
    parent = PARENTS[number]
    return [*(path_to(parent) if parent else []), number]


class QuotaMachine(RuleBasedStateMachine):
    """Keeps who stored what and who holds what; the policy's order is not modelled."""

    filling = Bundle("filling")
    pinned = Bundle("pinned")

    @initialize(guarantees=GUARANTEES, name=st.sampled_from(["lru", "arc", "lru2", "2q", "s3fifo"]))
    def make(self, guarantees: tuple[int, int], name: str) -> None:
        self.guarantees = [0, *guarantees]
        self.weights = [SLOTS - sum(guarantees), *guarantees]
        self.pool = self.make_pool(TenantPolicy(lambda: make_policy(name), guarantees, GROUPS))
        self.owner: dict[int, int] = {}  # of each slot that is not free
        self.kept: dict[int, int] = {}  # number -> slot
        self.holds: Counter[int] = Counter()

    def make_pool(self, policy: TenantPolicy) -> Pool:
        return Pool(SLOTS, policy)

    # -- the model -----------------------------------------------------------------------------

    def held(self) -> list[int]:
        counts = Counter(GROUPS[owner] for owner in self.owner.values())
        return [counts[account] for account in range(3)]

    def account_of(self, number: int) -> int:
        return GROUPS[self.owner[self.kept[number]]]

    def idle(self) -> set[int]:
        return {number for number, slot in self.kept.items() if not self.holds[slot]}

    def below(self, number: int) -> set[int]:
        """Return the blocks that hang on `number`, itself included: links that all are here."""
        found = {number}
        for each in sorted(self.kept):  # children have higher numbers
            if PARENTS[each] in found:
                found.add(each)
        return found

    def surely_available(self, mine: int) -> int:
        """Free slots, and blocks that can go without anybody else's."""
        idle, held = self.idle(), self.held()
        found = SLOTS - len(self.owner)
        for account in range(3):
            alone = [
                number
                for number in idle
                if all(
                    each in idle and self.account_of(each) == account for each in self.below(number)
                )
            ]
            most = inf if account == mine else max(held[account] - self.guarantees[account], 0)
            found += int(min(len(alone), most))
        return found

    def check_eviction(self, evicted: Iterable[int], mine: int, count: int) -> None:
        before = self.held()
        bare = {number for number in self.idle() if self.below(number) == {number}}
        lost: Counter[int] = Counter()
        for number in evicted:
            assert not self.holds[self.kept[number]], f"{number} was pinned"
            assert self.below(number) == {number}, f"{number} left before {self.below(number)}"
            lost[self.account_of(number)] += 1
            del self.owner[self.kept.pop(number)]
        after = self.held()
        for account in range(3):
            if account != mine:
                floor = min(before[account], self.guarantees[account])
                assert after[account] >= floor, f"account {account} fell to {after[account]}"
        after[mine] += count
        for account in lost:
            ready = {self.account_of(number) for number in bare if number in self.kept}
            self.check_turn(account, ready, after, mine)

    def check_turn(self, giver: int, ready: set[int], after: list[int], mine: int) -> None:
        """When it gave its last block, nobody who was ready to give held more for its weight."""
        for account in ready - {giver}:
            if account == mine or after[account] > self.guarantees[account]:
                given = self.excess(giver, after[giver] + 1, mine)
                assert given >= self.excess(account, after[account], mine), f"not {giver}'s turn"

    def excess(self, account: int, held: int, mine: int) -> float:
        if account == mine and held <= self.guarantees[account]:
            return -1.0
        return held / self.weights[account] if self.weights[account] else inf

    # -- rules ---------------------------------------------------------------------------------

    @rule(target=filling, owner=OWNERS, count=st.integers(1, SLOTS))
    def reserve(self, owner: int, count: int):
        slots = self.take(owner, count)
        return multiple(*[(slot,) for slot in slots])

    def take(self, owner: int, count: int) -> list[SlotId]:
        before = self.pool.statistics(), self.pool.resident(), self.pool.owned()
        sure, mine = self.surely_available(GROUPS[owner]), GROUPS[owner]
        hoped = self.pool.available_to(owner)
        found = self.pool.reserve(count, (), owner)
        if found is None:
            assert (self.pool.statistics(), self.pool.resident(), self.pool.owned()) == before
            assert count > sure, f"refused {count} to {owner}, and {sure} can be had"
            return []
        assert count <= hoped, "more than was promised"
        self.check_eviction(map(number_of, found.evicted), mine, count)
        self.owner |= dict.fromkeys(found.slots, owner)
        return found.slots

    @rule(owner=OWNERS, number=NUMBERS)
    def store(self, owner: int, number: int) -> None:
        """Store a chain, as far as there is room: parts of it may be of other owners."""
        for each in path_to(number):
            if each in self.kept:
                continue
            slots = self.take(owner, 1)
            if not slots:
                return
            parent = PARENTS[each]
            self.pool.stage(slots)
            self.pool.register(slots, [key(each)], [key(parent) if parent else None])
            self.kept[each] = slots[0]

    @rule(slots=consumes(filling))
    def abort(self, slots: tuple[SlotId, ...]) -> None:
        self.pool.abort(slots)
        for slot in slots:
            del self.owner[slot]

    @rule(slots=consumes(filling), number=NUMBERS)
    def register(self, slots: tuple[SlotId, ...], number: int) -> None:
        parent = PARENTS[number]
        self.pool.stage(slots)
        if self.pool.register(slots, [key(number)], [key(parent) if parent else None]):
            self.kept[number] = slots[0]
        else:
            del self.owner[slots[0]]

    @rule(target=pinned, number=NUMBERS)
    def pin(self, number: int):
        pin = self.pool.pin(self.pool.match([key(each) for each in path_to(number)]))
        self.holds.update(pin.slots)
        return pin

    @rule(pin=consumes(pinned))
    def release(self, pin: Pin) -> None:
        pin.release()
        for slot in pin.slots:
            self.holds[slot] -= 1
            if not self.holds[slot] and slot not in self.kept.values():
                del self.owner[slot]

    @rule(number=NUMBERS)
    def withdraw(self, number: int) -> None:
        for slot in self.pool.withdraw([key(number)]):
            del self.kept[number]
            if not self.holds[slot]:
                del self.owner[slot]

    @rule(number=NUMBERS, priority=st.sampled_from([0, 35, 90]))
    def rank(self, number: int, priority: int) -> None:
        if number in self.kept:
            self.pool.rank([SlotId(self.kept[number])], priority)

    @invariant()
    def the_pool_agrees(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check()
            assert {number_of(name) for name in self.pool.resident()} == set(self.kept)
            assert self.pool.owned() == Counter(self.owner.values())
            for number, slot in self.kept.items():
                assert self.pool.owner_of(SlotId(slot)) == self.owner[slot], number


TestQuotas = QuotaMachine.TestCase
TestQuotas.settings = settings(stateful_step_count=40)


# -- planted bugs ------------------------------------------------------------------------------


class NoGuarantee(_Side):
    @property
    def may_give(self) -> bool:
        return bool(self.bared or len(self.order))


class GivesTooMuch(_Side):
    def may_give_until(self, excess: float) -> int:
        return super().may_give_until(excess) + 1


class ForgetsWhatComes(Shares):
    def evict(self, owner, count, reserved, coming, leaving=()):
        return super().evict(owner, count, reserved - reserved, coming, leaving)


class EvictsParents(Shares):
    def _choose(self, slot, side, sides, chosen) -> None:
        super()._choose(slot, side, sides, chosen)
        for other in sides:
            if other.aside:
                bared, _ = other.aside.popitem()
                other.bared.append(bared)


class NeverFree(Owners):
    def drop(self, slots) -> None:
        pass


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("kvstrata.pool.shares._Side", NoGuarantee),
        ("kvstrata.pool.shares._Side", GivesTooMuch),
        ("kvstrata.pool.pool.Shares", ForgetsWhatComes),
        ("kvstrata.pool.pool.Shares", EvictsParents),
        ("kvstrata.pool.pool.Owners", NeverFree),
    ],
)
def test_a_planted_bug_is_found(name: str, broken: type, monkeypatch) -> None:
    monkeypatch.setattr(name, broken)
    assert_machine_fails(QuotaMachine, steps=40)


# -- shares come and go ------------------------------------------------------------------------


class Tier:
    """A pool of 100 slots; each tenant fills it with blocks of its own."""

    def __init__(self, *guarantees: int) -> None:
        self.accounts = list(range(len(guarantees) + 1))
        policy = TenantPolicy(LruPolicy, guarantees, self.accounts)
        self.pool = Pool(100, policy)
        self.last = 0

    def store(self, owner: int, blocks: int) -> list[SlotId]:
        stored: list[SlotId] = []
        for _ in range(blocks):
            found = self.pool.reserve(1, (), owner)
            if found is None:
                break
            self.last += 1
            self.pool.stage(found.slots)
            stored += self.pool.register(found.slots, [key(self.last)], [None])
        self.pool.check()
        return stored


def test_what_is_left_idle_is_used_and_given_back() -> None:
    tier = Tier(30)
    assert len(tier.store(0, 150)) == 150
    assert tier.pool.owned() == {0: 100}  # nothing was kept free for the tenant that is away
    tier.store(1, 30)
    assert tier.pool.owned() == {0: 70, 1: 30}
    tier.store(0, 500)
    assert tier.pool.owned() == {0: 70, 1: 30}  # nobody evicts it below its guarantee


def test_a_tenant_alone_has_all_and_shares_as_others_come() -> None:
    tier = Tier(20, 40)
    tier.store(1, 100)
    assert tier.pool.owned() == {1: 100}
    tier.store(2, 300)
    held = tier.pool.owned()
    assert held[1] + held[2] == 100
    assert abs(held[1] - 100 / 3) <= 1  # one to two, as their guarantees
    tier.store(0, 300)
    assert tier.pool.owned() == {0: 40, 1: 20, 2: 40}


def test_what_is_pinned_cannot_be_had_and_what_is_not_can() -> None:
    tier = Tier(30)
    with tier.pool.pin(tier.store(0, 100)[:80]):
        assert len(tier.store(1, 30)) == 30  # of these, the first ten make room for the last
        assert tier.pool.owned() == {0: 80, 1: 20}
    assert tier.pool.available_to(1) == 100
    tier.store(1, 10)
    assert tier.pool.owned() == {0: 70, 1: 30}


def test_a_tenant_within_its_guarantee_gives_its_own_last() -> None:
    """Others hold less for their weight than it does, and they are not guaranteed anything."""
    tier = Tier(50, 30)
    with tier.pool.pin(tier.store(2, 60)):
        tier.store(0, 5)
        tier.store(1, 40)
        assert tier.pool.owned() == {1: 40, 2: 60}
    tier.store(0, 10)
    assert tier.pool.owned() == {0: 10, 1: 40, 2: 50}


def test_a_refusal_leaves_the_order_of_each_account() -> None:
    pool = Pool(5, policy := TenantPolicy(LruPolicy, [1, 2], [0, 1, 2]))
    for number, parent, owner in (
        (1, None, 2),
        (2, None, 2),
        (3, None, 2),
        (4, None, 1),
        (5, 4, 1),
    ):
        found = pool.reserve(1, (), owner)
        assert found is not None
        pool.stage(found.slots)
        pool.register(found.slots, [key(number)], [key(parent) if parent else None])
    orders = [order._default._order for order in policy.orders]  # type: ignore[attr-defined]
    with pool.pin(pool.match([key(5)])):
        before = [list(order) for order in orders]
        assert before == [[], pool.match([key(4)]), pool.match([key(1), key(2), key(3)])]
        assert pool.available_to(1) == 2  # 4, and one of the three
        assert pool.reserve(2, (), 1) is None  # but on 4 hangs 5
        assert [list(order) for order in orders] == before
        pool.check()


def test_all_guaranteed_leaves_nothing_to_others_once_it_is_used() -> None:
    tier = Tier(60, 40)
    tier.store(0, 50)
    tier.store(1, 60)
    tier.store(2, 40)
    assert tier.pool.owned() == {1: 60, 2: 40}
    assert tier.pool.available == 100
    assert tier.pool.available_to(0) == 0
    assert tier.store(0, 1) == []


class TestOneAccount(EvictionPolicyContract):
    @pytest.fixture
    def new_policy(self):
        return TenantPolicy(LruPolicy, [5, 5], [0])


class TestThreeAccounts(EvictionPolicyContract):
    """Every law but the fourth, which is about the order within one account."""

    @pytest.fixture
    def new_policy(self):
        policy = TenantPolicy(LruPolicy, [5, 5], [0, 1, 2])
        owners = Owners(20, lambda: 20, policy.accounts)
        owners.meet(1)
        for slot in range(20):
            owners.drop([SlotId(slot)])
            owners.take([SlotId(slot)], slot % 3)
        policy.bind_owners(owners)
        return policy

    def test_law_4_within_one_call_the_first_is_coldest(self, policy) -> None:
        policy.admit([SlotId(slot) for slot in (7, 1, 13)])
        assert policy.victims(3) == [7, 1, 13]


def test_slots_to_come_count_before_they_are_had() -> None:
    tier = Tier(50)
    tier.store(1, 50)
    tier.store(0, 50)
    found = tier.pool.reserve(20, (), 1)
    assert found is not None
    assert tier.pool.owned() == {0: 50, 1: 50}, "it made room for them among its own"
    tier.pool.abort(found.slots)
