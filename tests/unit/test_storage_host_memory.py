"""The host tier's memory as it is asked for: on this machine's real kernel."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from kvstrata.core.config import HostMemoryConfig, HugePages
from kvstrata.core.errors import ConfigError
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage import hostmemory
from kvstrata.storage.arena import Arena
from kvstrata.storage.hostmemory import HUGE_PAGE_BYTES, HostMemory
from kvstrata.storage.memory import available_memory_bytes, check_host_size, machine_memory_bytes

MIB = 1 << 20
LAYOUT = BlockLayout((Dimension("layer", 3), Dimension("channel", 1000)), "int8", 8, "test")
POOL = Path("/proc/sys/vm/nr_hugepages")
SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))


@contextlib.contextmanager
def written(path, text):
    """Change a setting of the kernel for a moment; skip where that is not allowed.

    Tests that run beside this one, in other processes too, wait for their turn.
    """
    with (Path(tempfile.gettempdir()) / f"kvstrata-test-{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with _written(path, text):
            yield


@contextlib.contextmanager
def _written(path, text):
    before = path.read_text().split()
    before = next((word[1:-1] for word in before if word.startswith("[")), before[0])
    try:
        path.write_text(text)
    except OSError as error:
        pytest.skip(f"{path} cannot be written here: {error}")
    try:
        yield
    finally:
        path.write_text(before)


@pytest.fixture
def huge_pool():
    """16 MiB of reserved huge pages."""
    with written(POOL, "8"):
        if int(POOL.read_text()) < 8:
            pytest.skip("the kernel has no room for 8 huge pages")
        yield


@contextlib.contextmanager
def taken(capacity_bytes, **asked):
    with contextlib.closing(HostMemory.take(capacity_bytes, HostMemoryConfig(**asked))) as memory:
        yield memory


@contextlib.contextmanager
def arena_in(memory):
    with contextlib.closing(Arena.create(memory.length_bytes, LAYOUT, memory)) as arena:
        yield arena


def allocated(memory):
    return os.fstat(memory.descriptor).st_blocks * 512


def mappings(memory, table):
    """Return the lines of /proc/self/`table` about the memory's mappings."""
    inode = str(os.fstat(memory.descriptor).st_ino)
    places = [
        line.split("-")[0]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if f" {inode} " in line and "(deleted)" in line
    ]
    return [
        line
        for line in Path(f"/proc/self/{table}").read_text().splitlines()
        if line.split()[0].split("-")[0] in places
    ]


class TestPlain:
    def test_nothing_is_taken_before_it_is_written(self):
        with taken(8 * MIB + 5, huge_pages=HugePages.OFF) as memory:
            assert memory.fill()
            assert (memory.length_bytes, allocated(memory)) == (8 * MIB, 0)
            assert memory.statistics() == {
                "memory_bytes": 8 * MIB,
                "pages": "small pages of 4096 bytes",
                "numa_node": None,
                "prefaulted_bytes": 0,
                "prefaulted_huge_bytes": 0,
            }

    def test_two_arenas_of_one_memory_one_after_the_other(self):
        with taken(MIB) as memory:
            with arena_in(memory) as arena:
                assert arena.length_bytes == MIB
                assert arena.grid.offset(arena.grid.slots) <= MIB
            with arena_in(memory) as arena:
                with contextlib.closing(Arena.attach(arena.address, LAYOUT)) as other:
                    other.slot(0)[:2] = b"kv"
                assert bytes(arena.slot(0)[:2]) == b"kv"

    @pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
    def test_a_share_that_is_none(self, share):
        with pytest.raises(ConfigError, match="host_memory_share_max"):
            check_host_size(1, share)

    def test_the_share_is_the_limit(self):
        size = machine_memory_bytes() // 10
        with pytest.raises(ConfigError, match=r"tiers\.host: .* more than 5% of"):
            HostMemory.take(size, HostMemoryConfig(share_max=0.05))
        with taken(size, share_max=0.11) as memory:
            assert memory.length_bytes > size - 4096


