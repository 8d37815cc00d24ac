"""Ours and the limit, as sides of the measurement: the same operations on the same chains.

A chain is a list of 16-byte keys, root first. Every operation takes a list of chains and returns
how many blocks it handled. `fresh` copies keys before the clock starts, because the keys of a
real request are new objects: no cached hash, not identical to the resident ones.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.policy import make_policy
from kvstrata.pool import Pool
from kvstrata.tokens import Namespace, NamespaceKey, lineage_digests, sequence_hashes
from kvstrata.tokens.namespace import salted_key

__all__ = ["BLOCK_TOKENS", "Chain", "Limit", "Ours", "Side", "Tokens"]

BLOCK_TOKENS = 64
"""Tokens in one block, for every side."""

Chain = list[bytes]
Tokens = list[int]


class Side(Protocol):
    """One implementation; each method is timed whole, `fresh` and `held` never."""

    def fresh(self, chains: Sequence[Chain]) -> list[Any]:
        """Return new key objects for `chains`, in this side's form."""

    def held(self, chains: Sequence[Chain]) -> list[Any]:
        """Return what `use` and `touch` take for these resident chains."""

    def prompts(self, prompts: Sequence[Tokens]) -> list[Any]:
        """Return what `hash` takes for these prompts."""

    def hash(self, prompts: list[Any]) -> int:
        """Turn tokens into cache keys."""

    def match(self, chains: list[Any]) -> int:
        """Find the longest resident prefix; returns the blocks found."""

    def use(self, held: list[Any]) -> int:
        """Hold each chain for a transfer and let it go."""

    def touch(self, held: list[Any]) -> int:
        """Make each chain the most recently used."""

    def store(self, chains: list[Any]) -> int:
        """Make room for each chain, evicting, and make it findable."""

    def serve(self, chains: list[Any]) -> int:
        """One request a chain: find its prefix, use it, store the rest; returns the blocks."""


class Ours:
    """`kvstrata.tokens` and `kvstrata.pool.Pool`."""

    def __init__(self, slots: int, policy: str = "lru") -> None:
        self.pool = Pool(slots, make_policy(policy))
        space = Namespace("bench", "0", "", "bfloat16", "1", BLOCK_TOKENS)
        self.key: NamespaceKey = salted_key(space.model_key(bytes(32)), "")

    def fresh(self, chains: Sequence[Chain]) -> list[list[SequenceHash]]:
        """Return copies of the keys."""
        return [[SequenceHash(bytes(bytearray(key))) for key in chain] for chain in chains]

    def held(self, chains: Sequence[Chain]) -> list[list[SlotId]]:
        """Return each chain's slots: a match has found them before a request pins them."""
        return [self.pool.match(chain) for chain in self.fresh(chains)]

    def prompts(self, prompts: Sequence[Tokens]) -> list[Tokens]:
        """Return lists of tokens, which is what an engine has."""
        return list(prompts)

    def hash(self, prompts: list[Tokens]) -> int:
        """Tokens -> lineage digests (chained SHA-256) -> sequence hashes (keyed BLAKE3)."""
        done = 0
        for tokens in prompts:
            done += len(sequence_hashes(self.key, lineage_digests(tokens, BLOCK_TOKENS)))
        return done

    def match(self, chains: list[list[SequenceHash]]) -> int:
        """`Pool.match`."""
        found = 0
        for chain in chains:
            found += len(self.pool.match(chain))
        return found

    def use(self, held: list[list[SlotId]]) -> int:
        """`Pool.pin` and `Pin.release`."""
        done = 0
        for slots in held:
            self.pool.pin(slots).release()
            done += len(slots)
        return done

    def touch(self, held: list[list[SlotId]]) -> int:
        """`Pool.touch`."""
        done = 0
        for slots in held:
            self.pool.touch(slots)
            done += len(slots)
        return done

    def store(self, chains: list[list[SequenceHash]]) -> int:
        """`Pool.reserve`, `Pool.stage`, `Pool.register`."""
        done = 0
        for chain in chains:
            done += self._store(chain, None)
        return done

    def serve(self, chains: list[list[SequenceHash]]) -> int:
        """Match, pin, release, then store what was not found."""
        done = 0
        for chain in chains:
            slots = self.pool.match(chain)
            known = len(slots)
            with self.pool.pin(slots):
                pass
            done += self._store(chain[known:], chain[known - 1] if known else None) + known
        return done

    def _store(self, chain: list[SequenceHash], parent: SequenceHash | None) -> int:
        if not chain:
            return 0
        room = self.pool.reserve(len(chain), chain)
        assert room is not None, "nothing is pinned, so there is room"
        self.pool.stage(room.slots)
        return len(self.pool.register(room.slots, chain, [parent, *chain[:-1]]))


class Limit:
    """The least that Python must do: one OrderedDict key -> slot; no pins, states or parents."""

    def __init__(self, slots: int) -> None:
        self.slot_of: OrderedDict[bytes, int] = OrderedDict()
        self.order: OrderedDict[int, None] = OrderedDict.fromkeys(range(slots))
        self.slots = slots

    def fresh(self, chains: Sequence[Chain]) -> list[Chain]:
        """Return copies of the keys."""
        return [[bytes(bytearray(key)) for key in chain] for chain in chains]

    def held(self, chains: Sequence[Chain]) -> list[list[int]]:
        """Return each chain's slots."""
        return [[self.slot_of[key] for key in chain] for chain in chains]

    def prompts(self, prompts: Sequence[Tokens]) -> list[list[bytes]]:
        """Return each block's tokens as bytes, ready to hash."""
        step = 4 * BLOCK_TOKENS
        rows = [np.asarray(tokens, "<u4").tobytes() for tokens in prompts]
        return [[row[at : at + step] for at in range(0, len(row), step)] for row in rows]

    def hash(self, prompts: list[list[bytes]]) -> int:
        """Chained SHA-256 of the prepared bytes, nothing else."""
        done = 0
        for blocks in prompts:
            last = b""
            for data in blocks:
                last = hashlib.sha256(last + data).digest()
            done += len(blocks)
        return done

    def match(self, chains: list[Chain]) -> int:
        """`list(map(dict.get, keys))`."""
        found = 0
        for chain in chains:
            slots = list(map(self.slot_of.get, chain))
            found += slots.index(None) if None in slots else len(slots)
        return found

    def use(self, held: list[list[int]]) -> int:
        """`OrderedDict.move_to_end` of the slot, once a block."""
        move, done = self.order.move_to_end, 0
        for slots in held:
            for slot in slots:
                move(slot)
            done += len(slots)
        return done

    touch = use

    def store(self, chains: list[Chain]) -> int:
        """`OrderedDict.popitem` and an insertion, once a block."""
        slot_of, done = self.slot_of, 0
        full = len(slot_of) == self.slots
        for chain in chains:
            for key in chain:
                slot_of[key] = slot_of.popitem(last=False)[1] if full else len(slot_of)
            done += len(chain)
        return done

    def serve(self, chains: list[Chain]) -> int:
        """Lookups, moves to the end, insertions."""
        slot_of, done = self.slot_of, 0
        for chain in chains:
            slots = list(map(slot_of.get, chain))
            known = slots.index(None) if None in slots else len(slots)
            for key in chain[:known]:
                slot_of.move_to_end(key)
            done += known + self.store([chain[known:]])
        return done
