"""Every shipped store under the laws of the seam."""

from __future__ import annotations

import os

import pytest

from kvstrata.storage.arena import Arena
from kvstrata.storage.entry import encode_entry
from kvstrata.storage.slab import Slab
from kvstrata.storage.stripe import Stripe
from kvstrata.testing.contracts.tier_store import TierStoreContract


class TestArena(TierStoreContract):
    @pytest.fixture
    def open_store(self):
        return Arena.create


class TestSlab(TierStoreContract):
    """A file in a directory."""

    durable = True

    @pytest.fixture
    def open_store(self, tmp_path):
        return lambda capacity_bytes, layout: Slab.open(str(tmp_path), capacity_bytes, layout)

    @pytest.fixture
    def write_entry(self):
        def write(store, block):
            line = encode_entry(block, store.grid.block_bytes)
            (piece,) = store.region.pieces(store.entry_offset(block.slot), len(line))
            os.pwrite(piece.region.descriptor, line, piece.offset)

        return write


class TestSlabOnDevice(TestSlab):
    """A whole block device."""

    @pytest.fixture
    def open_store(self, loop_device):
        device = str(loop_device(1 << 20))
        return lambda capacity_bytes, layout: Slab.open(device, capacity_bytes, layout)


class TestStripe(TestSlab):
    """Three directories."""

    @pytest.fixture
    def open_store(self, tmp_path):
        places = [str(tmp_path / name) for name in "abc"]
        return lambda capacity_bytes, layout: Stripe.open(places, capacity_bytes, layout)


class TestStripeOfDevices(TestSlab):
    """A directory and two block devices."""

    @pytest.fixture
    def open_store(self, tmp_path, loop_device):
        places = [str(tmp_path), *(str(loop_device(1 << 20)) for _ in range(2))]
        return lambda capacity_bytes, layout: Stripe.open(places, capacity_bytes, layout)
