"""One tier's slots. Single truth: `_state` for what a slot is, `_slot_of` for what is findable.

Owner: the brain's one thread; there is no lock. Hot calls take whole sequences and keep to dict,
list and OrderedDict operations.

Leaf-first, which leaves.py sees to: no block is evicted while a resident block names it as parent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.policy import EvictionPolicy, RankedPolicy, TenantPolicy
from kvstrata.pool.ahead import Ahead
from kvstrata.pool.leaves import PIECE, Leaves
from kvstrata.pool.owners import Owners
from kvstrata.pool.pins import Pin
from kvstrata.pool.records import Generations, PoolStatistics, Reservation
from kvstrata.pool.shares import Chains, Shares
from kvstrata.pool.states import LEGAL_MOVES, SlotState

__all__ = ["Pool"]

# As plain ints, which the interpreter compares faster than members of an IntEnum.
_FREE, _FILLING, _STAGED = int(SlotState.FREE), int(SlotState.FILLING), int(SlotState.STAGED)

_REGISTERED, _QUARANTINED = int(SlotState.REGISTERED), int(SlotState.QUARANTINED)


class Pool:
    """Slots 0 to `slots_total - 1` of one tier."""

    def __init__(
        self,
        slots_total: int,
        policy: EvictionPolicy,
        generations: Generations | None = None,
    ) -> None:
        """Make a pool of free slots.

        `generations` has one counter a slot, raised each time the slot is given out for writing;
        a tier whose readers sit in other processes passes shared memory.
        """
        if slots_total < 1:
            raise ValueError(f"a pool needs at least 1 slot, not {slots_total}")
        self.slots_total = slots_total
        self.generations: Generations = [0] * slots_total if generations is None else generations
        shared = policy if isinstance(policy, TenantPolicy) else None
        self._policy = RankedPolicy(policy) if shared is None else shared
        self._state = bytearray(slots_total)
        self._free = [SlotId(slot) for slot in range(slots_total - 1, -1, -1)]
        self._hash: list[SequenceHash | None] = [None] * slots_total
        self._parent: list[SequenceHash | None] = [None] * slots_total
        self._pins = [0] * slots_total
        self._slot_of: dict[SequenceHash, SlotId] = {}
        self._leaves = Leaves(self._policy, self._slot_of, self._hash, self._parent)
        self._ahead = Ahead(self._pins)
        self._evictions = 0
        self._duplicates = 0
        self._policy.bind(slots_total, self._hash)
        self._owners = Owners(
            slots_total, self._occupied, None if shared is None else shared.accounts
        )
        self._shares: Shares | None = None
        if shared is not None:
            leaves = self._leaves
            shared.bind_owners(self._owners)
            chains = Chains(leaves.children, self._parent, leaves.add_child, leaves.drop_child)
            self._shares = Shares(shared, self._owners, chains)

    # -- finding -------------------------------------------------------------------------------

    def match(self, hashes: Sequence[SequenceHash]) -> list[SlotId]:
        """Return the slots of the longest resident prefix of `hashes`."""
        slot_of, names = self._slot_of, self._hash
        found: list[SlotId] = []
        hashes = hashes if isinstance(hashes, list) else list(hashes)
        while len(found) < len(hashes):
            place = len(found)
            first = slot_of.get(hashes[place])
            if first is None:  # an unknown prompt, however long, costs one lookup
                return found
            # A chain that was stored at once lies in rising slots: comparing neighbours, which
            # are neighbours in memory, is several times cheaper than finding each.
            piece = hashes[place : place + PIECE]
            last = first + len(piece) - 1
            if (
                last < self.slots_total
                and names[last] == piece[-1]
                and names[first : last + 1] == piece
            ):
                found += range(first, last + 1)  # type: ignore[arg-type]  # ints are what slots are
                continue
            slots = list(map(slot_of.get, piece))
            if None in slots:
                return found + slots[: slots.index(None)]  # type: ignore[operator]
            found += slots  # type: ignore[arg-type]  # no None is left
        return found

    def scan(self, hashes: Iterable[SequenceHash]) -> list[SlotId | None]:
        """Return the slot of each hash, or None where it is not resident."""
        keys = list(hashes)
        found: list[SlotId | None] = [*self.match(keys)]
        return found + list(map(self._slot_of.get, keys[len(found) :]))

    def __contains__(self, sequence_hash: object) -> bool:
        return sequence_hash in self._slot_of

    def resident(self) -> list[SequenceHash]:
        """Return every findable key; for tools and tests, it is as long as the pool."""
        return list(self._slot_of)

    def parents(self) -> dict[SequenceHash, SequenceHash | None]:
        """Return the parent key of every findable key; O(blocks)."""
        parent = self._parent
        return {key: parent[slot] for key, slot in self._slot_of.items()}

    def hash_of(self, slot: SlotId) -> SequenceHash | None:
        """Return the key registered in `slot`, or None."""
        return self._hash[slot]

    def parent_of(self, slot: SlotId) -> SequenceHash | None:
        """Return the key of the block before the one registered in `slot`, None at the root."""
        return self._parent[slot]

    @property
    def available(self) -> int:
        """Slots that a reservation may hope for: free ones and idle ones."""
        return len(self._free) + self._ahead.idle + len(self._policy)

    @property
    def free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    def is_pinned(self, slot: SlotId) -> bool:
        """Return whether somebody holds `slot`."""
        return self._pins[slot] > 0

    @property
    def ready_to_go(self) -> int:
        """Slots that a reservation takes before it asks the policy: free, or given up ahead."""
        return len(self._free) + self._ahead.idle

    def available_to(self, owner: int) -> int:
        """Slots that a reservation for `owner` may hope for, guarantees of others respected."""
        if self._shares is None:
            return self.available
        ahead = self._shares.allowed(owner, self._ahead.first(self._ahead.idle), 0)
        return len(self._free) + len(ahead) + self._shares.idle_for(owner)

    # -- owners --------------------------------------------------------------------------------

    def owner_of(self, slot: SlotId) -> int:
        """Return who is charged for a slot that is not free."""
        return self._owners.of(slot)

    def owned(self) -> dict[int, int]:
        """Return how many slots each owner occupies, pinned, filling and quarantined ones too."""
        return self._owners.counts()

    def keys_of(self, owners: Collection[int]) -> list[SequenceHash]:
        """Return the findable keys that are charged to `owners`; O(blocks)."""
        of = self._owners.of
        return [key for key, slot in self._slot_of.items() if of(slot) in owners]

    # -- pinning -------------------------------------------------------------------------------

    def pin(self, slots: Sequence[SlotId], *, used: bool = True) -> Pin:
        """Hold registered `slots`, root first, until the returned pin is released.

        With `used` false the policy does not count it as a use of them.
        """
        pins = self._pins
        idle = []
        for slot in slots:
            assert self._state[slot] == _REGISTERED, f"pin of {slot=} {self._state[slot]=}"
            if not pins[slot]:
                idle.append(slot)
            pins[slot] += 1
        if self._ahead:
            idle = self._ahead.pinned(idle)
            if used:
                self._bring_back(slots)
        self._policy.reclaim(idle)
        return Pin(slots, self._unpin if used else self._unpin_unused)

    def _bring_back(self, slots: Iterable[SlotId | None]) -> None:
        """Of `slots`, bring back those that were given up, and all that they hang on."""
        for slot in slots:
            while slot is not None and slot in self._ahead:
                if self._ahead.take_back(slot):
                    self._policy.admit([slot])
                self._leaves.add_parent_of(slot)
                slot = self._slot_of.get(self._parent[slot])  # type: ignore[arg-type]  # noqa: PLW2901

    def _unpin(self, slots: Sequence[SlotId]) -> None:
        idle = self._let_go(slots)
        if self._ahead:
            back, lent = self._ahead.unpinned(idle)
            idle = back + lent if back else lent
        self._policy.admit(idle)

    def _unpin_unused(self, slots: Sequence[SlotId]) -> None:
        idle = self._let_go(slots)
        if self._ahead:
            back, idle = self._ahead.unpinned(idle)
            self._policy.admit(back)
        self._policy.spare(idle)

    def _let_go(self, slots: Sequence[SlotId]) -> list[SlotId]:
        """Take one pin off each of `slots`; return those that are idle now, deepest first."""
        pins = self._pins
        idle = []
        for slot in reversed(slots):  # deepest first: a chain ages from its end
            pins[slot] -= 1
            assert pins[slot] >= 0, f"{slot=} released more often than pinned"
            if pins[slot]:
                continue
            if self._state[slot] == _REGISTERED:
                idle.append(slot)
            else:  # withdrawn while in use: this was its last reader
                self._free_now([slot])
        return idle

    def touch(self, slots: Sequence[SlotId]) -> None:
        """Make registered `slots`, root first, the most recently used."""
        self.pin(slots).release()

    @property
    def ranked(self) -> bool:
        """Whether any block was ever given a priority."""
        return self._policy.ranked

    def priority_of(self, slot: SlotId) -> int:
        """Return the priority last given to `slot`; a new block must be given its own."""
        return self._policy.priority_of(slot)

    def rank(self, slots: Iterable[SlotId], priority: int) -> None:
        """Give registered `slots` a priority: lower ones are evicted before higher ones."""
        policy, pins = self._policy, self._pins
        changed = [slot for slot in slots if policy.priority_of(slot) != priority]
        assert all(self._state[slot] == _REGISTERED for slot in changed), "rank of no block"
        idle = [slot for slot in changed if not pins[slot] and slot not in self._ahead]
        policy.reclaim(idle)
        policy.rank(changed, priority)
        policy.admit(idle)

    # -- writing -------------------------------------------------------------------------------

    def reserve(
        self, count: int, coming: Sequence[SequenceHash] = (), owner: int = 0
    ) -> Reservation | None:
        """Return `count` slots to fill, evicting if need be, or None and nothing changed.

        `coming` are the keys that the slots are for, root first, as far as known: some policies
        choose better for them. `owner` is charged for the slots until they are free again.
        """
        free, owners = self._free, self._owners
        evicted: list[SequenceHash] = []
        owners.meet(owner)
        if count > len(free):
            made_room = self._evict(count, coming[::-1], owner)
            if made_room is None:
                return None
            evicted = made_room
        slots = free[len(free) - count :]
        slots.reverse()  # a fresh pool hands out neighbours in rising order, which plans can merge
        del free[len(free) - count :]
        generations = self.generations
        for slot in slots:
            generations[slot] += 1
        self._move(slots, _FREE, _FILLING)
        owners.take(slots, owner)
        return Reservation(slots, evicted)

    def adopt(self, slots: Sequence[SlotId], owners: Sequence[int] = ()) -> None:
        """Take these free `slots` to staged: their tier kept the bytes over a restart.

        `owners` has one for each slot; without it they are owner 0's.
        """
        wanted = set(slots)
        assert len(wanted) == len(slots), "a slot was adopted twice"
        self._move(slots, _FREE, _FILLING)
        self._move(slots, _FILLING, _STAGED)
        charged: dict[int, list[SlotId]] = {}
        for slot, owner in zip(slots, owners or [0] * len(slots), strict=True):
            charged.setdefault(owner, []).append(slot)
        self._owners.meet_all(charged)
        self._free = [slot for slot in self._free if slot not in wanted]
        for owner, theirs in charged.items():
            self._owners.take(theirs, owner)

    def stage(self, slots: Sequence[SlotId]) -> None:
        """Declare the bytes of filling `slots` complete."""
        self._move(slots, _FILLING, _STAGED)

    def abort(self, slots: Sequence[SlotId]) -> None:
        """Give back filling or staged `slots` that nobody writes to any more."""
        for slot in slots:
            state = self._state[slot]
            assert state in {_FILLING, _STAGED}, f"abort of {slot=} {state=}"
            self._move([slot], state, _FREE)
        self._owners.drop(slots)
        self._free += slots

    def register(
        self,
        slots: Sequence[SlotId],
        hashes: Sequence[SequenceHash],
        parents: Sequence[SequenceHash | None],
    ) -> list[SlotId]:
        """Make staged `slots` findable under `hashes`, given root first.

        Returns the slots that were registered: where the key already has a slot, the second copy
        is dropped and its slot is free again.
        """
        if self._ahead:
            self._bring_back(map(self._slot_of.get, parents))  # type: ignore[arg-type]
        if self._enter_chain(slots, hashes, parents):
            self._policy.admit(reversed(slots))
            return list(slots)
        registered = []
        slot_of, state, hash_of, parent_of = self._slot_of, self._state, self._hash, self._parent
        children, orphans = self._leaves.children, self._leaves.orphans
        last_key: SequenceHash | None = None
        last_slot: SlotId | None = None
        for slot, key, parent in zip(slots, hashes, parents, strict=True):
            assert state[slot] == _STAGED, f"register of {slot=} {state[slot]=}"
            holder = slot_of.setdefault(key, slot)
            # In a chain the parent is the block before, which spares its lookup.
            above = last_slot if parent is last_key else slot_of.get(parent)  # type: ignore[arg-type]
            last_key, last_slot = key, holder
            if holder != slot:
                self._owners.drop([slot])
                state[slot] = _FREE
                self._free.append(slot)
                self._duplicates += 1
                continue
            state[slot] = _REGISTERED
            hash_of[slot] = key
            if orphans:
                children[slot] = orphans.pop(key, 0)
            if above is not None:
                parent_of[slot] = parent
                children[above] += 1
            elif parent is not None:
                parent_of[slot] = parent
                orphans[parent] = orphans.get(parent, 0) + 1
            registered.append(slot)
        self._policy.admit(reversed(registered))
        return registered

    def _enter_chain(
        self,
        slots: Sequence[SlotId],
        hashes: Sequence[SequenceHash],
        parents: Sequence[SequenceHash | None],
    ) -> bool:
        """Enter a chain of new blocks that lies in rising slots, all at once; or change nothing."""
        count, slot_of = len(slots), self._slot_of
        if (
            count <= 1
            or self._leaves.orphans
            or list(slots) != list(range(slots[0], slots[0] + count))
            or list(parents[1:]) != list(hashes[:-1])
        ):
            return False
        held = list(map(slot_of.setdefault, hashes, slots))
        if held != list(slots):  # some are here already
            for key, slot, holder in zip(hashes, slots, held, strict=True):
                if holder == slot:
                    del slot_of[key]
            return False
        self._move(slots, _STAGED, _REGISTERED)
        piece = slice(slots[0], slots[0] + count)
        self._hash[piece], self._parent[piece] = hashes, parents
        self._leaves.children[piece] = [1] * (count - 1) + [0]
        if parents[0] is not None:
            self._leaves.add_child(parents[0])
        return True

    # -- giving up -----------------------------------------------------------------------------

    def withdraw(self, hashes: Iterable[SequenceHash], *, quarantine: bool = False) -> list[SlotId]:
        """Make `hashes` unfindable and return the slots that held them.

        A slot in use is freed by its last release. With `quarantine` an idle slot is held back
        too, until `end_quarantine`.
        """
        slots = [slot for slot in map(self._slot_of.get, hashes) if slot is not None]
        pins = self._pins
        self._policy.forget(slots)
        for slot in slots:
            if self._ahead and self._ahead.remove(slot):
                self._leaves.add_parent_of(slot)
            self._unregister(slot)
            self._move([slot], _REGISTERED, _QUARANTINED)
            if quarantine:
                pins[slot] += 1  # the quarantine is one more holder: whoever leaves last frees
            elif not pins[slot]:
                self._free_now([slot])
        return slots

    def give_up_ahead(self, count: int) -> list[Pin]:
        """Pin up to `count` idle blocks that would be evicted next, each by itself, leaves first.

        They are the next ones whose slots are given out, once they are released; until then they
        can be found, and being used brings them back (ahead.py).
        """
        chosen: list[SlotId] = []
        count = min(count, len(self._policy))
        while count and not chosen:
            shares = self._shares
            chosen = (shares.give_up(count) if shares else self._leaves.take(count, ())) or []
            count //= 2
        for slot in chosen:
            self._pins[slot] += 1
        self._ahead.give_up(chosen)
        return [Pin([slot], self._unpin_unused) for slot in chosen]

    def quarantine_filling(self, slots: Sequence[SlotId]) -> None:
        """Hold back filling `slots` whose writer may still write, until `end_quarantine`."""
        self._move(slots, _FILLING, _QUARANTINED)
        for slot in slots:
            self._pins[slot] += 1

    def end_quarantine(self, slots: Sequence[SlotId]) -> None:
        """Free quarantined `slots`: whatever could still have touched them has ended."""
        for slot in slots:
            assert self._state[slot] == _QUARANTINED, f"{slot=} is not quarantined"
            self._pins[slot] -= 1
            if not self._pins[slot]:
                self._free_now([slot])

    def retire(self, slots: Iterable[SlotId]) -> list[SlotId]:
        """Take those of `slots` that are free out of use for good; return the others."""
        slots = list(slots)
        lost = [slot for slot in slots if self._state[slot] == _FREE]
        gone = set(lost)
        if lost:
            self._owners.meet(0)
            self._move(lost, _FREE, _FILLING)
            self._free = [slot for slot in self._free if slot not in gone]
            self._owners.take(lost, 0)
            self.quarantine_filling(lost)  # and nobody ends it
        return [slot for slot in slots if slot not in gone]

    # -- looking -------------------------------------------------------------------------------

    def statistics(self) -> PoolStatistics:
        """Return one consistent snapshot."""
        counts = Counter(self._state)
        idle = len(self._policy) + self._ahead.idle
        return PoolStatistics(
            total=self.slots_total,
            free=len(self._free),
            filling=counts[_FILLING],
            staged=counts[_STAGED],
            idle=idle,
            in_use=counts[_REGISTERED] - idle,
            quarantined=counts[_QUARANTINED],
            evictions=self._evictions,
            duplicates=self._duplicates,
        )

    def check(self) -> None:
        """Assert that every structure agrees with every other; for tests, O(slots)."""
        counts = Counter(self._state)
        assert len(self._free) == counts[_FREE] == len(set(self._free)), "free list"
        assert len(self._slot_of) == counts[_REGISTERED], "registry size"
        children: Counter[SequenceHash] = Counter()
        counted = Counter(self._leaves.orphans)
        idle = 0
        for key, slot in self._slot_of.items():
            assert self._state[slot] == _REGISTERED, f"{slot=} is findable and not registered"
            assert self._hash[slot] == key, f"{slot=} is registered under another key"
            parent = self._parent[slot]
            if parent is not None and slot not in self._ahead:
                children[parent] += 1
            counted[key] += self._leaves.children[slot]
            idle += not self._pins[slot]
        assert children == counted, "child counts"
        assert self._leaves.orphans.keys().isdisjoint(self._slot_of), "orphans of a resident parent"
        assert sum(self._leaves.children) == sum(counted.values()) - sum(
            self._leaves.orphans.values()
        ), "leaves"
        ahead = sum(not self._pins[slot] for slot in self._slot_of.values() if slot in self._ahead)
        assert self._ahead.idle == ahead, "count of blocks given up"
        assert len(self._policy) + ahead == idle, f"policy holds {len(self._policy)} of {idle} idle"
        self._owners.check([SlotId(slot) for slot, at in enumerate(self._state) if at != _FREE])
        for index, state in enumerate(self._state):
            held = self._pins[index] > 0
            legal = held if state == _QUARANTINED else (not held or state == _REGISTERED)
            assert legal, f"slot {index} in state {state} has {self._pins[index]} pins"

    # -- private -------------------------------------------------------------------------------

    def _move(self, slots: Sequence[SlotId], source: int, target: int) -> None:
        assert (source, target) in LEGAL_MOVES, f"{source} -> {target} is not a move"
        state, count = self._state, len(slots)
        if count > 1 and slots == list(range(slots[0], slots[0] + count)):
            piece = slice(slots[0], slots[0] + count)
            assert state.count(source, piece.start, piece.stop) == count, f"some are not {source}"
            state[piece] = bytes((target,)) * count
            return
        for slot in slots:
            assert state[slot] == source, f"{slot=} is {state[slot]}, not {source}"
            state[slot] = target

    def _free_now(self, slots: Sequence[SlotId]) -> None:
        self._move(slots, _QUARANTINED, _FREE)
        self._owners.drop(slots)
        self._free += slots

    def _unregister(self, slot: SlotId) -> None:
        key = self._hash[slot]
        assert key is not None, f"{slot=} has no key"
        del self._slot_of[key]
        self._hash[slot] = None
        if left := self._leaves.children[slot]:
            self._leaves.orphans[key] = left
            self._leaves.children[slot] = 0
        parent = self._parent[slot]
        if parent is not None:
            self._parent[slot] = None
            self._leaves.drop_child(parent)

    def _occupied(self) -> int:
        return self.slots_total - len(self._free)

    def _evict(
        self, count: int, coming: Sequence[SequenceHash], owner: int
    ) -> list[SequenceHash] | None:
        """Free idle leaves, coldest first, until `count` slots are free, or change nothing."""
        lacking = count - len(self._free)
        shares = None if self._owners.table is None else self._shares
        ahead: list[SlotId] = []
        if self._ahead:
            ahead = self._ahead.first(self._ahead.idle if shares else lacking)
            if shares:
                ahead = shares.allowed(owner, ahead, count)[:lacking]
        lacking -= len(ahead)
        chosen: list[SlotId] | None = []
        if lacking and shares:
            chosen = shares.evict(owner, lacking, count, coming, ahead)
        elif lacking:
            chosen = self._leaves.take(lacking, coming)
        if chosen is None:
            return None
        for slot in ahead:
            self._ahead.remove(slot)
        return self._forget(ahead + chosen)

    def _forget(self, slots: list[SlotId]) -> list[SequenceHash]:
        """Free idle leaves that already left the policy and their parents' counts."""
        slot_of, hashes, parents, state = self._slot_of, self._hash, self._parent, self._state
        keys = [key for key in map(hashes.__getitem__, slots) if key is not None]
        assert len(keys) == len(slots), "an evicted slot has no key"
        for key in keys:
            del slot_of[key]
        for slot in slots:
            hashes[slot] = parents[slot] = None
            state[slot] = _FREE
        self._owners.drop(slots)
        self._free += slots
        self._evictions += len(slots)
        return keys
