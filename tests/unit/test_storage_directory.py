"""Blocks as files: published whole, shared by writers, bounded, and never what is not ours."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvstrata.core.errors import ChecksumError, ConfigError, LayoutError, TransferError
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.directory import DirectoryLimits, DirectoryStore
from kvstrata.storage.envelope import HEADER_BYTES
from kvstrata.storage.keyed import PutAnswer

LAYOUT = BlockLayout((Dimension("channel", 12_000),), "int8", 8, "test")
OTHER = BlockLayout((Dimension("channel", 6_000),), "int16", 8, "test")
QUIET = DirectoryLimits(collect_interval_s=None, look_interval_s=0.0)
TAKEN = 4 * 4096  # a header's page and 12,000 bytes
HEADER = bytes(HEADER_BYTES)


@pytest.fixture
def open_store(tmp_path):
    opened = []

    def make(capacity_bytes=1 << 30, layout=LAYOUT, limits=QUIET, **options):
        store = DirectoryStore.open(
            str(tmp_path / "share"), capacity_bytes, layout, limits=limits, **options
        )
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


def key(number):
    return random.Random(number).randbytes(16)


def payload(number, length=12_000):
    return memoryview(random.Random(100 + number).randbytes(length))


def read(store, number, length=12_000):
    header, into = bytearray(HEADER_BYTES), bytearray(length)
    found = store.get(key(number), memoryview(header), memoryview(into))
    return None if found is None else bytes(into[:found])


def put(store, number):
    return store.put(key(number), HEADER, payload(number))


def files(tmp_path, pattern="*.kv"):
    return sorted((tmp_path / "share").rglob(pattern))


def age(tmp_path, number, seconds):
    [path] = files(tmp_path, f"{key(number).hex()}.kv")
    then = time.time() - seconds
    os.utime(path, (then, then))


class TestFiles:
    def test_a_file_is_a_page_and_the_payload(self, open_store, tmp_path):
        header = random.Random(1).randbytes(HEADER_BYTES)
        open_store().put(key(1), header, payload(1))
        [path] = files(tmp_path)
        name = key(1).hex()
        assert path.relative_to(tmp_path / "share").as_posix() == (
            f"{LAYOUT.fingerprint.hex()}/{name[:2]}/{name[2]}/{name}.kv"
        )
        assert path.read_bytes() == header + bytes(4096 - HEADER_BYTES) + bytes(payload(1))
        assert path.stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("direct", [True, False])
    @pytest.mark.parametrize("length", [1, 4095, 4096, 4097, 12_000, 1 << 20])
    def test_aligned_memory_and_any_length(self, open_store, direct, length):
        store = open_store(direct=direct)
        source, target = mmap.mmap(-1, 1 << 21), mmap.mmap(-1, 1 << 21)
        source[:length] = random.Random(length).randbytes(length)
        header = random.Random(2).randbytes(HEADER_BYTES)
        store.put(key(1), header, memoryview(source)[:length])
        found = bytearray(HEADER_BYTES)
        assert store.get(key(1), memoryview(found), memoryview(target)) == length
        assert bytes(found) == header
        assert target[:length] == source[:length]

    def test_stale_bytes_of_the_page_are_not_written(self, open_store, tmp_path):
        store = open_store()
        put(store, 1)
        [path] = files(tmp_path)
        with path.open("r+b") as file:
            file.write(b"x" * 4096)
        read(store, 1)
        put(store, 2)
        [second] = files(tmp_path, f"{key(2).hex()}.kv")
        assert second.read_bytes()[:4096] == bytes(4096)

    @pytest.mark.parametrize("length", [0, 1, 255, 4095, 4096 + 12_001])
    def test_a_file_of_an_impossible_length_is_damage(self, open_store, tmp_path, length):
        store = open_store()
        put(store, 1)
        os.truncate(files(tmp_path)[0], length)
        with pytest.raises(ChecksumError):
            read(store, 1)

    @pytest.mark.parametrize("direct", [True, False])
    def test_a_little_too_long_is_damage_in_aligned_memory_too(self, open_store, direct):
        store = open_store(direct=direct)
        store.put(key(1), HEADER, payload(1, 4296))
        target = mmap.mmap(-1, 8192)
        with pytest.raises(ChecksumError):
            store.get(key(1), memoryview(bytearray(HEADER_BYTES)), memoryview(target)[:4196])

    def test_nothing_is_left_of_a_put_that_failed(self, open_store, tmp_path, monkeypatch):
        store = open_store()
        put(store, 1)
        for number, answer in ((errno.ENOSPC, PutAnswer.FULL), (errno.EDQUOT, PutAnswer.FULL)):
            monkeypatch.setattr(os, "pwritev", _failing(number))
            assert put(store, 2) is answer
        monkeypatch.setattr(os, "pwritev", _failing(errno.EIO))
        with pytest.raises(TransferError) as caught:
            put(store, 2)
        assert caught.value.retryable
        monkeypatch.setattr(os, "pwritev", _failing(errno.EROFS))
        with pytest.raises(TransferError) as caught:
            put(store, 2)
        assert not caught.value.retryable
        assert len(files(tmp_path)) == 1
        assert files(tmp_path, ".*.new") == []
        assert store.statistics().errors == 2

    def test_a_link_whose_answer_was_lost_is_ours(self, open_store, monkeypatch):
        store, link = open_store(), os.link

        def lossy(source, target):
            link(source, target)
            raise FileExistsError(errno.EEXIST, "as NFS says after a repeated request")

        monkeypatch.setattr(os, "link", lossy)
        assert put(store, 1) is PutAnswer.CREATED
        assert store.statistics().resolved == 1

    def test_a_stale_handle_is_a_miss(self, open_store, monkeypatch):
        store = open_store()
        put(store, 1)
        monkeypatch.setattr(os, "preadv", _failing(errno.ESTALE))
        assert read(store, 1) is None


def _failing(number):
    def fail(*_arguments):
        raise OSError(number, os.strerror(number))

    return fail


class TestRefusals:
    def test_another_layout_has_a_place_of_its_own(self, open_store):
        put(open_store(), 1)
        assert read(open_store(layout=OTHER), 1) is None

    def test_a_directory_that_we_did_not_write(self, open_store, tmp_path):
        place = tmp_path / "share" / LAYOUT.fingerprint.hex()
        place.mkdir(parents=True)
        (place / "thesis.tex").write_text("mine")
        with pytest.raises(LayoutError, match="KVSTRATA"):
            open_store()
        assert [each.name for each in place.iterdir()] == ["thesis.tex"]

    @pytest.mark.parametrize(
        ("spoil", "word"),
        [
            (lambda text: text.replace(b"version 1", b"version 2"), "another format"),
            (lambda text: text[:-3] + b"0f\n", "damaged"),
            (lambda text: text.replace(b"int8", b"int9"), "damaged"),
            (lambda _: b"", "not kvstrata's"),
            (lambda _: b"\xff" * 9000, "not kvstrata's"),
        ],
    )
    def test_a_marker_that_is_not_the_one(self, open_store, tmp_path, spoil, word):
        open_store()
        [marker] = (tmp_path / "share").rglob("KVSTRATA")
        marker.write_bytes(spoiled := spoil(marker.read_bytes()))
        with pytest.raises(LayoutError, match=word):
            open_store()
        assert marker.read_bytes() == spoiled

    def test_too_small(self, open_store):
        with pytest.raises(ConfigError, match=r"tiers\.directory") as caught:
            open_store(capacity_bytes=10_000)
        assert "KiB" in caught.value.hint

    def test_a_file_in_the_way(self, open_store, tmp_path):
        (tmp_path / "share").write_text("a file")
        with pytest.raises(ConfigError, match="cannot be used"):
            open_store()

    def test_foreign_files_are_counted_and_kept(self, open_store, tmp_path):
        store = open_store(capacity_bytes=20 * TAKEN)
        put(store, 1)
        [path] = files(tmp_path)
        aliens = [path.with_name("notes.txt"), path.with_name("0" * 32 + ".kv"),
                  path.parents[2] / "README", path.with_name(key(1).hex() + ".bak")]  # fmt: skip
        for alien in aliens:
            alien.write_bytes(b"x" * 100)
        assert [entry.key for entry in store.entries()] == [key(1)]
        assert store.statistics().foreign == 4
        for number in range(2, 40):
            put(store, number)
        store.collect()
        assert all(alien.exists() for alien in aliens)


class TestVanishing:
    def test_a_place_that_is_gone_is_misses_and_comes_back(self, open_store, tmp_path):
        store = open_store()
        put(store, 1)
        (tmp_path / "share").rename(tmp_path / "away")
        assert read(store, 1) is None
        assert store.exists([key(1)]) == [False]
        assert list(store.entries()) == []
        with pytest.raises(TransferError, match="gone") as caught:
            put(store, 2)
        assert caught.value.retryable
        assert not (tmp_path / "share").exists()
        assert store.statistics().vanished == 2
        (tmp_path / "away").rename(tmp_path / "share")
        assert read(store, 1) == bytes(payload(1))
        assert put(store, 2) is PutAnswer.CREATED

    def test_an_empty_mount_point_is_not_written_to(self, open_store, tmp_path):
        """An unmounted share shows the directory below it."""
        store = open_store()
        (tmp_path / "share").rename(tmp_path / "away")
        (tmp_path / "share" / LAYOUT.fingerprint.hex()).mkdir(parents=True)
        with pytest.raises(TransferError, match="gone"):
            put(store, 1)
        assert files(tmp_path, "*") == [tmp_path / "share" / LAYOUT.fingerprint.hex()]


class TestCollecting:
    def test_the_longest_unused_go_first(self, open_store, tmp_path):
        store = open_store(capacity_bytes=20 * TAKEN)
        for number in range(20):
            assert put(store, number) is PutAnswer.CREATED
            age(tmp_path, number, 10_000 - 200 * number)
        assert put(store, 20) is PutAnswer.FULL
        assert store.collect() == 2 * TAKEN
        kept = {entry.key for entry in store.entries()}
        assert kept == {key(number) for number in range(2, 20)}
        assert put(store, 20) is PutAnswer.CREATED
        found = store.statistics()
        assert (found.full, found.collected, found.used_bytes) == (1, 2, 19 * TAKEN)

    def test_reading_keeps_a_block(self, open_store, tmp_path):
        store = open_store(capacity_bytes=20 * TAKEN)
        for number in range(20):
            put(store, number)
            age(tmp_path, number, 10_000 - 200 * number)
        for number in range(5):
            assert read(store, number) is not None
        store.collect()
        kept = {entry.key for entry in store.entries()}
        assert kept == {key(number) for number in range(20) if number not in {5, 6}}

    def test_reads_touch_a_file_at_a_low_rate(self, open_store, tmp_path):
        store = open_store()
        put(store, 1)
        age(tmp_path, 1, 500)
        before = files(tmp_path)[0].stat().st_mtime
        read(store, 1)
        assert files(tmp_path)[0].stat().st_mtime == before
        age(tmp_path, 1, 700)
        read(store, 1)
        assert files(tmp_path)[0].stat().st_mtime > before

    def test_below_the_mark_nothing_goes(self, open_store):
        store = open_store(capacity_bytes=20 * TAKEN)
        for number in range(19):
            put(store, number)
        assert store.collect() == 0
        assert store.statistics().used_bytes == 19 * TAKEN

    def test_several_at_once_do_no_more_harm_than_one(self, open_store):
        """All blocks are equally old, so only the share by key can keep them from adding up."""
        writers = [open_store(capacity_bytes=1 << 30) for _ in range(4)]
        for number in range(400):
            put(writers[0], number)
        collectors = [open_store(capacity_bytes=300 * TAKEN) for _ in range(6)]
        barrier = threading.Barrier(len(collectors))

        def collect(store):
            barrier.wait()
            return store.collect()

        with ThreadPoolExecutor(len(collectors)) as threads:
            removed = sum(threads.map(collect, collectors))
        left = sum(1 for _ in writers[0].entries())
        assert removed == (400 - left) * TAKEN
        assert 230 <= left <= 285, "one collector aims at 270"

    def test_what_a_dead_writer_left_is_swept_once_it_is_old(self, open_store, tmp_path):
        store = open_store()
        put(store, 1)
        [path] = files(tmp_path)
        old, young = path.with_name(".a.x-1.new"), path.with_name(".b.x-2.new")
        for each in (old, young):
            each.write_bytes(b"half")
        os.utime(old, (time.time() - 4000,) * 2)
        assert [entry.key for entry in store.entries()] == [key(1)]
        store.collect()
        assert (old.exists(), young.exists()) == (False, True)

    def test_what_is_written_during_a_walk_counts(self, open_store, monkeypatch):
        store = open_store(capacity_bytes=20 * TAKEN)
        walk = store._walk

        def slow_walk(**more):
            yield from list(walk(**more))
            assert put(store, 2) is PutAnswer.CREATED

        put(store, 1)
        monkeypatch.setattr(store, "_walk", slow_walk)
        store.collect()
        assert store.statistics().used_bytes == 2 * TAKEN

    def test_what_is_deleted_makes_room_at_once(self, open_store):
        store = open_store(capacity_bytes=20 * TAKEN)
        for number in range(4):
            put(store, number)
        store.delete([key(1), key(2), key(99)])
        assert store.statistics().used_bytes == 2 * TAKEN

    def test_the_thread_makes_room_by_itself(self, open_store):
        limits = DirectoryLimits(collect_interval_s=60.0, collect_pause_s=0.01)
        store = open_store(capacity_bytes=20 * TAKEN, limits=limits)
        deadline = time.monotonic() + 20
        created = 0
        while created < 60:
            assert time.monotonic() < deadline
            for number in range(100):
                created += put(store, number) is PutAnswer.CREATED
        assert sum(1 for _ in store.entries()) <= 20
        store.close()
        assert "kvstrata-collector" not in {thread.name for thread in threading.enumerate()}


WRITER = """
import random, sys
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.directory import DirectoryLimits, DirectoryStore
from kvstrata.storage.keyed import PutAnswer
layout = BlockLayout((Dimension("channel", 12_000),), "int8", 8, "test")
store = DirectoryStore.open(sys.argv[1], 1 << 30, layout, limits=DirectoryLimits(None))
print("ready", flush=True)
sys.stdin.readline()
created = 0
for number in range(int(sys.argv[2])):
    seen = random.Random(number).randbytes(16)
    data = random.Random(100 + number).randbytes(12_000)
    created += store.put(seen, bytes(256), memoryview(data)) is PutAnswer.CREATED
print(created, flush=True)
"""


def writers(tmp_path, count, blocks):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "share"), str(blocks)]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    for each in started:
        assert each.stdout.readline() == "ready\n"
    for each in started:
        each.stdin.write("go\n")
        each.stdin.flush()
    return started


class TestProcesses:
    def test_of_many_writers_exactly_one_creates_each_block(self, open_store, tmp_path):
        created = []
        for each in writers(tmp_path, 4, 150):
            said, _ = each.communicate(timeout=60)
            created.append(int(said))
        assert sum(created) == 150
        store = open_store()
        assert all(read(store, number) == bytes(payload(number)) for number in range(150))
        assert files(tmp_path, ".*.new") == []

    def test_a_killed_writer_leaves_whole_blocks_only(self, open_store, tmp_path):
        luck = random.Random(4)
        store = open_store()
        for _ in range(6):
            [process] = writers(tmp_path, 1, 100_000)
            time.sleep(luck.uniform(0.005, 0.15))
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=30)
            found = [number for number in range(3000) if store.exists([key(number)])[0]]
            assert all(read(store, number) == bytes(payload(number)) for number in found)
            store.delete([key(number) for number in found])
        assert store.statistics().hits > 0
