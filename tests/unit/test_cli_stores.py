"""`kvstrata ls`, `verify` and `gc` as processes: statuses, pipes, and a terminal's bar."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest

BLOCKS = 6
CAPACITY = 256 << 10
COMMAND = [sys.executable, "-m", "kvstrata.apps.cli.main"]


@pytest.fixture
def slab(disk_world, tmp_path):
    world = disk_world([tmp_path], CAPACITY)
    for number in range(1, BLOCKS + 1):
        world.store(number)
    world.node.close()
    return tmp_path / "blocks.slab"


def test_statuses_are_0_1_and_2(command, slab) -> None:
    done = command("verify", str(slab))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"slab {slab}: {BLOCKS} good\n"
    listed = [json.loads(line) for line in command("ls", str(slab), "--json").stdout.splitlines()]
    assert [each["type"] for each in listed] == ["block"] * BLOCKS + ["summary"]
    data = bytearray(slab.read_bytes())
    start = data.index((1).to_bytes(8, "big") * 750)
    data[start] ^= 1
    slab.write_bytes(data)
    done = command("verify", str(slab), "--json")
    assert done.returncode == 1
    *bad, summary = map(json.loads, done.stdout.splitlines())
    assert [each["key"] for each in bad] == [f"{1:032x}"]
    assert (summary["good"], summary["bad"]) == (BLOCKS - 1, 1)
    assert command("verify").returncode == 2
    assert command("verify", str(slab), "--no-such-option").returncode == 2
    assert command("gc", str(slab), "--size", "lots").returncode == 2
    assert command("gc", str(slab), "--size", "1MiB").returncode == 2


def test_a_reader_that_leaves_early_is_no_error(slab) -> None:
    with subprocess.Popen(
        [*COMMAND, "ls", str(slab)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.close()
        _, told = process.communicate(timeout=60)
    assert b"Traceback" not in told


@pytest.mark.parametrize(
    ("verb", "status", "lines", "last"),
    [
        ("verify", 1, 2, f"1 bad, {BLOCKS - 1} good\n"),
        ("ls", 0, BLOCKS + 4, f"{8192 * BLOCKS} bytes\n"),
        ("gc", 0, 1, "to reclaim\n"),
    ],
)
def test_a_terminal_sees_a_bar_and_stdout_has_every_line(slab, verb, status, lines, last) -> None:
    data = bytearray(slab.read_bytes())
    data[data.index((1).to_bytes(8, "big") * 750)] ^= 1
    slab.write_bytes(data)
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [*COMMAND, verb, str(slab)],
            stdout=subprocess.PIPE,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm"},
            timeout=60,
            check=False,
        )
        told = os.read(ours, 1 << 16)
    finally:
        os.close(ours)
        os.close(theirs)
    said = done.stdout.decode()
    assert done.returncode == status
    assert said.endswith(last)
    assert len(said.splitlines()) == lines
    assert "\x1b" not in said
    assert (b"gc" if verb == "gc" else f"{verb} slab".encode()) in told
