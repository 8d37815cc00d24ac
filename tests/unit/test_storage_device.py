"""A slab on a whole block device: made only on a blank one, never over somebody's data."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from kvstrata.core.config import NodeConfig, parse_tiers
from kvstrata.core.errors import ConfigError, LayoutError
from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.runtime.daemon import check
from kvstrata.runtime.secret import load_secret
from kvstrata.storage.base import PAGE_BYTES, StoredBlock
from kvstrata.storage.entry import encode_entry
from kvstrata.storage.footing import check_place
from kvstrata.storage.slab import Slab

SIZE = 4 << 20
LAYOUT = BlockLayout((Dimension("byte", 6000),), "int8", 8, "test")
BLOCK = StoredBlock(SlotId(3), SequenceHash(b"k" * 16), None, b"s" * 16, 7)


@pytest.fixture
def device(loop_device):
    return loop_device(SIZE)


def content(device):
    return device.read_bytes()


def write(device, offset, data):
    descriptor = os.open(device, os.O_RDWR)
    os.pwrite(descriptor, data, offset)
    os.fsync(descriptor)
    os.close(descriptor)


def index(slab, block):
    line = encode_entry(block, slab.grid.block_bytes)
    os.pwrite(slab.region.descriptor, line, slab.entry_offset(block.slot))


def test_a_blank_device_becomes_a_slab_and_stays_one(device):
    slab = Slab.open(str(device), SIZE, LAYOUT)
    assert slab.path == device
    index(slab, BLOCK)
    slab.close()
    again = Slab.open(str(device), SIZE, LAYOUT)
    assert again.recover() == [BLOCK]
    again.close()


def test_lines_behind_a_wiped_front_are_not_found(device):
    large = BlockLayout((Dimension("byte", 1),), "int8", 8, "test")
    slab = Slab.open(str(device), SIZE, large)
    index(slab, BLOCK)
    slab.close()
    write(device, 0, bytes(PAGE_BYTES))
    lines = slab.entry_offset(BLOCK.slot)
    write(device, lines, bytes(128))
    write(device, (1 << 20) + 128, encode_entry(BLOCK, 6000))  # where no look at the front sees it
    fresh = Slab.open(str(device), SIZE, LAYOUT)
    assert fresh.recover() == []
    fresh.close()


@pytest.mark.parametrize("offset", [0, 1, 1024, 4096, 65536, (1 << 20) - 1])
def test_what_is_not_blank_is_refused_and_left(device, offset):
    write(device, offset, b"x")
    before = content(device)
    with pytest.raises(LayoutError, match="holds something that is not a kvstrata slab") as caught:
        Slab.open(str(device), SIZE, LAYOUT)
    assert f"dd if=/dev/zero of={device} bs=1M count=1" in caught.value.hint
    assert content(device) == before


def test_the_hint_works(device):
    write(device, 1024, b"a file system")
    with pytest.raises(LayoutError) as caught:
        Slab.open(str(device), SIZE, LAYOUT)
    command = caught.value.hint.split(": ")[1].split()
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    Slab.open(str(device), SIZE, LAYOUT).close()


def test_a_slab_of_another_layout_is_refused_and_left(device):
    slab = Slab.open(str(device), SIZE, LAYOUT)
    index(slab, BLOCK)
    slab.close()
    before = content(device)
    with pytest.raises(LayoutError, match="blocks of another layout"):
        Slab.open(str(device), SIZE, BlockLayout((Dimension("byte", 6000),), "int8", 4, "test"))
    with pytest.raises(ConfigError, match="slots, a size of"):
        Slab.open(str(device), SIZE // 2, LAYOUT)
    assert content(device) == before


def test_a_device_that_is_too_small(device):
    with pytest.raises(ConfigError, match=rf"has {SIZE} bytes, fewer than") as caught:
        Slab.open(str(device), 2 * SIZE, LAYOUT)
    assert caught.value.hint
    assert not any(content(device))


def test_a_second_opening_is_refused_while_the_first_lives(device):
    first = Slab.open(str(device), SIZE, LAYOUT)
    with pytest.raises(ConfigError, match="in use by another kvstrata daemon"):
        Slab.open(str(device), SIZE, LAYOUT)
    with pytest.raises(ConfigError, match="in use"):
        check_place(str(device))
    first.close()
    Slab.open(str(device), SIZE, LAYOUT).close()


def test_a_mounted_device_is_refused_and_left(device, tmp_path):
    where = tmp_path / "mounted"
    where.mkdir()
    try:
        subprocess.run(["mkfs.ext4", "-q", str(device)], check=True, capture_output=True)
        subprocess.run(["mount", str(device), str(where)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mounting here ({getattr(error, 'stderr', '') or error})")
    try:
        (where / "file").write_text("mine")
        for attempt in (lambda: Slab.open(str(device), SIZE, LAYOUT), lambda: check_place(device)):
            with pytest.raises(ConfigError, match=f"is mounted at '{where}'") as caught:
                attempt()
            assert caught.value.hint
        assert (where / "file").read_text() == "mine"
    finally:
        subprocess.run(["umount", str(where)], check=True, timeout=30)
    before = content(device)
    with pytest.raises(LayoutError, match="not a kvstrata slab"):
        Slab.open(str(device), SIZE, LAYOUT)  # unmounted, and still somebody's
    assert content(device) == before


def test_half_made_is_made_again(device):
    """A crash before the mark: the index is blank, the front too."""
    Slab.open(str(device), SIZE, LAYOUT).close()
    write(device, 0, bytes(PAGE_BYTES))
    slab = Slab.open(str(device), SIZE, LAYOUT)
    assert slab.recover() == []
    slab.close()


def test_a_device_has_no_place_for_the_secret(device, tmp_path):
    alone = NodeConfig(parse_tiers(f"host:1MiB,disk:{device}:4MiB"))
    with pytest.raises(ConfigError, match=r"secret_file: device .* holds no files") as caught:
        load_secret(alone)
    assert "head -c 32 /dev/urandom" in caught.value.hint
    both = NodeConfig(parse_tiers(f"host:1MiB,disk:{device}|{tmp_path}/d:4MiB"))
    assert load_secret(both) == (tmp_path / "d" / "secret").read_bytes()
    check(both)


def test_no_device_there_means_a_directory(tmp_path):
    place = tmp_path / "dev" / "nvme9n1"
    assert check_place(str(place)) == Path(place)
    assert place.is_dir()
