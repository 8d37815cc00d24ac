"""The memory of the host tier before it has a layout: an anonymous file of fixed length.

It is made when the daemon starts, so that a size, huge pages or a node that cannot be had are
refused then. `fill` takes its pages at once; otherwise each is taken when it is first written.

Owner: one thread, which calls `fill` before it serves anybody.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from kvstrata.core.config import HostMemoryConfig, HugePages
from kvstrata.core.errors import ConfigError
from kvstrata.storage import numa
from kvstrata.storage.base import PAGE_BYTES
from kvstrata.storage.hugefile import open_huge_file
from kvstrata.storage.memory import (
    available_memory_bytes,
    check_host_size,
    machine_memory_bytes,
)

__all__ = ["HUGE_PAGE_BYTES", "HostMemory", "advise_huge"]

HUGE_PAGE_BYTES: Final = 2 << 20
_NAME: Final = "kvstrata-arena"
_TRANSPARENT: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_POPULATE_WRITE: Final = 23  # MADV_POPULATE_WRITE, Linux 5.14; fails where touching would kill
_STEP_BYTES: Final = 64 << 20
"""Taken at once: some 20 ms, after which a stop is obeyed and progress is told."""
_SPARE_SHARE: Final = 1 / 64
"""Share of the machine's or its cgroup's memory that must be left before each step."""


class HostMemory:
    """An open memfd, and what was got of what was asked for. Use `take`."""

    def __init__(self, descriptor: int, length_bytes: int, config: HostMemoryConfig) -> None:
        """Own `descriptor`, a file of small pages that is `length_bytes` long."""
        self.descriptor = descriptor
        self.length_bytes = length_bytes
        self.reserved_huge = False
        """Whether it is made of reserved huge pages."""
        self.transparent_huge = False
        """Whether its mappings should ask for transparent huge pages."""
        self._config = config
        self._pages = f"small pages of {PAGE_BYTES} bytes"
        self._prefaulted_bytes = 0
        self._huge_bytes = 0

    @classmethod
    def take(cls, capacity_bytes: int, config: HostMemoryConfig | None = None) -> HostMemory:
        """Make memory of at most `capacity_bytes`, at least one page.

        Raises ConfigError if it is too much, or if required huge pages or the node are not there.
        """
        config = config or HostMemoryConfig()
        check_host_size(capacity_bytes, config.share_max)
        if config.numa_node is not None:
            numa.check_node(config.numa_node)
        why = ""
        if config.huge_pages in (HugePages.TRY, HugePages.REQUIRE):
            taken = _take_reserved(capacity_bytes, config)
            if isinstance(taken, HostMemory):
                return taken
            why = taken
        if config.huge_pages is HugePages.REQUIRE:
            raise ConfigError(
                f"host_huge_pages: {why}",
                hint=f"reserve {-(-capacity_bytes // HUGE_PAGE_BYTES)} pages with sysctl "
                "vm.nr_hugepages, or write host_huge_pages=try",
            )
        return _take_small(capacity_bytes, config, why)

    def fill(
        self,
        progress: Callable[[int, int], None] = lambda _done, _total: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Take every page, if that is asked for; return False if `stopped` said so meanwhile.

        `progress` is told the bytes taken so far and all bytes. Reserved huge pages are always
        taken: a page that its node cannot give would kill whoever touches it. Raises ConfigError
        rather than letting the system run out of memory.
        """
        if not (self._config.prefault or self.reserved_huge):
            return True
        with (
            numa.preferring(self._config.numa_node),
            mmap.mmap(self.descriptor, self.length_bytes) as mapping,
        ):
            if self.transparent_huge:
                advise_huge(mapping)
            while (done := self._prefaulted_bytes) < self.length_bytes:
                if stopped():
                    return False
                size = min(_STEP_BYTES, self.length_bytes - done)
                self._fill_step(mapping, done, size)
                self._prefaulted_bytes += size
                progress(self._prefaulted_bytes, self.length_bytes)
            if self.transparent_huge:
                self._huge_bytes = _huge_bytes(self.descriptor, mapping)
        if self.reserved_huge:
            self._huge_bytes = self.length_bytes
        return True

    def statistics(self) -> dict[str, Any]:
        """Return what was got, as plain names and numbers."""
        return {
            "memory_bytes": self.length_bytes,
            "pages": self._pages,
            "numa_node": self._config.numa_node,
            "prefaulted_bytes": self._prefaulted_bytes,
            "prefaulted_huge_bytes": self._huge_bytes,
        }

    def close(self) -> None:
        """Give it back, as far as nobody maps it; twice is harmless."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _fill_step(self, mapping: mmap.mmap, start: int, size: int) -> None:
        left = self._available_bytes()
        if left is not None and self.length_bytes - start > left:
            raise _out_of_memory(start, self.length_bytes, f"{left} bytes are available")
        try:
            if not (self.transparent_huge and _populate(mapping, start, size)):
                os.posix_fallocate(self.descriptor, start, size)
        except OSError as error:
            raise _out_of_memory(start, self.length_bytes, str(error.strerror)) from error

    def _available_bytes(self) -> int | None:
        """Return how much may be taken; None for reserved pages, which nobody else can take."""
        if self.reserved_huge:
            return None
        left = available_memory_bytes()
        if self._config.numa_node is not None:
            left = min(left, numa.node_free_bytes(self._config.numa_node))
        return max(0, left - int(_SPARE_SHARE * machine_memory_bytes()))

    def _bind(self) -> None:
        if self._config.numa_node is not None:
            with mmap.mmap(self.descriptor, self.length_bytes) as mapping:
                numa.bind(mapping, self._config.numa_node)


def _populate(mapping: mmap.mmap, start: int, size: int) -> bool:
    """Take pages as they are mapped, huge ones where there are; False before Linux 5.14."""
    try:
        mapping.madvise(_POPULATE_WRITE, start, size)  # fallocate would take small pages
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def advise_huge(mapping: mmap.mmap) -> None:
    """Ask for transparent huge pages in a mapping; the system may have none."""
    mapping.madvise(mmap.MADV_HUGEPAGE)


def _take_small(capacity_bytes: int, config: HostMemoryConfig, why: str) -> HostMemory:
    length = max(PAGE_BYTES, capacity_bytes // PAGE_BYTES * PAGE_BYTES)
    asked = config.huge_pages is not HugePages.OFF and length >= HUGE_PAGE_BYTES
    descriptor, transparent, how = _open_transparent() if asked else (-1, False, "")
    if descriptor < 0:
        descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC)
    memory = HostMemory(descriptor, length, config)
    memory.transparent_huge = transparent
    pages = "transparent huge pages" if transparent else memory._pages  # noqa: SLF001
    whys = "; ".join(filter(None, (why, how)))
    memory._pages = f"{pages} ({whys})" if whys else pages  # noqa: SLF001
    try:
        os.ftruncate(descriptor, length)
        memory._bind()  # noqa: SLF001  # the rest of `take`
    except OSError as error:
        memory.close()
        raise ConfigError(
            f"tiers.host: the system refused {length} bytes of memory ({error.strerror})",
            hint="use a smaller host tier or raise the memory limit",
        ) from error
    except ConfigError:
        memory.close()
        raise
    return memory


def _take_reserved(capacity_bytes: int, config: HostMemoryConfig) -> HostMemory | str:
    """Return memory of reserved huge pages, or why there is none."""
    count = capacity_bytes // HUGE_PAGE_BYTES
    if not count:
        return f"a host tier of {capacity_bytes} bytes is smaller than one huge page"
    if config.numa_node is not None:
        free = numa.node_free_huge_pages(config.numa_node)
        if free < count:
            return f"node {config.numa_node} has {free} free huge pages of 2 MiB, not {count}"
    length = count * HUGE_PAGE_BYTES
    try:
        flags = os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB
        descriptor = os.memfd_create(_NAME, flags)
    except OSError as error:
        return f"the system has no huge pages of 2 MiB ({error.strerror})"
    memory = HostMemory(descriptor, length, config)
    try:
        os.ftruncate(descriptor, length)
        mmap.mmap(descriptor, length).close()  # puts the pages aside for this file
    except OSError as error:
        memory.close()
        return f"the system has not {count} free huge pages of 2 MiB ({error.strerror})"
    memory.reserved_huge = True
    memory._pages = "reserved huge pages of 2 MiB"  # noqa: SLF001  # the rest of `take`
    return memory


def _open_transparent() -> tuple[int, bool, str]:
    """Return a file or -1, whether mappings of such files get huge pages, and what decided it."""
    mode = _transparent_mode()
    how = f"shmem_enabled is {mode or 'missing'}"
    if mode in {"", "deny"}:  # no such pages in this system, or forbidden to every file
        return -1, False, how
    if mode != "never":
        return -1, True, how
    try:
        return open_huge_file(), True, f"{how}: in a tmpfs of its own"
    except OSError as error:
        return -1, False, f"{how}; no tmpfs of its own: {error.strerror}"


def _transparent_mode() -> str:
    """Return the chosen word of `always within_size advise [never] deny force`."""
    try:
        words = _TRANSPARENT.read_text(encoding="ascii").split()
    except OSError:
        return ""
    return next((word[1:-1] for word in words if word.startswith("[")), "")


def _out_of_memory(done: int, total: int, why: str) -> ConfigError:
    return ConfigError(
        f"tiers.host: no memory for all of it: {done} of {total} bytes were taken, then {why}",
        hint="use a smaller host tier, or end what else takes memory; without host_prefault it "
        "would run out later",
    )


def _huge_bytes(descriptor: int, mapping: mmap.mmap) -> int:
    """Return how much of `mapping`, all of it touched, lies in transparent huge pages."""
    inode = str(os.fstat(descriptor).st_ino)
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            ours = len(rest) > 3 and rest[3] == inode and "(deleted)" in line  # noqa: PLR2004
        elif ours and name == "ShmemPmdMapped:":
            total += int(rest[0]) << 10
    return min(total, len(mapping))
