"""`kvstrata bench tiers` as a process: what it prints and writes, and what it says is missing."""

from __future__ import annotations

import json
import os
import shutil

import pytest


def figures(command, tmp_path, *arguments, **variables):
    path = tmp_path / "out.json"
    done = command("bench", "tiers", "--quick", "--json", str(path), *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return done, json.loads(path.read_text())


def test_memory_and_recovery(command, tmp_path) -> None:
    done, found = figures(command, tmp_path, "--path", "memory", "--path", "recovery")
    assert [each["name"] for each in found["paths"]] == [
        "host copy, 1 thread",
        "host copy, 2 threads",
    ]
    for each in found["paths"]:
        assert each["block_bytes"] == 1 << 20
        assert each["ours"] > 0
        assert each["ratio"] == pytest.approx(each["ours"] / each["limit"], rel=0.01)
    assert found["recovery"]["blocks"] == 10_000
    assert found["recovery"]["seconds"] > 0
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert found["absent"] == []
    assert "host copy, 1 thread" in done.stdout
    assert "10,000 blocks recovered" in done.stdout
    assert "measuring: memory" in done.stderr


def test_without_fio_the_limit_is_named_and_the_remedy_told(command, tmp_path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    where = ["--path", "slab", "--directory", str(tmp_path)]
    done, found = figures(command, tmp_path, *where, PATH=str(empty))
    assert "apt-get install fio" in done.stderr
    assert found["machine"]["fio"] is None
    names = {each["name"] for each in found["paths"]}
    assert {"slab write", "slab read"} <= names
    assert {each["block_bytes"] >> 10 for each in found["paths"]} == {256, 1024, 4096}
    limits = {e["limit_tool"] for e in found["paths"] if e["name"] in {"slab write", "slab read"}}
    (tool,) = limits
    assert "no fio here" in tool
    assert [each.name for each in tmp_path.iterdir() if each.name not in {"bin", "out.json"}] == []


def test_fio_is_the_limit_where_it_is_installed(command, tmp_path) -> None:
    if shutil.which("fio") is None:
        pytest.skip("no fio here (apt-get install fio)")
    _, found = figures(command, tmp_path, "--path", "slab", "--directory", str(tmp_path))
    tools = {each["limit_tool"] for each in found["paths"] if each["name"] == "slab read"}
    assert all(tool.startswith("fio-") for tool in tools)


def test_objects_beside_the_bare_client(command, tmp_path, s3_url, s3_server) -> None:
    """The server is the one that was named; what was there stays, and nothing is added."""
    mine = s3_server.folder / "kvstrata-test" / "mine.txt"
    mine.write_text("mine")
    before = {path for path in s3_server.folder.rglob("*") if path.is_file()}
    _, found = figures(command, tmp_path, "--path", "object", "--object", s3_url)
    assert [each["name"] for each in found["paths"]] == [
        f"object {verb}, {count} at once" for count in (8, 32) for verb in ("put", "get")
    ]
    assert {path for path in s3_server.folder.rglob("*") if path.is_file()} == before


def test_refusals(command, tmp_path) -> None:
    for arguments, word in (
        (["--path", "gpu"], "known: memory, slab"),
        (["--json", str(tmp_path / "no" / "x.json")], "is no directory"),
    ):
        done = command("bench", "tiers", *arguments)
        assert done.returncode == 2
        assert word in done.stderr
