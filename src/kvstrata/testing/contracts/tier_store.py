"""The laws of `TierStore`; docs/contracts/tier-store.md says them in words."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest

from kvstrata.core.errors import ConfigError
from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.base import PAGE_BYTES, MemoryRegion, StoredBlock, TierStore

__all__ = ["StoreMaker", "TierStoreContract"]


class StoreMaker(Protocol):
    """Opens the store under test; the same place at each call."""

    def __call__(self, capacity_bytes: int, layout: BlockLayout) -> TierStore:
        """Return an open store of at most `capacity_bytes`."""


class TierStoreContract:
    """Subclass and provide `open_store`; a store that outlives `close` also sets `durable`.

    A durable store provides `write_entry` too, which puts a block's index line where the store
    keeps it, as the executor does.
    """

    durable = False
    """Whether what was written is found by the next store at the same place."""

    @pytest.fixture
    def open_store(self) -> StoreMaker:
        """Return the function that opens the store under test."""
        raise NotImplementedError("a contract suite is given its subject by a subclass")

    @pytest.fixture
    def write_entry(self) -> Callable[[TierStore, StoredBlock], None] | None:
        """Return how a block's index line is written, None where nothing is durable."""
        return None

    def layout(self, channels: int = 1000) -> BlockLayout:
        """Return a layout whose blocks do not fill whole pages."""
        return BlockLayout(
            (Dimension("layer", 3), Dimension("channel", channels)), "int8", 8, "test"
        )

    def test_law_1_slots_lie_in_pages_of_their_own(self, open_store: StoreMaker) -> None:
        """No two slots share a page, and the bookkeeping shares none with a slot."""
        store = open_store(1 << 20, self.layout())
        grid = store.grid
        assert grid.slots > 1
        assert grid.block_bytes == self.layout().block_bytes
        assert grid.stride_bytes % PAGE_BYTES == grid.base_bytes % PAGE_BYTES == 0
        assert grid.stride_bytes >= grid.block_bytes
        assert grid.base_bytes > 0
        store.close()

    def test_law_2_capacity_is_an_upper_bound(self, open_store: StoreMaker) -> None:
        """Bookkeeping included."""
        store = open_store(1 << 20, self.layout())
        assert store.grid.offset(store.grid.slots) <= 1 << 20
        store.close()

    def test_law_3_every_slot_holds_its_own_bytes(self, open_store: StoreMaker) -> None:
        """Filling each slot with its own pattern leaves every other one as it was."""
        store = open_store(1 << 18, self.layout())
        length = store.grid.block_bytes
        for slot in range(store.grid.slots):
            _write(store, slot, bytes([slot % 251]) * length)
        for slot in range(store.grid.slots):
            assert _read(store, slot) == bytes([slot % 251]) * length
        store.close()

    def test_law_4_a_fresh_store_recovers_nothing(self, open_store: StoreMaker) -> None:
        """Bytes that nobody wrote are nobody's block."""
        store = open_store(1 << 20, self.layout())
        assert list(store.recover()) == []
        store.close()

    def test_law_5_too_small_is_refused(self, open_store: StoreMaker) -> None:
        """With a sentence that names the field and a hint."""
        with pytest.raises(ConfigError) as caught:
            open_store(PAGE_BYTES, self.layout())
        assert caught.value.message.startswith("tiers.")
        assert caught.value.hint

    def test_law_6_closing_twice_is_harmless(self, open_store: StoreMaker) -> None:
        """And the place can be opened again."""
        store = open_store(1 << 20, self.layout())
        store.sync()
        store.close()
        store.close()
        open_store(1 << 20, self.layout()).close()

    def test_law_7_what_is_recovered_is_what_was_written(
        self,
        open_store: StoreMaker,
        write_entry: Callable[[TierStore, StoredBlock], None] | None,
    ) -> None:
        """Durable stores give back every block oldest first; others give back nothing."""
        blocks = [_block(slot) for slot in range(3)]
        store = open_store(1 << 20, self.layout())
        for block in reversed(blocks):
            _write(store, block.slot, bytes(store.grid.block_bytes))
            if write_entry is not None:
                write_entry(store, block)
        store.close()
        again = open_store(1 << 20, self.layout())
        assert list(again.recover()) == (blocks if self.durable else [])
        again.close()

    def test_law_8_blocks_of_another_layout_are_never_given_out(
        self,
        open_store: StoreMaker,
        write_entry: Callable[[TierStore, StoredBlock], None] | None,
    ) -> None:
        """A durable store refuses to open and keeps them; any other starts afresh."""
        store = open_store(1 << 20, self.layout())
        if write_entry is not None:
            write_entry(store, _block(0))
        store.close()
        other = self.layout(channels=1001)
        if self.durable:
            with pytest.raises(ConfigError) as caught:
                open_store(1 << 20, other)
            assert caught.value.hint
        else:
            fresh = open_store(1 << 20, other)
            assert list(fresh.recover()) == []
            fresh.close()
        again = open_store(1 << 20, self.layout())
        assert list(again.recover()) == ([_block(0)] if self.durable else [])
        again.close()

    def test_law_9_closing_gives_back_every_descriptor(self, open_store: StoreMaker) -> None:
        """After a refusal too: a daemon that restarts its stores must not run out of them."""
        open_store(1 << 20, self.layout()).close()
        before = _descriptors()
        open_store(1 << 20, self.layout()).close()
        with pytest.raises(ConfigError):
            open_store(PAGE_BYTES, self.layout())
        assert _descriptors() == before


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _block(slot: int) -> StoredBlock:
    key = SequenceHash(bytes([slot]) * 16)
    parent = SequenceHash(bytes([slot - 1]) * 16) if slot else None
    return StoredBlock(SlotId(slot), key, parent, bytes([100 + slot]) * 16, 1000 + slot)


def _write(store: TierStore, slot: int, data: bytes) -> None:
    region, start = store.region, store.grid.offset(slot)
    if isinstance(region, MemoryRegion):
        region.view[start : start + len(data)] = data
    else:
        for piece in region.pieces(start, len(data)):
            assert os.pwrite(piece.region.descriptor, data[: piece.length], piece.offset)
            data = data[piece.length :]
        assert not data, "the slot is not all there"


def _read(store: TierStore, slot: int) -> bytes:
    region, start, length = store.region, store.grid.offset(slot), store.grid.block_bytes
    if isinstance(region, MemoryRegion):
        return bytes(region.view[start : start + length])
    return b"".join(
        os.pread(piece.region.descriptor, piece.length, piece.offset)
        for piece in region.pieces(start, length)
    )
