"""Binding memory to one NUMA node by the system's own calls; no library of it is needed."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from kvstrata.core.errors import ConfigError

__all__ = ["bind", "check_node", "node_free_bytes", "node_free_huge_pages", "preferring"]

_NODES: Final = Path("/sys/devices/system/node")
_DEFAULT: Final = 0  # MPOL_DEFAULT
_BIND: Final = 2  # MPOL_BIND
_NODES_MAX: Final = 1024


class _Calls(NamedTuple):
    mbind: int
    set_mempolicy: int


_CALLS: Final = {"x86_64": _Calls(237, 238), "aarch64": _Calls(235, 237)}


def check_node(node: int) -> None:
    """Raise ConfigError if memory cannot be bound to `node` here."""
    if platform.machine() not in _CALLS:
        raise ConfigError(
            f"host_numa_node: memory cannot be bound to a node on {platform.machine()}",
            hint="leave host_numa_node out, and start the daemon with numactl --membind",
        )
    known = [int(path.name.removeprefix("node")) for path in _NODES.glob("node[0-9]*")]
    if node not in known:
        names = ", ".join(map(str, sorted(known))) or "none that the system shows"
        raise ConfigError(
            f"host_numa_node: this machine has no node {node}", hint=f"its nodes are {names}"
        )


def bind(mapping: mmap.mmap, node: int) -> None:
    """Bind a shared mapping of small pages to `node`, for whoever touches it first.

    The system keeps this with the file: it holds for other processes, and after unmapping. Raises
    ConfigError if the system refuses, as a cpuset makes it.
    """
    first = ctypes.c_char.from_buffer(mapping)
    try:
        start = ctypes.c_void_p(ctypes.addressof(first))
        _call(_calls().mbind, node, start, ctypes.c_ulong(len(mapping)), mode=_BIND)
    finally:
        del first  # else the mapping could not be closed


@contextlib.contextmanager
def preferring(node: int | None) -> Iterator[None]:
    """Take what this thread takes from `node` alone; None changes nothing.

    Huge pages obey the thread that takes them, not their file.
    """
    if node is None:
        yield
        return
    _call(_calls().set_mempolicy, node, mode=_BIND)
    try:
        yield
    finally:
        _call(_calls().set_mempolicy, None, mode=_DEFAULT)


def node_free_bytes(node: int) -> int:
    """Return what `node` has left, what only caches files included."""
    lines = (_NODES / f"node{node}" / "meminfo").read_text(encoding="ascii").splitlines()
    counts = {name: int(size) << 10 for _, _, name, size, *_ in map(str.split, lines)}
    return sum(counts.get(name, 0) for name in ("MemFree:", "Active(file):", "Inactive(file):"))


def node_free_huge_pages(node: int) -> int:
    """Return how many reserved huge pages of 2 MiB `node` has left."""
    path = _NODES / f"node{node}" / "hugepages" / "hugepages-2048kB" / "free_hugepages"
    return int(path.read_text(encoding="ascii")) if path.exists() else 0


def _calls() -> _Calls:
    return _CALLS[platform.machine()]


def _call(
    number: int, node: int | None, *range_: ctypes.c_void_p | ctypes.c_ulong, mode: int
) -> None:
    """Make a call whose arguments are `range_`, mode, mask and its length; mbind has flags more."""
    library = ctypes.CDLL(None, use_errno=True)
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (_NODES_MAX // bits))()
    if node is not None:
        mask[node // bits] = 1 << (node % bits)
    length = ctypes.c_ulong(_NODES_MAX)
    arguments = [*range_, ctypes.c_int(mode), mask if node is not None else None]
    if library.syscall(ctypes.c_long(number), *arguments, length, ctypes.c_ulong(0)):
        reason = os.strerror(ctypes.get_errno())
        raise ConfigError(
            f"host_numa_node: the system refused to bind memory to node {node} ({reason})",
            hint="see which nodes this process may use: grep Mems_allowed /proc/self/status",
        )
