"""Whether each NIXL plug-in can be used here, tried out in a process of its own.

NIXL lists plug-ins that it found, not those that load. A plug-in may print, hang or crash when it
is tried; in a child process that costs one line of the answer.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from kvstrata.core.errors import ConfigError, KvstrataError, TransferError
from kvstrata.core.ids import TransferId
from kvstrata.storage.base import FileRegion, MemoryRegion, Region
from kvstrata.transfer.backends.nixl.agent import NixlAgent
from kvstrata.transfer.backends.nixl.backend import NixlBackend
from kvstrata.transfer.backends.nixl.binding import INSTALL_HINT, nixl_version
from kvstrata.transfer.base import CopyOp, Outcome

__all__ = ["PLUGINS", "PluginProbe", "probe_plugins"]

PLUGINS: Final = ("UCX", "POSIX", "OBJ", "AZURE_BLOB", "GDS")
"""The plug-ins that a node could use."""

_MARK: Final = "kvstrata-probe:"
_BYTES: Final = 1 << 16
_LIMIT_S: Final = 5.0
_PAUSE_S: Final = 0.001
_REASON: Final = re.compile(r"Failed to load plugin from \S+: (.+)|Failed to create engine: (.+)")

# Enough to start a client; nothing is sent. The stores themselves are not tried.
_PARAMETERS: Final[Mapping[str, Mapping[str, str]]] = {
    "UCX": {},
    "POSIX": {"use_aio": "true"},
    "OBJ": {
        "access_key": "probe",
        "secret_key": "probe",
        "bucket": "probe",
        "endpoint_override": "http://127.0.0.1:9",
        "scheme": "http",
        "region": "us-east-1",
    },
    "AZURE_BLOB": {
        "connection_string": "DefaultEndpointsProtocol=http;AccountName=probe;AccountKey=cHJvYmU=;"
        "BlobEndpoint=http://127.0.0.1:9/probe;",
        "container_name": "probe",
    },
    "GDS": {},
}
_REMEDIES: Final[Mapping[str, str]] = {
    "UCX": "reinstall the wheel of nixl for this machine and this Python",
    "POSIX": "allow the system calls of libaio (io_setup), or raise fs.aio-max-nr",
    "OBJ": "use the object extra (obstore) in its place",
    "AZURE_BLOB": "use the object extra (obstore) in its place",
    "GDS": "needs an NVIDIA GPU and its driver, nvidia-fs, libcufile and libcudart; without them "
    "POSIX serves files",
}
_NOT_ASKED: Final = (
    "loads; no store was asked. The object tier uses obstore: this plug-in has no delete, no list "
    "and no conditional put, and reports a short read as done"
)


@dataclass(frozen=True, slots=True)
class PluginProbe:
    """What came of trying one plug-in."""

    plugin: str
    """Its name."""
    usable: bool
    """Whether it did what was asked."""
    why: str
    """What it did, or why it cannot be used."""
    remedy: str = ""
    """What to do about it; empty if nothing is to be done."""


def probe_plugins(
    plugins: Sequence[str] = PLUGINS,
    *,
    timeout_s: float = 20.0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[PluginProbe]:
    """Try each plug-in; returns the answers in the order asked. Without NIXL none is usable."""
    if nixl_version() is None:
        why = "nixl is not installed"
        return [PluginProbe(each, usable=False, why=why, remedy=INSTALL_HINT) for each in plugins]
    found = []
    for plugin in plugins:
        progress(f"trying NIXL plug-in {plugin}")
        found.append(_probe(plugin, timeout_s))
    return found


def _probe(plugin: str, timeout_s: float) -> PluginProbe:
    remedy = _REMEDIES.get(plugin, "see NIXL's page of this plug-in")
    command = [sys.executable, "-m", "kvstrata.transfer.backends.nixl.probe", plugin]
    environment = {**os.environ, "NIXL_LOG_LEVEL": "INFO", "UCX_LOG_LEVEL": "error"}
    try:
        done = subprocess.run(  # noqa: S603 - our own module
            command, capture_output=True, timeout=timeout_s, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return PluginProbe(
            plugin, usable=False, why=f"no answer within {timeout_s} s", remedy=remedy
        )
    # A plug-in may have written on the same line.
    answer = done.stdout.decode(errors="replace").rpartition(_MARK)[2].strip()
    if done.returncode or not answer.startswith("{"):
        why = f"crashed when tried (status {done.returncode})"
        return PluginProbe(plugin, usable=False, why=why, remedy=remedy)
    probe = PluginProbe(**json.loads(answer))
    if probe.usable:
        return probe
    reasons = _REASON.findall(done.stderr.decode(errors="replace"))
    why = next((one or other for one, other in reversed(reasons)), probe.why)
    return PluginProbe(plugin, usable=False, why=why, remedy=remedy)


# -- in the child --------------------------------------------------------------------------------


def _try(plugin: str) -> PluginProbe:
    try:
        backend = NixlBackend(NixlAgent({plugin: _PARAMETERS.get(plugin, {})}), timeout_s=_LIMIT_S)
    except ConfigError as error:
        return PluginProbe(plugin, usable=False, why=error.message)
    if plugin in {"OBJ", "AZURE_BLOB"}:
        return PluginProbe(plugin, usable=True, why=_NOT_ASKED)
    try:
        _round_trip(backend, plugin)
    except (KvstrataError, OSError) as error:
        return PluginProbe(plugin, usable=False, why=str(error))
    return PluginProbe(plugin, usable=True, why=f"moved {_BYTES} bytes there and back")


def _round_trip(backend: NixlBackend, plugin: str) -> None:
    pattern = os.urandom(_BYTES)
    here, there = (MemoryRegion(memoryview(mmap.mmap(-1, _BYTES))) for _ in range(2))
    here.view[:] = pattern
    if plugin == "UCX":
        _move(backend, here, there)
    else:
        with tempfile.TemporaryFile() as file:
            region = FileRegion(file.fileno())
            _move(backend, here, region)
            _move(backend, region, there)
    if there.view != pattern:
        raise TransferError("what came back is not what was sent", retryable=False)


def _move(backend: NixlBackend, source: Region, target: Region) -> None:
    assert backend.submit(TransferId(1), [CopyOp(0, 0, _BYTES)], source, target)
    end = time.monotonic() + _LIMIT_S
    while time.monotonic() < end:
        for completion in backend.poll():
            if completion.outcome is not Outcome.DONE:
                raise TransferError(completion.reason, retryable=False)
            return
        time.sleep(_PAUSE_S)
    raise TransferError(f"nothing came of it within {_LIMIT_S} s", retryable=False)


def _main(plugin: str) -> None:
    print(_MARK + json.dumps(asdict(_try(plugin))), flush=True)  # noqa: T201
    os._exit(0)  # what a plug-in does when it is unloaded is not asked


if __name__ == "__main__":
    _main(sys.argv[1])