class TestPrefault:
    def test_every_page_is_there_and_progress_was_told(self, monkeypatch):
        monkeypatch.setattr(hostmemory, "_STEP_BYTES", 3 * MIB)
        told = []
        with taken(8 * MIB, prefault=True) as memory:
            assert memory.fill(lambda done, total: told.append((done, total)))
            assert allocated(memory) == 8 * MIB
            assert memory.statistics()["prefaulted_bytes"] == 8 * MIB
            assert told == [(size * MIB, 8 * MIB) for size in (3, 6, 8)]
            with arena_in(memory) as arena:
                assert not any(arena.slot(5))
                assert allocated(memory) == 8 * MIB, "an arena is made in what was taken"

    def test_a_stop_between_two_steps(self, monkeypatch):
        monkeypatch.setattr(hostmemory, "_STEP_BYTES", MIB)
        told = []
        with taken(8 * MIB, huge_pages=HugePages.OFF, prefault=True) as memory:
            assert not memory.fill(lambda done, _: told.append(done), lambda: len(told) == 3)
            assert allocated(memory) == 3 * MIB

    def test_less_memory_than_it_needs_is_refused_before_any_is_taken(self, monkeypatch):
        monkeypatch.setattr(hostmemory, "available_memory_bytes", lambda: 4 * MIB)
        with taken(8 * MIB, prefault=True) as memory:
            with pytest.raises(ConfigError, match=r"tiers\.host: no memory for all of it: 0 of"):
                memory.fill()
            assert allocated(memory) == 0

    def test_a_full_system_is_an_error_with_a_hint(self, monkeypatch):
        def refuse(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        with taken(8 * MIB, huge_pages=HugePages.OFF, prefault=True) as memory:
            with pytest.raises(ConfigError, match="then No space left on device") as caught:
                memory.fill()
            assert "smaller host tier" in caught.value.hint

    def test_what_is_taken_is_not_available_any_more(self):
        seen = []
        for _ in range(5):  # others may free some meanwhile, but not each time
            before = available_memory_bytes()
            assert 0 < before <= machine_memory_bytes()
            with taken(256 * MIB, prefault=True) as memory:
                assert memory.fill()
                seen.append(before - available_memory_bytes())
            if seen[-1] > 128 * MIB:
                return
        raise AssertionError(f"bytes less of 256 MiB: {seen}")


class TestHugePages:
    @pytest.mark.usefixtures("huge_pool")
    def test_reserved_ones(self):
        with taken(9 * MIB, huge_pages=HugePages.REQUIRE) as memory:
            assert memory.length_bytes == 8 * MIB
            assert memory.fill()
            assert allocated(memory) == 8 * MIB
            assert memory.statistics()["pages"] == "reserved huge pages of 2 MiB"
            assert memory.statistics()["prefaulted_huge_bytes"] == 8 * MIB
            with arena_in(memory) as arena:
                assert all(" huge " in line for line in mappings(memory, "numa_maps"))
                address = arena.address
                assert address.length_bytes == 8 * MIB
                with contextlib.closing(Arena.attach(address, LAYOUT)) as other:
                    last = arena.grid.slots - 1
                    other.slot(last)[:] = bytes([7]) * 3000
                    assert bytes(arena.slot(last)) == bytes([7]) * 3000
                wrong = BlockLayout((Dimension("channel", 999),), "int8", 8, "test")
                with pytest.raises(ConfigError, match="is no arena of"):
                    Arena.attach(address, wrong)

    @pytest.mark.usefixtures("huge_pool")
    def test_they_are_put_aside_at_once(self):
        """Two daemons must not both be told that they have them."""
        with taken(12 * MIB, huge_pages=HugePages.REQUIRE):
            with pytest.raises(ConfigError, match="has not 6 free huge pages"):
                HostMemory.take(12 * MIB, HostMemoryConfig(HugePages.REQUIRE))
            with taken(12 * MIB, huge_pages=HugePages.TRY) as small:
                assert not small.reserved_huge
                assert "has not 6 free huge pages" in small.statistics()["pages"]

    def test_none_reserved(self):
        with (
            written(POOL, "0"),
            pytest.raises(ConfigError, match="host_huge_pages: the system has not 4 free") as told,
        ):
            HostMemory.take(8 * MIB, HostMemoryConfig(HugePages.REQUIRE))
        assert "vm.nr_hugepages" in told.value.hint
        with pytest.raises(ConfigError, match="smaller than one huge page"):
            HostMemory.take(MIB, HostMemoryConfig(HugePages.REQUIRE))

    def test_transparent_ones(self):
        with (
            written(SHMEM, "advise"),
            taken(16 * MIB, huge_pages=HugePages.TRY, prefault=True) as memory,
        ):
            assert memory.fill()
            assert allocated(memory) == 16 * MIB
            said = memory.statistics()
            assert said["pages"].startswith("transparent huge pages (")
            assert said["pages"].endswith("shmem_enabled is advise)")
            assert said["prefaulted_huge_bytes"] >= 8 * MIB, "most of it"
            with (
                arena_in(memory) as arena,
                contextlib.closing(Arena.attach(arena.address, LAYOUT)) as other,
            ):
                other.slot(1)[:2] = b"kv"
                assert bytes(arena.slot(1)[:2]) == b"kv"

    def test_who_attaches_takes_transparent_ones_too(self):
        with (
            written(SHMEM, "advise"),
            taken(16 * MIB, huge_pages=HugePages.TRY) as memory,
            arena_in(memory) as arena,
            contextlib.closing(Arena.attach(arena.address, LAYOUT)) as other,
        ):
            assert allocated(memory) == HUGE_PAGE_BYTES, "the head"
            other.slot(arena.grid.slots // 2)[0] = 1
            assert allocated(memory) == 2 * HUGE_PAGE_BYTES

    @pytest.mark.parametrize("asked", [HugePages.AUTO, HugePages.TRY])
    def test_a_system_that_gives_shared_memory_none(self, asked):
        with written(SHMEM, "never"), taken(16 * MIB, huge_pages=asked, prefault=True) as memory:
            said = memory.statistics()["pages"]
            if "no tmpfs of its own" in said:
                pytest.skip(f"needs CAP_SYS_ADMIN: {said}")
            assert said.startswith("transparent huge pages (")
            assert said.endswith("shmem_enabled is never: in a tmpfs of its own)")
            assert memory.fill()
            assert memory.statistics()["prefaulted_huge_bytes"] >= 8 * MIB, "most of it"
            with (
                arena_in(memory) as arena,
                contextlib.closing(Arena.attach(arena.address, LAYOUT)) as other,
            ):
                other.slot(1)[:2] = b"kv"
                assert bytes(arena.slot(1)[:2]) == b"kv"

    def test_a_tmpfs_of_its_own_is_gone_with_the_memory(self):
        before = Path("/proc/self/mountinfo").read_text()
        with written(SHMEM, "never"), taken(16 * MIB) as memory:
            assert Path("/proc/self/mountinfo").read_text() == before, "mounted nowhere"
            assert os.fstat(memory.descriptor).st_nlink == 0
            assert stat.S_IMODE(os.fstat(memory.descriptor).st_mode) in {0o600, 0o777}

    def test_without_the_right_to_mount(self):
        program = """if True:
            from kvstrata.core.config import HostMemoryConfig, HugePages
            from kvstrata.storage.hostmemory import HostMemory
            print(HostMemory.take(4 << 20).statistics()["pages"])
            print(HostMemory.take(4 << 20, HostMemoryConfig(HugePages.OFF)).statistics()["pages"])
            print(HostMemory.take(1 << 20).statistics()["pages"])
        """
        with written(SHMEM, "never"):
            done = subprocess.run(
                ["setpriv", "--bounding-set=-sys_admin", sys.executable, "-c", program],
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.returncode == 0, done.stderr
        asked, off, small = done.stdout.splitlines()
        assert asked == (
            "small pages of 4096 bytes (shmem_enabled is never; no tmpfs of its own: "
            "Operation not permitted)"
        )
        assert off == small == "small pages of 4096 bytes"

    def test_forbidden_to_all(self):
        with written(SHMEM, "deny"), taken(16 * MIB) as memory:
            assert memory.statistics()["pages"] == (
                "small pages of 4096 bytes (shmem_enabled is deny)"
            )


class TestNode:
    def test_the_pages_are_bound_to_it(self):
        with taken(8 * MIB, numa_node=0, prefault=True) as memory:
            assert memory.fill()
            with arena_in(memory) as arena:
                arena.slot(0)[0] = 1
                (line,) = mappings(memory, "numa_maps")
                assert line.split()[1] == "bind:0", "whoever touches a page gets it from there"
                assert " N0=" in line
            assert memory.statistics()["numa_node"] == 0

    @pytest.mark.usefixtures("huge_pool")
    def test_huge_pages_of_a_node(self):
        with taken(8 * MIB, numa_node=0, huge_pages=HugePages.REQUIRE) as memory:
            assert memory.fill()
            assert allocated(memory) == 8 * MIB
        with pytest.raises(ConfigError, match="node 0 has 8 free huge pages of 2 MiB, not 9"):
            HostMemory.take(18 * MIB, HostMemoryConfig(HugePages.REQUIRE, 0))

    def test_the_thread_is_not_bound_afterwards(self):
        with taken(MIB, numa_node=0, prefault=True) as memory:
            assert memory.fill()
        with contextlib.closing(mmap.mmap(-1, MIB)) as plain:
            plain[0] = 1
            lines = Path("/proc/self/numa_maps").read_text().splitlines()
        assert not [line for line in lines if " bind:" in line]

    def test_no_such_node(self):
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(
            ConfigError, match="host_numa_node: this machine has no node 99"
        ) as told:
            HostMemory.take(MIB, HostMemoryConfig(numa_node=99))
        assert told.value.hint.startswith("its nodes are 0")
        assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.fixture
def group():
    """A control group with 96 MiB of memory that a process can be put into."""
    parent = next((each for each in GROUPS if (each / "memory.limit_in_bytes").exists()), None)
    limit = "memory.limit_in_bytes"
    if parent is None:
        parent, limit = GROUPS[1], "memory.max"
    folder = parent / f"kvstrata-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / limit).write_text(str(96 * MIB))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    yield folder
    for _ in range(100):
        try:
            folder.rmdir()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"{folder} is still in use")


class TestControlGroup:
    PROGRAM = """
import json, os, pathlib, sys
pathlib.Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from kvstrata.core.config import HostMemoryConfig
from kvstrata.core.errors import ConfigError
from kvstrata.storage.hostmemory import HostMemory
from kvstrata.storage.memory import available_memory_bytes, machine_memory_bytes
said = {"machine": machine_memory_bytes(), "available": available_memory_bytes()}
for name, size, share in (("share", 64 << 20, 0.5), ("fits", 16 << 20, 0.5), ("full", 94 << 20, 1)):
    try:
        memory = HostMemory.take(size, HostMemoryConfig(prefault=True, share_max=share))
        said[name] = memory.fill()
        memory.close()
    except ConfigError as error:
        said[name] = error.message
print(json.dumps(said))
"""

    def test_its_limit_is_ours_and_prefaulting_never_reaches_it(self, group):
        done = subprocess.run(
            [sys.executable, "-c", self.PROGRAM, str(group)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"killed? {done.stderr}"
        said = json.loads(done.stdout)
        assert said["machine"] == 96 * MIB
        assert 0 < said["available"] <= 96 * MIB
        assert "more than 50% of the 100663296 bytes" in said["share"]
        assert said["fits"] is True
        assert "no memory for all of it: 0 of 98566144" in said["full"]


class TestServe:
    def test_what_was_got_is_in_stats(self, serve, connect, make_blocks, command):
        daemon = serve(
            "host:64MiB",
            KVSTRATA_HOST_PREFAULT="1",
            KVSTRATA_HOST_NUMA_NODE="0",
            KVSTRATA_HOST_MEMORY_SHARE_MAX="0.5",
            KVSTRATA_HOST_HUGE_PAGES="try",
        )
        told = [line for line in daemon.lines if "of host memory" in line]
        assert told[-1].endswith("took 67108864 of 67108864 bytes of host memory\n")
        client = connect(address=daemon.address)
        tokens, blocks = make_blocks(1, 3)
        client.put(tokens, blocks)
        assert client.lookup(tokens) == len(tokens)
        said = command("stats", "--address", daemon.address, COLUMNS="200").stdout
        assert "host memory of 67108864 bytes on node 0 in " in said
        assert "67108864 bytes prefaulted" in said
        found = json.loads(command("stats", "--json", "--address", daemon.address).stdout)
        assert found["host_memory"]["prefaulted_bytes"] == 64 * MIB
        assert found["host_memory"]["numa_node"] == 0

    @pytest.mark.usefixtures("huge_pool")
    def test_reserved_huge_pages_serve_blocks(
        self, serve, connect, make_blocks, command, eventually, tmp_path
    ):
        daemon = serve(f"host:10MiB,disk:{tmp_path}:1MiB", KVSTRATA_HOST_HUGE_PAGES="require")
        client = connect(address=daemon.address)
        tokens, blocks = make_blocks(1, 3)
        client.put(tokens, blocks)
        assert (client.get(tokens) == blocks).all()

        def stats():
            return json.loads(command("stats", "--json", "--address", daemon.address).stdout)

        eventually(lambda: stats()["node"]["pending"] == 0)
        command("clear", "--tier", "host", "--address", daemon.address)
        assert (client.get(tokens) == blocks).all(), "read from disk into huge pages"
        assert stats()["node"]["tiers"]["disk"]["hit_blocks"] == 3
        assert stats()["node"]["tiers"]["disk"]["devices"][0]["direct_refusals"] == 0
        said = command("stats", "--address", daemon.address, COLUMNS="200").stdout
        assert "host memory of 10485760 bytes in reserved huge pages of 2 MiB, 10485760" in said
        client.close()
        assert daemon.end() == 0
        free = Path("/proc/meminfo").read_text().split("HugePages_Free:")[1].split()[0]
        assert free == "8", "given back"

    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("HOST_HUGE_PAGES", "sometimes", "host_huge_pages: "),
            ("HOST_HUGE_PAGES", "require", "host_huge_pages: a host tier of 1048576 bytes"),
            ("HOST_NUMA_NODE", "99", "host_numa_node: this machine has no node 99"),
            ("HOST_NUMA_NODE", "-1", "host_numa_node: "),
            ("HOST_PREFAULT", "maybe", "host_prefault: "),
            ("HOST_MEMORY_SHARE_MAX", "0", "host_memory_share_max: "),
            ("HOST_MEMORY_SHARE_MAX", "1.5", "host_memory_share_max: "),
            ("HOST_MEMORY_SHARE_MAX", "0.000001", "tiers.host: 1048576 bytes are more than"),
        ],
    )
    def test_refusals(self, command, run_directory, name, value, words):
        done = command("serve", "--tiers", "host:1MiB", **{f"KVSTRATA_{name}": value})
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {words}")
        assert "\n\nhint: " in done.stderr
        assert not list(run_directory.rglob("*.*"))

    def test_a_stop_while_prefaulting_is_prompt(self, run_directory):
        size = min(available_memory_bytes() // 2, 8 << 30)
        process = subprocess.Popen(
            [sys.executable, "-m", "kvstrata.apps.cli.main", "serve", "--tiers", f"host:{size}"],
            env=os.environ | {"KVSTRATA_HOST_PREFAULT": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            assert "of host memory" in process.stderr.readline()
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
            assert process.wait(10) == 0
        assert time.monotonic() - began < 2
        assert " serves " not in rest, "it was ready before it could be stopped"
        assert not list(run_directory.rglob("*.*"))


def test_a_kernel_that_cannot_populate_takes_pages_in_another_way(monkeypatch):
    """Linux before 5.14 does not know the advice, as no system knows this one."""
    monkeypatch.setattr(hostmemory, "_POPULATE_WRITE", 99)
    memory = HostMemory.take(4 * MIB, HostMemoryConfig(prefault=True))
    try:
        assert memory.fill()
        assert os.fstat(memory.descriptor).st_blocks * 512 == 4 * MIB
    finally:
        memory.close()
