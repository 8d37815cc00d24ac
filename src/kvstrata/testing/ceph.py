"""A Ceph cluster of one process each for tests: monitor, one OSD in memory, S3 gateway.

The programs are Debian's (`ceph-mon`, `ceph-osd`, `radosgw`), installed or unpacked anywhere:
`.ci/ceph` unpacks them into `build/ceph`. Neither root nor the `ceph` command nor a manager is
needed. The gateway checks SigV4 signatures and honours If-None-Match.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import shutil
import subprocess
import urllib.request
import uuid
from email.utils import formatdate
from pathlib import Path
from typing import Final

from kvstrata.testing.server import ServerProcess, free_port

__all__ = ["BUCKET", "CephServer", "find_ceph"]

BUCKET: Final = "kvstrata-test"
"""The bucket that is there from the start."""

_PROGRAMS: Final = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool", "osdmaptool")
_READY_S: Final = 90.0  # about six, on a machine that does nothing else
_TOOL_S: Final = 60.0
_MEMORY_BYTES: Final = 2 << 30

# One copy of everything, one placement group a pool; what a cluster of one does not need is off.
# Short intervals: the gateway makes its pools at the start, each a round of the monitor.
_SETTINGS: Final = """[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{port}
mon initial members = a
public addr = 127.0.0.1
ms bind msgr2 = false
auth cluster required = none
auth service required = none
auth client required = none
auth allow insecure global id reclaim = true
paxos propose interval = 0.02
paxos min wait = 0.01
mon tick interval = 1
mon allow pool size one = true
mon data avail crit = 1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = {memory}
osd class dir = {libraries}/rados-classes
osd class load list = *
osd class default list = *
erasure code dir = {libraries}/ceph/erasure-code
plugin dir = {libraries}/ceph
run dir = {folder}
admin socket =
log file = {folder}/$name.log
mon cluster log file = {folder}/cluster.log
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/rgw
keyring = {folder}/keyring
rgw frontends = beast endpoint=127.0.0.1:{gateway}
rgw enable usage log = false
rgw run sync thread = false
rgw enable gc threads = false
rgw enable lc threads = false
"""


def find_ceph() -> Path | None:
    """Return the folder of the programs if all of them are on the path, else None."""
    found = [shutil.which(name) for name in _PROGRAMS]
    return None if None in found else Path(str(found[_PROGRAMS.index("radosgw")])).parent


class CephServer(contextlib.AbstractContextManager["CephServer"]):
    """A running cluster and its gateway; a context manager that ends all of it.

    `gateway` may be killed or stopped; `start_gateway` starts one anew, with the same objects.
    Raises RuntimeError if something does not come up.
    """

    def __init__(self, folder: Path) -> None:
        """Start it; `folder` keeps maps and logs, objects stay in memory."""
        programs = find_ceph()
        if programs is None:
            raise RuntimeError(f"not all on the path: {', '.join(_PROGRAMS)}; .ci/ceph brings them")
        self._programs, self._folder = programs, folder
        root = programs.parent.parent
        libraries = next((root / "usr/lib").glob("*-linux-gnu*"), root / "usr/lib")
        self._variables = {}
        if root != Path("/"):  # unpacked, not installed
            places = (libraries, libraries / "ceph", root / "lib" / libraries.name)
            self._variables["LD_LIBRARY_PATH"] = ":".join(map(str, places))
        self.access_key, self._secret_key = "KVSTRATATEST", os.urandom(12).hex()
        self.port = free_port()
        self._daemons: list[ServerProcess] = []
        try:
            self._start_cluster(libraries)
            self.start_gateway()
            self._make_user()
            _make_bucket(self.endpoint, self.access_key, self._secret_key)
        except BaseException:
            self.close()
            raise

    @property
    def endpoint(self) -> str:
        """Where the gateway listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """The bucket as an object tier's URL."""
        return f"s3://{BUCKET}?endpoint={self.endpoint}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a client may use it."""
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self._secret_key}

    def start_gateway(self) -> None:
        """Start the gateway, at first or after it was killed; returns once it answers."""
        command = self._command("radosgw", "-n", "client.admin", "-f")
        self.gateway = ServerProcess(command, self.port, self._folder, self._variables, _READY_S)
        self._daemons.append(self.gateway)

    def close(self) -> None:
        """End every process; twice is harmless."""
        for daemon in reversed(self._daemons):
            daemon.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _command(self, program: str, *arguments: str) -> list[str]:
        settings = str(self._folder / "ceph.conf")
        return [str(self._programs / program), "-c", settings, *arguments]

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(  # noqa: S603  a test's own programs
            self._command(program, *arguments),
            cwd=self._folder,
            env={"PATH": os.environ.get("PATH", ""), **self._variables},
            capture_output=True,
            text=True,
            timeout=_TOOL_S,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr.strip()[-500:]}")

    def _start_cluster(self, libraries: Path) -> None:
        """Make the maps, which know the OSD from the start, then both daemons."""
        fsid, port = str(uuid.uuid4()), free_port()
        settings = _SETTINGS.format(
            fsid=fsid,
            port=port,
            gateway=self.port,
            folder=self._folder,
            libraries=libraries,
            memory=_MEMORY_BYTES,
        )
        (self._folder / "ceph.conf").write_text(settings, encoding="utf-8")
        for name in ("mon", "osd", "rgw"):
            (self._folder / name).mkdir()
        monitor = ["--addv", "a", f"[v1:127.0.0.1:{port}]"]
        self._run("monmaptool", "--create", "--clobber", *monitor, "--fsid", fsid, "monmap")
        self._run("osdmaptool", "--createsimple", "1", "--clobber", "osdmap")
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap", "--osdmap", "osdmap")
        command = self._command("ceph-mon", "-i", "a", "-f")
        self._daemons.append(ServerProcess(command, port, self._folder, self._variables))
        self._run("ceph-osd", "-i", "0", "--mkfs")
        command = self._command("ceph-osd", "-i", "0", "-f")
        self._daemons.append(ServerProcess(command, None, self._folder, self._variables))

    def _make_user(self) -> None:
        keys = ["--access-key", self.access_key, "--secret-key", self._secret_key]
        names = ["--uid", "kvstrata", "--display-name", "kvstrata"]
        self._run("radosgw-admin", "-n", "client.admin", "user", "create", *names, *keys)


def _make_bucket(endpoint: str, access_key: str, secret_key: str) -> None:
    """Make it by a request with the old, short signature, which no client of ours can send."""
    date = formatdate(usegmt=True)
    signed = f"PUT\n\n\n{date}\n/{BUCKET}"
    digest = hmac.new(secret_key.encode(), signed.encode(), hashlib.sha1).digest()
    request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")  # noqa: S310  our own
    request.add_header("Date", date)
    request.add_header("Authorization", f"AWS {access_key}:{base64.b64encode(digest).decode()}")
    with urllib.request.urlopen(request, timeout=_TOOL_S):  # noqa: S310
        pass
