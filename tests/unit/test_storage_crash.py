"""A writer killed at hundreds of moments and at every point of its write path; what is left.

Each life goes on with the slab that the last one left. After each death the slab is opened and
every block that it names is read: it is the one that its key stands for, or its seal says that it
is not; and everything that was acknowledged and not overwritten since is there.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal

import pytest

from kvstrata.storage.seal import seal
from kvstrata.storage.stripe import open_slab
from kvstrata.testing.crash import LAYOUT, POINTS, Journal, Life, expected_payload, live

CAPACITY = 1 << 20
KILLS = 240


@pytest.fixture(scope="module")
def children():
    """Starts children quickly: forks of a process without threads that has loaded it all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kvstrata.testing.crash"])
    return context


def read(slab, slot):
    grid = slab.grid
    return b"".join(
        os.pread(piece.region.descriptor, piece.length, piece.offset)
        for piece in slab.region.pieces(grid.offset(slot), grid.block_bytes)
    )


class Witness:
    """Opens what a child left and compares it with what the child was told was durable."""

    def __init__(self, places, journal):
        self.places, self.journal = places, str(journal)
        self.acknowledged = self.found = self.torn = self.cleared = 0

    def look(self):
        kept, gone, lines = Journal.read(self.journal)
        slab = open_slab(self.places, CAPACITY, LAYOUT)
        try:
            blocks = slab.recover()
            assert gone.isdisjoint(block.key for block in blocks), "cleared blocks came back"
            self.cleared = len(gone)
            whole = {}
            for block in blocks:
                data = read(slab, block.slot)
                if seal(block.key + LAYOUT.fingerprint, data) != block.checksum:
                    self.torn += 1  # a miss, as the daemon would find
                    continue
                assert data == expected_payload(block.key), "whole by its seal, and another block"
                whole[block.slot] = block.key
            self.acknowledged += len(kept)
            self.found += sum(whole.get(slot) == key for slot, key in kept.items())
        finally:
            slab.close()
        return lines


def run_and_kill(children, life, after_s):
    child = children.Process(target=live, args=(life,))
    child.start()
    child.join(after_s)
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join(30)
    assert child.exitcode == -signal.SIGKILL, "it ended by itself"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("count", "kills"),
    [(1, KILLS // 2), (3, KILLS // 2), (0, KILLS // 6)],
    ids=["file", "stripe", "device"],
)
def test_killed_at_hundreds_of_moments(children, tmp_path, loop_device, count, kills):
    places = tuple(str(tmp_path / f"disk-{number}") for number in range(count))
    places = places or (str(loop_device(2 * CAPACITY)),)
    journal = tmp_path / "journal"
    witness = Witness(places, journal)
    luck = random.Random(count)
    lines = 0
    for seed in range(kills):
        life = Life(places, CAPACITY, str(journal), seed + 1000 * count, clears=bool(seed % 2))
        run_and_kill(children, life, 0.03 + luck.random() * 0.12)
        lines = witness.look()
    assert lines > 40 * kills, "the children hardly lived"
    assert witness.acknowledged > 20 * kills
    assert witness.cleared > 2 * kills
    assert witness.found >= 0.99 * witness.acknowledged, vars(witness)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_named_point(children, tmp_path, point):
    places = (str(tmp_path / "disk"),)
    journal = tmp_path / "journal"
    witness = Witness(places, journal)
    part = point.split(".")[0]
    passages = {"payload": (1, 2, 7, 40), "line": (1, 2, 7, 40), "floor": (1, 2, 3)}
    for passage in passages.get(part, (1,)):  # the others are passed once, by the maker
        life = Life(places, CAPACITY, str(journal), passage, point, passage, clears=True)
        child = children.Process(target=live, args=(life,))
        child.start()
        child.join(30)
        assert child.exitcode == -signal.SIGKILL, f"{point} was never passed"
        witness.look()
    assert witness.acknowledged > 0 or part not in {"payload", "line"}
    assert witness.found == witness.acknowledged, "a kill loses nothing that the kernel has"


def test_the_journal_says_what_may_be_expected(tmp_path):
    journal = Journal(str(tmp_path / "j"))
    for words in (
        ("durable", 1, "aa"),
        ("durable", 2, "bb"),
        ("begin", 1),
        ("clearing",),
        ("durable", 3, "cc"),
        ("durable", 4, "dd"),
        ("begin", 4),
        ("clearing",),
        ("cleared",),
        ("durable", 5, "ee"),
    ):
        journal.note(*words)
    journal.close()
    assert Journal.read(str(tmp_path / "j")) == (
        {5: b"\xee"},
        {b"\xaa", b"\xbb", b"\xcc", b"\xdd"},
        10,
    )
