"""Every shipped store under the laws of the seam."""

from __future__ import annotations

import os

import pytest

from kvstrata.storage.arena import Arena
from kvstrata.storage.entry import encode_entry
from kvstrata.storage.slab import Slab
from kvstrata.testing.contracts.tier_store import TierStoreContract


class TestArena(TierStoreContract):
    @pytest.fixture
    def open_store(self):
        return Arena.create


class TestSlab(TierStoreContract):
    durable = True

    @pytest.fixture
    def open_store(self, tmp_path):
        return lambda capacity_bytes, layout: Slab.open(str(tmp_path), capacity_bytes, layout)

    @pytest.fixture
    def write_entry(self):
        def write(store, block):
            line = encode_entry(block, store.grid.block_bytes)
            os.pwrite(store.region.descriptor, line, store.entry_offset(block.slot))

        return write
