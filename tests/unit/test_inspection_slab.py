"""`ls`, `verify` and `gc` of slabs, by the real command on slabs that a real node wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvstrata.core.ids import SequenceHash, SlotId
from kvstrata.storage.base import PAGE_BYTES, StoredBlock
from kvstrata.storage.entry import ENTRY_BYTES, decode_entry, encode_entry
from kvstrata.storage.footing import SLAB_NAME
from kvstrata.storage.superblock import FLOOR_OFFSET, decode_superblock, encode_floor

BLOCKS = 12
CAPACITY = 256 << 10
BLOCK_BYTES = 6000


def lines_of(done) -> list[dict]:
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def slab(disk_world, tmp_path) -> Path:
    """A closed slab of twelve blocks."""
    world = disk_world([tmp_path], CAPACITY)
    for number in range(BLOCKS):
        world.store(number)
    world.node.close()
    return tmp_path / SLAB_NAME


def superblock(path):
    return decode_superblock(path.read_bytes()[:PAGE_BYTES], str(path))


def entries(path) -> dict[int, StoredBlock]:
    """Return slot -> what its line says."""
    data, found = path.read_bytes(), {}
    for slot in range(superblock(path).slots):
        line = data[PAGE_BYTES + slot * ENTRY_BYTES :][:ENTRY_BYTES]
        if (entry := decode_entry(line, SlotId(slot), BLOCK_BYTES)) is not None:
            found[slot] = entry
    return found


def write_at(path, offset, data) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path, slot, byte=100) -> None:
    """Change one bit of a block."""
    offset = superblock(path).index_end + slot * superblock(path).stride_bytes + byte
    write_at(path, offset, bytes([path.read_bytes()[offset] ^ 1]))


def put_line(path, slot, entry) -> None:
    write_at(path, PAGE_BYTES + slot * ENTRY_BYTES, encode_entry(entry, BLOCK_BYTES))


def test_ls_names_every_block(command_here, slab) -> None:
    *blocks, summary = lines_of(command_here("ls", str(slab.parent), "--json"))
    assert {each["key"] for each in blocks} == {f"{number:032x}" for number in range(BLOCKS)}
    wanted = {str(slot): entry.written for slot, entry in entries(slab).items()}
    assert {each["place"]: each["written"] for each in blocks} == wanted
    assert {each["block_bytes"] for each in blocks} == {BLOCK_BYTES}
    assert summary["blocks"] == BLOCKS
    assert "6000" in summary["description"]
    text = command_here("ls", str(slab))
    assert f"{BLOCKS} blocks, " in text.stdout
    assert not text.stderr


def test_a_slab_in_use_is_listed_and_not_verified(command_here, disk_world, tmp_path) -> None:
    world = disk_world([tmp_path], CAPACITY)
    world.store(1)
    assert len(lines_of(command_here("ls", str(tmp_path), "--json"))) == 2
    for verb in ("verify", "gc"):
        done = command_here(verb, str(tmp_path))
        assert done.returncode == 2
        assert "in use by a kvstrata daemon" in done.stderr


def test_verify_of_a_whole_slab(command_here, slab) -> None:
    before = slab.read_bytes()
    done = command_here("verify", str(slab.parent), "--json")
    assert done.returncode == 0, done.stderr
    (summary,) = lines_of(done)
    assert (summary["good"], summary["bad"], summary["stale"]) == (BLOCKS, 0, 0)
    assert done.stderr == "", "no bar where nobody looks"
    assert slab.read_bytes() == before


def test_verify_finds_each_flipped_bit_and_changes_nothing(command_here, slab) -> None:
    first, second, third = sorted(entries(slab))[:3]
    flip(slab, first, 0)
    flip(slab, second, BLOCK_BYTES - 1)
    flip(slab, third, BLOCK_BYTES)  # behind the block: no seal covers it
    before = slab.read_bytes()
    done = command_here("verify", str(slab), "--json")
    assert done.returncode == 1
    *bad, summary = lines_of(done)
    assert [each["place"] for each in bad] == [str(first), str(second)]
    assert {each["reason"] for each in bad} == {"payload differs from its seal"}
    assert (summary["good"], summary["bad"]) == (BLOCKS - 2, 2)
    assert slab.read_bytes() == before
    text = command_here("verify", str(slab))
    assert text.returncode == 1
    assert f"bad: slab {slab} {first} " in text.stdout


def test_quarantine_blanks_the_bad_lines_only(command_here, slab, disk_world) -> None:
    found = entries(slab)
    damaged, torn = sorted(found)[:2]
    flip(slab, damaged)
    write_at(slab, PAGE_BYTES + torn * ENTRY_BYTES + 20, b"\xff\xff")
    done = command_here("verify", str(slab), "--quarantine", "--json")
    assert done.returncode == 1, "it was not clean"
    *bad, summary = lines_of(done)
    assert [each["reason"] for each in bad] == [
        "payload differs from its seal",
        "index line torn or damaged",
    ]
    assert summary["quarantined"] == 2
    assert entries(slab) == {s: e for s, e in found.items() if s not in {damaged, torn}}
    assert command_here("verify", str(slab)).returncode == 0
    world = disk_world([slab.parent], CAPACITY)
    assert sum(map(world.load, range(BLOCKS))) == BLOCKS - 2
    assert world.counters.corrupt_blocks == 0


def test_lines_that_no_daemon_believes_are_stale_and_not_bad(
    command_here, slab, disk_world
) -> None:
    found = entries(slab)
    kept, *_ = found.values()
    free = next(s for s in range(superblock(slab).slots) if s not in found)
    put_line(slab, free, kept._replace(slot=SlotId(free), written=kept.written - 1))  # evicted once
    (summary,) = lines_of(command_here("verify", str(slab), "--json"))
    assert (summary["good"], summary["bad"], summary["stale"]) == (BLOCKS, 0, 1)
    write_at(slab, FLOOR_OFFSET, encode_floor(max(each.written for each in found.values()) - 3))
    done = command_here("verify", str(slab), "--json")
    assert done.returncode == 0
    (summary,) = lines_of(done)
    assert (summary["good"], summary["stale"]) == (3, BLOCKS - 3 + 1)
    assert len(lines_of(command_here("ls", str(slab), "--json"))) == 3 + 1
    done = command_here("gc", str(slab), "--dry-run", "--json")
    assert lines_of(done)[0]["count"] == BLOCKS - 3 + 1
    assert len(entries(slab)) == BLOCKS + 1
    assert command_here("gc", str(slab)).returncode == 0
    assert len(entries(slab)) == 3
    world = disk_world([slab.parent], CAPACITY)
    assert sum(map(world.load, range(BLOCKS))) == 3


def test_a_newer_line_over_other_bytes_does_not_hide_behind_an_older_one(
    command_here, slab
) -> None:
    """Which of two lines counts is decided before bytes are looked at, as a daemon does."""
    found = entries(slab)
    *_, kept = found.values()  # the first one is all zeros, as a slot that was never written
    free = next(s for s in range(superblock(slab).slots) if s not in found)
    put_line(slab, free, kept._replace(slot=SlotId(free), written=10_000))
    *bad, summary = lines_of(command_here("verify", str(slab), "--json"))
    assert [each["place"] for each in bad] == [str(free)]
    assert (summary["good"], summary["stale"]) == (BLOCKS - 1, 1)


def test_a_torn_floor_is_told_and_gc_leaves_it_to_the_daemon(command_here, slab) -> None:
    write_at(slab, FLOOR_OFFSET, b"\x01\x02\x03")
    whole = slab.read_bytes()
    done = command_here("verify", str(slab), "--quarantine", "--json")
    assert done.returncode == 1
    assert "floor torn" in lines_of(done)[0]["reason"]
    assert slab.read_bytes() == whole
    write_at(slab, PAGE_BYTES + 20, b"\xff\xff")  # a torn line, which alone would go
    before = slab.read_bytes()
    for more in ([], ["--dry-run"]):
        assert "nothing to reclaim" in command_here("gc", str(slab), *more).stdout
    assert slab.read_bytes() == before


def test_a_stripe_is_verified_as_one(command_here, disk_world, tmp_path) -> None:
    places = [tmp_path / "a", tmp_path / "b"]
    world = disk_world(places, 2 * CAPACITY)
    for number in range(BLOCKS):
        world.store(number)
    world.node.close()
    stripe = "|".join(map(str, places))
    (summary,) = lines_of(command_here("verify", stripe, "--json"))
    assert summary["good"] == BLOCKS
    second = places[1] / SLAB_NAME
    slot = min(entries(second))
    flip(second, slot)
    *bad, _ = lines_of(command_here("verify", stripe, "--json", "--quarantine"))
    assert [each["place"] for each in bad] == [f"1:{slot}"]
    assert slot not in entries(second)
    done = command_here("verify", f"{places[0]}|{places[0]}")
    assert (done.returncode, "named twice" in done.stderr) == (2, True)


def test_gc_removes_slabs_that_nobody_finished(command_here, slab) -> None:
    gone = 4_000_000  # above the largest process id
    left = slab.with_name(f"{SLAB_NAME}.{gone}.new")
    left.write_bytes(slab.read_bytes()[:8192])
    foreign = slab.with_name(f"{SLAB_NAME}.{gone + 1}.new")
    foreign.write_bytes(b"somebody else's")
    fresh = slab.with_name(f"{SLAB_NAME}.{gone + 2}.new")
    fresh.write_bytes(bytes(4096))
    for each in (left, foreign):
        os.utime(each, (0, 0))
    assert "would reclaim 8192 bytes" in command_here("gc", str(slab.parent), "--dry-run").stdout
    assert left.exists()
    assert command_here("gc", str(slab.parent)).returncode == 0
    assert [left.exists(), foreign.exists(), fresh.exists()] == [False, True, True]


@pytest.mark.parametrize("verb", ["ls", "verify", "gc"])
def test_what_is_not_ours_is_refused(command_here, tmp_path, slab, verb) -> None:
    other = tmp_path / "notes.txt"
    other.write_bytes(b"mine" * 5000)
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = tmp_path / "damaged"
    damaged.write_bytes(slab.read_bytes())
    write_at(damaged, 30, b"\xff")
    for place, word in (
        (other, "is not a kvstrata slab"),
        (empty, "holds nothing of kvstrata's"),
        (tmp_path / "absent", "is not there"),
        (damaged, "is damaged"),
    ):
        done = command_here(verb, str(place))
        assert (done.returncode, done.stdout) == (2, "")
        assert word in done.stderr
        assert "hint: " in done.stderr
    assert other.read_bytes() == b"mine" * 5000


def test_many_lines_are_listed(command_here, tmp_path) -> None:
    from kvstrata.layout import BlockLayout, Dimension
    from kvstrata.storage.slab import Slab

    count = 200_000
    layout = BlockLayout((Dimension("byte", 64),), "int8", 8, "test")
    slab = Slab.open(str(tmp_path), count * (PAGE_BYTES + ENTRY_BYTES) + 3 * PAGE_BYTES, layout)
    lines = [
        encode_entry(
            StoredBlock(SlotId(s), SequenceHash(s.to_bytes(16, "big")), None, bytes(16), s + 1), 64
        )
        for s in range(count)
    ]
    os.pwrite(slab.region.descriptor, b"".join(lines), slab.entry_offset(0))
    slab.close()
    done = command_here("ls", str(tmp_path))
    assert f"{count} blocks, " in done.stdout


def test_after_an_orderly_end_evicted_blocks_are_no_fault(
    command_here, disk_world, tmp_path
) -> None:
    """Slots were given on many times; each line is over its own bytes, whoever it names."""
    world = disk_world([tmp_path], 64 << 10)
    slots = world.node.statistics()["tiers"]["disk"]["total"]
    for number in range(1, 4 * slots):
        world.store(number)
    world.node.close()
    done = command_here("verify", str(tmp_path), "--json")
    assert done.returncode == 0
    (summary,) = lines_of(done)
    assert summary["good"] == slots


def test_a_slot_that_was_being_given_on_when_the_daemon_was_killed_is_told(
    command_here, slab
) -> None:
    """New bytes, old line: nothing on disk tells it from damage, and --quarantine ends it."""
    slot, other, *_ = sorted(entries(slab))
    block = superblock(slab)
    start = block.index_end + other * block.stride_bytes
    new = slab.read_bytes()[start : start + BLOCK_BYTES]
    write_at(slab, block.index_end + slot * block.stride_bytes, new)
    done = command_here("verify", str(slab), "--quarantine", "--json")
    assert done.returncode == 1
    assert lines_of(done)[0]["place"] == str(slot)
    assert command_here("verify", str(slab)).returncode == 0


def test_a_block_device_is_a_place(command_here, disk_world, loop_device) -> None:
    device = loop_device(512 << 10)
    world = disk_world([device], CAPACITY)
    for number in range(1, 4):
        world.store(number)
    assert len(lines_of(command_here("ls", str(device), "--json"))) == 4, "listed beside its daemon"
    assert command_here("verify", str(device)).returncode == 2
    world.node.close()
    done = command_here("verify", str(device), "--json")
    assert (done.returncode, lines_of(done)[0]["good"]) == (0, 3)
