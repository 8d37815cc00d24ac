"""Blocks of whole sequences, between the tensors of a cache and the daemon's arena.

Owner: the thread that runs the model. Every wait is bounded; whatever fails is counted and is a
miss, or a block not stored: no error leaves this module once the session was opened.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import torch

from kvstrata.connectors.transformers.blocks import ArenaBlocks
from kvstrata.core.errors import KvstrataError
from kvstrata.core.ids import SequenceHash
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.runtime import messages as wire
from kvstrata.runtime.session import Session
from kvstrata.storage.arena import Arena
from kvstrata.tokens import lineage_digests, sequence_hashes
from kvstrata.tokens.family import Family

__all__ = ["CacheStatistics", "Geometry", "Layers", "Prefixes"]

log = logging.getLogger("kvstrata.transformers")

Layers: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]
"""K and V of each layer, `[rows, heads, tokens, channels]`."""

_POLL_S: Final = 0.001


@dataclass(frozen=True, slots=True)
class Geometry:
    """The KV of one token of a model."""

    heads: int
    """KV heads."""
    channels: int
    """Channels of K, and of V, in one head."""
    dtype: torch.dtype
    """Element type."""
    devices: tuple[torch.device, ...]
    """Where each layer's KV lies; as many as there are layers."""

    def block_layout(self, block_tokens: int) -> BlockLayout:
        """Return the layout in which blocks of this model are stored."""
        return BlockLayout(
            (
                Dimension("layer", len(self.devices)),
                Dimension("kv", 2),
                Dimension("head", self.heads),
                Dimension("token", block_tokens),
                Dimension("channel", self.channels),
            ),
            str(self.dtype).removeprefix("torch."),
            block_tokens,
            writer="transformers-dynamic",
        )


@dataclass(slots=True)
class CacheStatistics:
    """What was loaded, stored and left out, since the cache was made."""

    prompts: int = 0
    """Prompts that were looked for."""
    prompt_tokens: int = 0
    """Their tokens."""
    loaded_tokens: int = 0
    """Tokens that were loaded and not computed."""
    stored_blocks: int = 0
    """Blocks handed over that were not kept before."""
    throttled_blocks: int = 0
    """Blocks not stored because no slot was free."""
    late_loads: int = 0
    """Prompts whose blocks did not come in time; what was there was used."""
    lost_blocks: int = 0
    """Blocks whose slot was given to others while we read it; computed."""
    failed_calls: int = 0
    """Calls that the daemon did not answer, or refused; computed, or not stored."""
    unserved: dict[str, int] = field(default_factory=dict)
    """Calls of `generate` without the cache, by reason."""
    unkept: dict[str, int] = field(default_factory=dict)
    """Sequences of which nothing was stored, by reason."""


