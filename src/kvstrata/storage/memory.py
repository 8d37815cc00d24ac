"""How much memory this process may use, and how much of it is still to be had."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from kvstrata.core.config import HostMemoryConfig
from kvstrata.core.errors import ConfigError

__all__ = ["available_memory_bytes", "check_host_size", "machine_memory_bytes"]

_UNLIMITED: Final = 1 << 60  # cgroup v1 writes a number near 2**63 for "no limit"
_ROOT: Final = Path("/sys/fs/cgroup")
_SHARE_MAX: Final = HostMemoryConfig().share_max


def check_host_size(capacity_bytes: int, share_max: float = _SHARE_MAX) -> None:
    """Raise ConfigError if a host tier of this size is more than that share of the memory."""
    if not 0 < share_max <= 1:  # NaN is neither
        raise ConfigError(
            f"host_memory_share_max: {share_max} is not a share of memory",
            hint="give a number above 0 and at most 1, for example 0.9",
        )
    machine = machine_memory_bytes()
    if capacity_bytes > share_max * machine:
        raise ConfigError(
            f"tiers.host: {capacity_bytes} bytes are more than {share_max:.0%} of the "
            f"{machine} bytes that this machine or its cgroup has",
            hint=f"use at most {int(share_max * machine) >> 20}MiB",
        )


def machine_memory_bytes() -> int:
    """Return the memory that this process may use: the machine's or its cgroup's, the smaller."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(group.limit_bytes for group in _limited_groups())])


def available_memory_bytes() -> int:
    """Return how much more this process can take now: of the machine or its cgroup, the smaller.

    Pages that only cache files count as available. What others take meanwhile is not known.
    """
    found = [_fields(Path("/proc/meminfo")).get("MemAvailable:", 0) << 10]
    for limit, usage, statistics in _limited_groups():
        try:
            used = int(usage.read_text(encoding="ascii"))
        except OSError:
            continue
        counts = _fields(statistics)
        total = "total_" if "total_inactive_file" in counts else ""  # version 1, children included
        cached = sum(counts.get(f"{total}{name}_file", 0) for name in ("active", "inactive"))
        found.append(limit - used + cached)
    return max(0, min(found))


class _Group(NamedTuple):
    limit_bytes: int
    usage: Path
    statistics: Path


def _limited_groups() -> Iterator[_Group]:
    """Yield the limited ones of our own control groups and of those above them."""
    for folder in _group_folders():
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            try:
                text = (folder / limit).read_text(encoding="ascii").strip()
            except OSError:
                continue
            if text.isdigit() and int(text) < _UNLIMITED:
                yield _Group(int(text), folder / usage, folder / "memory.stat")


def _group_folders() -> list[Path]:
    """Return where our own groups and those above them may be; a container may see only a root."""
    folders = {_ROOT / "memory": None}
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _ROOT / "memory" if controllers else _ROOT
        own = root / path.lstrip("/")
        folders |= dict.fromkeys(
            each for each in (own, *own.parents) if root in (each, *each.parents)
        )
    return list(folders)


def _fields(path: Path) -> dict[str, int]:
    """Return the numbers of a file of lines `name number ...`; empty where it cannot be read."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: int(rest[0]) for name, *rest in map(str.split, lines) if rest}
