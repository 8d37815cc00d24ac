"""`ls`, `verify` and `gc` of shared directories and buckets that real daemons wrote."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.directory import DirectoryLimits, DirectoryStore
from kvstrata.storage.inspection import Verdict, open_place

BLOCKS = 12
SIZE = 4 << 20
BLOCK_BYTES = 3 * 5 * 4


def lines_of(done) -> list[dict]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def files(folder) -> list[Path]:
    return sorted(Path(folder).rglob("*.kv"))


def contents(folder) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture
def fill(connect, make_blocks):
    """Write twelve blocks through a daemon of its own, and let it end."""

    def write(where, *, codec="", dtype=np.float32, secret=None):
        more = {"secret_file": str(secret)} if secret else {}
        client = connect(tiers=f"host:128KiB,{where}{codec}", dtype=dtype, **more)
        tokens, blocks = make_blocks(1, BLOCKS)
        client.put(tokens, blocks.astype(dtype))
        client.wait_idle()
        client.close()

    return write


@pytest.fixture
def share(fill, tmp_path) -> Path:
    folder = tmp_path / "share"
    fill(f"shared:{folder}:{SIZE}")
    return folder


def test_ls_of_a_directory(command_here, share) -> None:
    *blocks, summary = lines_of(command_here("ls", str(share), "--json"))
    assert {each["place"] for each in blocks} == {
        str(path.relative_to(path.parents[2])) for path in files(share)
    }
    assert {each["key"] for each in blocks} == {path.stem for path in files(share)}
    assert {each["codec"] for each in blocks} == {"none"}
    assert {each["block_bytes"] for each in blocks} == {BLOCK_BYTES}
    assert len({each["namespace"] for each in blocks}) == 1
    assert blocks[0]["namespace"] != "0" * 16
    assert summary["blocks"] == BLOCKS
    (folder,) = {path.parents[2] for path in files(share)}
    (alone,) = command_here("ls", str(folder)).stdout.splitlines()[-1:]
    assert alone.startswith(f"{BLOCKS} blocks, ")


def test_verify_touches_nothing_and_finds_what_is_spoilt(command_here, share) -> None:
    for path in files(share):
        os.utime(path, (1e9, 1e9))  # a daemon that read them would say so
    assert command_here("verify", str(share)).returncode == 0
    assert {path.stat().st_mtime for path in files(share)} == {1e9}
    flipped, cut, swapped, foreign, header, *_ = files(share)
    good = flipped.read_bytes()
    flipped.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    cut.write_bytes(cut.read_bytes()[:-7])
    swapped.write_bytes(good)
    foreign.write_bytes(b"#!" + foreign.read_bytes()[2:])
    header.write_bytes(header.read_bytes()[:30] + b"\xff\xff" + header.read_bytes()[32:])
    before = contents(share)
    done = command_here("verify", str(share), "--json")
    assert done.returncode == 1
    *bad, summary = lines_of(done)
    assert {each["key"]: each["reason"] for each in bad} == {
        flipped.stem: "payload differs from its seal",
        cut.stem: "cut short",
        swapped.stem: "another block's key",
        foreign.stem: "not written by kvstrata",
        header.stem: "header damaged",
    }
    assert (summary["good"], summary["bad"]) == (BLOCKS - 5, 5)
    assert contents(share) == before
    assert command_here("verify", str(share), "--quarantine").returncode == 1
    assert len(files(share)) == BLOCKS - 5
    assert command_here("verify", str(share)).returncode == 0


def test_what_cannot_be_read_is_told_and_never_quarantined(command_here, share) -> None:
    victim = files(share)[0]
    victim.unlink()
    victim.symlink_to(victim)  # opening it fails, whoever asks
    done = command_here("verify", str(share), "--quarantine", "--json")
    assert done.returncode == 1
    *bad, summary = lines_of(done)
    assert [each["verdict"] for each in bad] == ["cannot be read"]
    assert (summary["cannot_be_read"], summary["quarantined"]) == (1, 0)
    assert victim.is_symlink()


@pytest.mark.parametrize("codec", [":zstd", ":aes", ":zstd+aes", ":fp8+zstd+aes"])
def test_blocks_that_are_encoded(command_here, fill, tmp_path, codec) -> None:
    secret, other = tmp_path / "s", tmp_path / "o"
    secret.write_bytes(os.urandom(32))
    other.write_bytes(os.urandom(32))
    share = tmp_path / "share"
    fill(f"shared:{share}:{SIZE}", codec=codec, secret=secret)
    (known,) = lines_of(command_here("verify", str(share), "--secret-file", str(secret), "--json"))
    assert (known["good"], known["not_checkable"]) == (BLOCKS, 0)
    for more in ([], ["--secret-file", str(other)]):
        done = command_here("verify", str(share), *more, "--json")
        assert done.returncode == 0
        (summary,) = lines_of(done)
        name = "not_checkable" if "aes" in codec else "good"
        assert summary[name] == BLOCKS
    victim = files(share)[3]
    victim.write_bytes(victim.read_bytes()[:-1])
    done = command_here("verify", str(share), "--json")  # lengths need no key
    assert (done.returncode, lines_of(done)[0]["reason"]) == (1, "cut short")


def test_gc_takes_litter_only_and_only_ours(command_here, share) -> None:
    block = files(share)[0]
    litter = block.with_name(f".{'a' * 32}.host-1-x-0.new")
    litter.write_bytes(block.read_bytes()[:500])
    empty = block.with_name(f".{'b' * 32}.host-1-x-0.new")
    empty.touch()
    foreign = block.with_name(f".{'c' * 32}.host-1-x-0.new")
    foreign.write_bytes(b"not ours")
    young = block.with_name(f".{'d' * 32}.host-1-x-0.new")
    young.touch()
    for each in (litter, empty, foreign):
        os.utime(each, (0, 0))
    before = contents(share)
    assert "would reclaim 500 bytes" in command_here("gc", str(share), "--dry-run").stdout
    assert contents(share) == before
    *gone, summary = lines_of(command_here("gc", str(share), "--json"))
    assert {each["name"] for each in gone} == {str(litter), str(empty)}
    assert summary["bytes"] == 500
    assert contents(share).keys() == before.keys() - {str(litter), str(empty)}


def test_gc_of_other_layouts(command_here, share, fill) -> None:
    fill(f"shared:{share}:{SIZE}", dtype=np.float16)
    first, second = sorted(each.name for each in share.iterdir() if each.is_dir())
    foreign = share / second / "ab" / "notes.txt"
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("mine")
    before = contents(share)
    done = command_here("gc", str(share), "--other-layouts", "0" * 32)
    assert (done.returncode, "no layout" in done.stderr) == (2, True)
    assert command_here("gc", str(share), "--other-layouts", "nonsense").returncode == 2
    done = command_here("gc", str(share), "--other-layouts", first, "--dry-run", "--json")
    assert [each["count"] for each in lines_of(done)] == [BLOCKS, BLOCKS]
    assert contents(share) == before
    assert command_here("gc", str(share), "--other-layouts", first).returncode == 0
    left = contents(share)
    assert {path for path in left if f"/{second}/" in path} == {
        str(foreign),
        str(share / second / "KVSTRATA"),
    }
    assert {path for path in before if f"/{first}/" in path} <= left.keys()
    foreign.unlink()
    assert command_here("gc", str(share), "--other-layouts", first).returncode == 0
    assert not (share / second).exists(), "nothing but our marker was left"


def test_gc_down_to_a_size_takes_the_longest_unused(command_here, share) -> None:
    for age, path in enumerate(files(share)):
        os.utime(path, (1e9 + 1000 * age, 1e9 + 1000 * age))
    names = [path.stem for path in files(share)]
    each = 2 * 4096  # a page of header, a page of payload
    half = str(BLOCKS // 2 * each)
    done = command_here("gc", str(share), "--size", half, "--dry-run", "--json")
    assert lines_of(done)[0]["count"] == BLOCKS // 2
    assert len(files(share)) == BLOCKS
    done = command_here("gc", str(share), "--size", half, "--json")
    assert lines_of(done)[0]["bytes"] == BLOCKS // 2 * each
    assert [path.stem for path in files(share)] == names[BLOCKS // 2 :]
    assert "nothing to reclaim" in command_here("gc", str(share), "--size", half).stdout


def test_verify_beside_a_daemon_that_writes_finds_nothing_bad(
    connect, make_blocks, tmp_path
) -> None:
    """Blocks are whole or not there: what appears, goes and comes again meanwhile is never bad."""
    share = tmp_path / "share"
    client = connect(tiers=f"host:256KiB,shared:{share}:{SIZE}")
    tokens, blocks = make_blocks(1, 4)
    client.put(tokens, blocks)
    client.wait_idle()
    stop = threading.Event()
    found: list[Verdict] = []

    def look() -> None:
        while not stop.is_set():
            with open_place(str(share)) as (store,):
                found.extend(each.verdict for each in store.verify())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for seed in range(2, 22):
            client.put(*make_blocks(seed, 16))
            client.wait_idle()
            if seed % 5 == 0:
                client.clear()
                client.wait_idle()
    finally:
        stop.set()
        thread.join(20)
    assert found.count(Verdict.GOOD) > 50, "it must have seen something"
    assert set(found) <= {Verdict.GOOD, Verdict.GONE}


def test_a_put_in_slow_motion_is_not_there_until_it_is_whole(tmp_path) -> None:
    """Stop a writer at each of its system calls: an unfinished file is never a block."""
    layout = BlockLayout((Dimension("byte", 64),), "int8", 8, "test")
    limits = DirectoryLimits(collect_interval_s=None)
    store = DirectoryStore.open(str(tmp_path), SIZE, layout, limits=limits)
    key = bytes(range(16))
    folder = tmp_path / layout.fingerprint.hex()
    middle = folder / key.hex()[:2] / key.hex()[2]
    middle.mkdir(parents=True)
    for length in (0, 100, 256, 4096, 4100):
        (middle / f".{key.hex()}.other-1-aa-0.new").write_bytes(b"KVSBLOCK".ljust(length)[:length])
        with open_place(str(tmp_path)) as (found,):
            assert list(found.blocks()) == list(found.verify()) == []
            assert found.notes() == []
    store.close()


# -- object stores ---------------------------------------------------------------------------------


@pytest.fixture
def bucket(s3_url, fill, tmp_path) -> str:
    secret = tmp_path / "cluster-secret"
    secret.write_bytes(os.urandom(32))
    fill(f"object:{s3_url}:{SIZE}", secret=secret)
    return s3_url


def objects_of(server, url) -> dict[str, Path]:
    prefix = url.partition("?")[0].removeprefix("s3://")
    return {path.name: path for path in (server.folder / prefix).rglob("*") if path.is_file()}


def test_ls_and_verify_of_a_bucket(command_here, bucket, s3_server) -> None:
    names = objects_of(s3_server, bucket)
    *blocks, summary = lines_of(command_here("ls", bucket, "--json"))
    assert {each["key"] for each in blocks} == names.keys() - {"KVSTRATA"}
    assert summary["kind"] == "object"
    assert {each["stored_bytes"] for each in blocks} == {256 + BLOCK_BYTES}
    (whole,) = lines_of(command_here("verify", bucket, "--json"))
    assert whole["good"] == BLOCKS
    one, other = sorted(names.keys() - {"KVSTRATA"})[:2]
    data = names[one].read_bytes()
    names[one].write_bytes(data[:-1] + bytes([data[-1] ^ 4]))
    names[other].write_bytes(data[:300])
    done = command_here("verify", bucket, "--quarantine", "--json")
    assert done.returncode == 1
    *bad, _ = lines_of(done)
    assert {each["key"] for each in bad} == {one, other}
    assert objects_of(s3_server, bucket).keys() == names.keys() - {one, other}
    assert command_here("verify", bucket).returncode == 0
    prefix, _, options = bucket.partition("?")
    alone = command_here("verify", f"{prefix}/{summary['layout']}?{options}", "--json")
    assert lines_of(alone)[0]["good"] == BLOCKS - 2


def test_gc_of_other_layouts_in_a_bucket(command_here, bucket, fill, s3_server, tmp_path) -> None:
    fill(f"object:{bucket}:{SIZE}", dtype=np.float16, secret=tmp_path / "cluster-secret")
    before = objects_of(s3_server, bucket).keys()
    layouts = [
        each["layout"]
        for each in lines_of(command_here("ls", bucket, "--json"))
        if each["type"] == "summary"
    ]
    assert len(layouts) == 2
    done = command_here("gc", bucket, "--other-layouts", layouts[0], "--dry-run", "--json")
    assert lines_of(done)[-1]["count"] == BLOCKS
    assert objects_of(s3_server, bucket).keys() == before
    assert command_here("gc", bucket, "--other-layouts", layouts[0]).returncode == 0
    (left,) = lines_of(command_here("ls", bucket, "--json"))[-1:]
    assert (left["layout"], left["blocks"]) == (layouts[0], BLOCKS)
    assert command_here("gc", bucket, "--size", "1MiB").returncode == 2


def test_a_bucket_that_cannot_be_read(command_here, bucket, s3_server) -> None:
    done = command_here("verify", bucket, AWS_SECRET_ACCESS_KEY="not-the-key")
    assert done.returncode == 2
    assert "credentials" in done.stderr
    assert "not-the-key" not in done.stderr
    assert s3_server.secret_key not in done.stderr
    assert command_here("ls", "s3://absent?endpoint=http://127.0.0.1:1").returncode == 2
    assert "unknown scheme" in command_here("ls", "ftp://x/y").stderr