class Prefixes:
    """Loads and stores prefixes of token rows over an opened session."""

    def __init__(self, session: Session, geometry: Geometry, *, timeout_s: float) -> None:
        """Wait at most `timeout_s` for the blocks of one prompt to come from below the host."""
        self.session = session
        self.statistics = CacheStatistics()
        self.prefill_tokens_per_s = 0.0
        self._geometry = geometry
        self._block_tokens = session.layout.block_tokens
        self._timeout_s = timeout_s
        self._names = map(str, itertools.count(1))
        self._epoch = 0
        self._arena: Arena | None = None
        self._blocks: ArenaBlocks | None = None

    def load(self, rows: Sequence[Sequence[int]], *, salt: str, tenant: str) -> tuple[int, Layers]:
        """Return how many leading tokens are kept of each of these equally long rows, and their KV.

        The last token of a row is never among them: a model must compute something.
        """
        self.statistics.prompts += len(rows)
        self.statistics.prompt_tokens += sum(map(len, rows))
        names = [next(self._names) for _ in rows]
        try:
            if not self._attach():
                return 0, []
            hashes = [self._hashes(row[:-1], salt, tenant) for row in rows]
            if not all(hashes):
                return 0, []  # not one full block
            try:
                return self._load(names, hashes)
            finally:
                if self.session.welcome is not None:
                    self.session.release(names)
        except KvstrataError as error:
            self._note(error)
            return 0, []

    def store(
        self, rows: Sequence[Sequence[int]], layers: Layers, *, salt: str, tenant: str
    ) -> int:
        """Store the full blocks of each row that are not kept yet; return how many were new."""
        stored = 0
        try:
            for number, row in enumerate(rows):
                if not self._attach():
                    self.statistics.failed_calls += 1
                    break
                alone = [(k[number], v[number]) for k, v in layers]
                stored += self._store(row, alone, salt, tenant)
        except KvstrataError as error:
            self._note(error)
        self.statistics.stored_blocks += stored
        return stored

    def forget(self, row: Sequence[int], *, salt: str, tenant: str) -> None:
        """Forget the last full block of a row, and what was stored behind it."""
        try:
            if self._attach() and (hashes := self._hashes(row, salt, tenant)):
                self.session.call(wire.Forget(hashes[-1]), wire.Cleared)
        except KvstrataError as error:
            self._note(error)

    def close(self) -> None:
        """Unmap the arena and leave the daemon; twice is harmless."""
        self._detach()
        self.session.close()

    # -- private -------------------------------------------------------------------------------

    def _load(
        self, names: Sequence[str], hashes: Sequence[Sequence[SequenceHash]]
    ) -> tuple[int, Layers]:
        deadline = time.monotonic() + self._timeout_s
        ready = min(
            self._wait_ready(name, each, deadline) for name, each in zip(names, hashes, strict=True)
        )
        if not ready:
            return 0, []
        held = [
            self.session.acquire(name, each[:ready])
            for name, each in zip(names, hashes, strict=True)
        ]
        blocks = min(len(each.slots) for each in held)
        if not blocks or self._arena is None:
            return 0, []
        slots = [each.slots[:blocks] for each in held]
        promised = [each.generations[:blocks] for each in held]
        before = self._intact(slots, promised)
        layers = self._copy_out(slots)
        # A slot may have been given to another block before or while we read it.
        intact = min(before, self._intact(slots, promised))
        self.statistics.lost_blocks += (blocks - intact) * len(names)
        tokens = intact * self._block_tokens
        self.statistics.loaded_tokens += tokens * len(names)
        if not tokens:
            return 0, []
        return tokens, [(k[:, :, :tokens], v[:, :, :tokens]) for k, v in layers]

    def _store(self, row: Sequence[int], layers: Layers, salt: str, tenant: str) -> int:
        hashes = self._hashes(row, salt, tenant)
        if not hashes:
            return 0
        name = next(self._names)
        # From the root each time: a block whose parent was evicted meanwhile could not be found.
        family = self._family(row, salt, tenant)
        reserved = self.session.reserve(name, None, hashes, (), tenant, family)
        self.statistics.throttled_blocks += reserved.throttled
        if not reserved.slots:
            return 0
        whole = False
        try:
            self._copy_in(reserved.slots, reserved.indices, layers)
            whole = True
        finally:
            tell = self.session.seal if whole else self.session.abort
            tell(name, reserved.slots)
        return len(reserved.slots)

    def _copy_out(self, slots: Sequence[Sequence[int]]) -> Layers:
        """Return `[rows, heads, tokens, channels]` of each layer, K and V."""
        assert self._blocks is not None
        geometry, count = self._geometry, len(slots[0])
        blocks, places = self._blocks.take([slot for row in slots for slot in row])
        shape = len(slots), geometry.heads, count, self._block_tokens, geometry.channels
        layers = []
        for number, device in enumerate(geometry.devices):
            pair = []
            for kv in range(2):
                whole = torch.empty(shape, dtype=geometry.dtype)
                for at, place in enumerate(places):
                    row, index = divmod(at, count)
                    whole[row, :, index] = blocks[place, number, kv]
                pair.append(whole.flatten(2, 3).to(device))
            layers.append((pair[0], pair[1]))
        return layers

    def _copy_in(self, slots: Sequence[int], indices: Sequence[int], layers: Layers) -> None:
        """Fill the slots from the tokens of the blocks `indices` of one row."""
        assert self._blocks is not None
        size = self._block_tokens
        blocks, places = self._blocks.room(slots)
        for number, pair in enumerate(layers):
            for kv, tensor in enumerate(pair):
                near = tensor.detach().cpu()
                for place, index in zip(places, indices, strict=True):
                    tokens = near[:, index * size : (index + 1) * size]
                    blocks[place, number, kv] = tokens
        self._blocks.give(blocks, slots)

    def _intact(self, slots: Sequence[Sequence[int]], promised: Sequence[Sequence[int]]) -> int:
        """Return how many leading blocks of every row have the generations that were promised."""
        assert self._arena is not None
        generations = self._arena.generations
        for index in range(len(slots[0])):
            for row, wanted in zip(slots, promised, strict=True):
                if generations[row[index]] != wanted[index]:
                    return index
        return len(slots[0])

    def _wait_ready(self, name: str, hashes: Sequence[SequenceHash], deadline: float) -> int:
        """Return how many leading blocks are in the host and held; wait no longer than told."""
        speed = self.prefill_tokens_per_s
        while True:
            found = self.session.lookup(name, hashes, prefill_tokens_per_s=speed)
            if not found.pending:
                return found.ready
            if time.monotonic() >= deadline:
                self.statistics.late_loads += 1
                return found.ready
            time.sleep(_POLL_S)

    def _hashes(self, tokens: Sequence[int], salt: str, tenant: str) -> list[SequenceHash]:
        welcome = self.session.welcome
        assert welcome is not None, "keys are made only while the session is up"
        try:
            digests = lineage_digests(tokens, self._block_tokens)
        except ValueError:  # an id that is no token: a place holder of some kind
            return []
        return sequence_hashes(welcome.namespace_key(salt, tenant), digests)

    def _family(self, tokens: Sequence[int], salt: str, tenant: str) -> Family | None:
        """Return the tags that explain, to those who ask later, where this prompt was stored."""
        welcome = self.session.welcome
        first = lineage_digests(tokens[: self._block_tokens], self._block_tokens)
        if welcome is None or not first:
            return None
        return welcome.family(first[0], salt, tenant)

    def _attach(self) -> bool:
        """Return whether the daemon can be asked; map its arena if it is a new one. Never waits."""
        if not self.session.usable():
            return False
        if self._epoch != self.session.epoch:
            self._detach()
            welcome = self.session.welcome
            assert welcome is not None, "a usable session has been welcomed"
            own, held = self.session.layout, welcome.layout
            self._arena = Arena.attach(welcome.arena, held)
            self._blocks = ArenaBlocks(self._arena, own, held, self._geometry.dtype)
            self._epoch = self.session.epoch
        return True

    def _detach(self) -> None:
        self._blocks = None
        self._epoch = 0
        if self._arena:
            self._arena.close()
            self._arena = None

    def _note(self, error: KvstrataError) -> None:
        self.statistics.failed_calls += 1
        log.debug("kvstrata goes on without the cache: %s", error)
