"""Real SGLang engines on a CPU, on a tiny Llama that is made here."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kit import SharedDaemon, write_llama

_SUPPORT = Path(__file__).parent / "support"
PAGE_TOKENS = 16
_START_S = 180.0
_TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}  # the cores of each rank
_ORDER_S = 60.0  # the first answer compiles SGLang's page hash


def _support_sglang() -> None:
    """Put what SGLang needs on a CPU in its processes' way, and in ours."""
    os.environ.update(
        PYTHONPATH=os.pathsep.join(filter(None, [str(_SUPPORT), os.environ.get("PYTHONPATH")])),
        SGLANG_USE_CPU_ENGINE="1",
        OMP_NUM_THREADS="1",  # two cores serve engine and daemon
        HF_HUB_OFFLINE="1",
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # ninja
    )
    # Importing every model that SGLang knows takes half of an engine's start.
    models = Path(importlib.util.find_spec("sglang").origin).parent / "srt" / "models"
    others = {path.stem for path in models.iterdir()} - {"llama"}
    os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(sorted(others))
    sys.path.insert(0, str(_SUPPORT))
    spec = importlib.util.spec_from_file_location("kvstrata_site", _SUPPORT / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


if importlib.util.find_spec("sglang") is not None:
    _support_sglang()

EngineFactory = Callable[..., AbstractContextManager["Engine"]]


@dataclass
class Answer:
    """What came back for one prompt."""

    tokens: tuple[int, ...]
    from_storage: int
    cached: int


class Engine:
    """An SGLang engine in a process of its own (driver.py), or what another driver runs."""

    def __init__(
        self,
        arguments: dict[str, Any],
        log: Path,
        driver: Path = Path(__file__).parent / "driver.py",
        python: Path = Path(sys.executable),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.log = log
        order_reader, self._orders = os.pipe()
        self._answers, answer_writer = os.pipe()
        fds = (order_reader, answer_writer)
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [str(python), str(driver), *map(str, fds), json.dumps(arguments)],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment
                or os.environ | (_TWO_RANKS if arguments.get("tp_size") == 2 else {}),
                start_new_session=True,  # what fails ends with its process group
            )
        for fd in fds:
            os.close(fd)
        self._buffer = b""

    def wait_started(self, timeout_s: float = _START_S) -> None:
        """Return once it serves; AssertionError, with the end of its log, if it does not."""
        assert self._answer(timeout_s) == "started"

    def ask(
        self, prompts: Sequence[Sequence[int]], max_tokens: int = 8, **extra: Any
    ) -> list[Answer]:
        """Answer every prompt greedily, one after the other."""
        sampling = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
        found = []
        for prompt in prompts:
            given = {"input_ids": list(prompt), "sampling_params": sampling, **extra}
            answer = self._order({"do": "ask", "given": given})
            storage = answer["details"].get("storage", 0)
            found.append(Answer(tuple(answer["tokens"]), storage, answer["cached"]))
        return found

    def forget(self) -> None:
        """Empty device and host pool; the storage keeps its pages."""
        deadline = time.monotonic() + _ORDER_S  # it refuses while something is on its way
        while not self._order({"do": "forget"}):
            assert time.monotonic() < deadline, "the engine does not come to rest"
            time.sleep(0.05)

    @contextmanager
    def attached(self, **ours: Any) -> Iterator[None]:
        """Attach kvstrata with these settings while the engine runs; detach at the end."""
        self.forget()
        given = {
            "hicache_storage_backend": "dynamic",
            "hicache_storage_backend_extra_config_json": extra_config(**ours),
            "hicache_storage_prefetch_policy": "wait_complete",
        }
        success, message = self._order({"do": "attach", "given": given})
        assert success, message
        try:
            yield
        finally:
            self.detach()
            self.forget()

    def attach_refused(self, **ours: Any) -> str:
        """Attach in vain; return what was said."""
        given = {
            "hicache_storage_backend": "dynamic",
            "hicache_storage_backend_extra_config_json": extra_config(**ours),
        }
        success, message = self._order({"do": "attach", "given": given})
        assert not success
        return str(message)

    def update_weights(self, model: Path) -> None:
        """Give the running engine other weights; it empties its own caches."""
        self.forget()
        assert self._order({"do": "update", "model": str(model)})

    def detach(self) -> None:
        """Go on without a storage; it refuses while something is on its way."""
        self._until("detach")

    def clear(self) -> None:
        """Forget what the storage keeps."""
        self._until("clear")

    def _until(self, what: str) -> None:
        deadline = time.monotonic() + _ORDER_S
        while not (answer := self._order({"do": what}))[0]:
            assert time.monotonic() < deadline, answer
            time.sleep(0.05)

    def close(self) -> None:
        """End it; what does not end in time is killed, its children too."""
        os.close(self._orders)
        try:
            self.process.wait(_ORDER_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(_ORDER_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        os.close(self._answers)

    def _order(self, order: dict[str, Any]) -> Any:
        os.write(self._orders, (json.dumps(order) + "\n").encode())
        return self._answer(_ORDER_S)

    def _answer(self, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = max(0.0, deadline - time.monotonic())
            data = b""
            if select.select([self._answers], [], [], left)[0]:
                data = os.read(self._answers, 1 << 16)
            assert data, f"no answer in {timeout_s} s:\n{self.log_tail()}"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def log_tail(self) -> str:
        """Return the last of what the engine said, its arguments left out."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(line[:300] for line in lines[-60:] if "server_args" not in line)


def extra_config(**ours: Any) -> str:
    """Return the text that SGLang takes our settings from."""
    config = {
        "backend_name": "kvstrata",
        "module_path": "kvstrata.connectors.sglang.storage",
        "class_name": "KvstrataStorage",
        "interface_v1": 1,
        "prefetch_threshold": PAGE_TOKENS,
        "hicache_storage_pass_prefix_keys": True,
    }
    return json.dumps(config | ours)


@contextmanager
def run_engine(
    model: Path, log: Path, extra: dict[str, Any] | None, **options: Any
) -> Iterator[Engine]:
    """Run an engine on `model`; `extra` is kvstrata's settings, None runs without a storage."""
    settings: dict[str, Any] = {
        "model_path": str(model),
        "skip_tokenizer_init": True,
        "device": "cpu",
        "attention_backend": "torch_native",
        "dtype": "float32",
        "disable_overlap_schedule": True,
        "sleep_on_idle": True,
        "mem_fraction_static": 0.2,
        "max_total_tokens": 1024,
        "page_size": PAGE_TOKENS,
        "max_running_requests": 4,
        "log_level": "warning",
        "enable_cache_report": True,
        "enable_hierarchical_cache": True,
        "hicache_ratio": 4,
        "hicache_io_backend": "direct",
        "hicache_mem_layout": "page_first_direct",
        "hicache_write_policy": "write_through",
        "hicache_storage_prefetch_policy": "wait_complete",
    }
    if extra is not None:
        settings["hicache_storage_backend"] = "dynamic"
        settings["hicache_storage_backend_extra_config"] = extra_config(**extra)
    engine = Engine(settings | options, log)
    try:
        engine.wait_started()
        yield engine
    finally:
        engine.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines warn of things that are not ours to mend; our own warnings stay errors."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.sglang)
            item.add_marker(pytest.mark.filterwarnings("error:::kvstrata"), append=False)
            item.add_marker(pytest.mark.filterwarnings("default"), append=False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, made once."""
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Path]:
    """`make_llama(folder, seed=0)` writes a model."""
    return write_llama


@pytest.fixture(scope="session")
def engine_on(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineFactory:
    """`with engine_on(settings) as engine:` runs the tiny Llama."""
    logs = tmp_path_factory.mktemp("logs")
    numbers = itertools.count()

    def start(
        extra: dict[str, Any] | None = None, *, model: Path | None = None, **options: Any
    ) -> AbstractContextManager[Engine]:
        log = logs / f"{next(numbers)}.log"
        return run_engine(model or tiny_model, log, extra, **options)

    return start


@pytest.fixture(scope="session")
def start_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`with start_process(arguments, driver, python, environment) as engine:` runs a driver."""
    logs = tmp_path_factory.mktemp("drivers")

    @contextmanager
    def start(
        arguments: dict[str, Any], driver: Path, python: Path, environment: dict[str, str]
    ) -> Iterator[Engine]:
        engine = Engine(arguments, logs / f"{driver.stem}.log", driver, python, environment)
        try:
            engine.wait_started(2 * _START_S)  # its workers are processes that start, too
            yield engine
        finally:
            engine.close()

    return start


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """A dozen prompts of lengths that end inside, at and just behind a page's end."""
    import random

    luck = random.Random(0)
    lengths = (100, 128, 129, 143, 160, 257, 300, 320, 33, 48, 200, 400)
    return [[luck.randrange(3, 512) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="session")
def engine(engine_on: EngineFactory) -> Iterator[Engine]:
    """One engine for every test that attaches and detaches its own storage."""
    with engine_on() as running:
        yield running


@pytest.fixture(scope="session")
def reference(engine: Engine, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """The answers of SGLang without kvstrata, each computed in full."""
    answers = []
    for prompt in prompts:
        engine.forget()
        (answer,) = engine.ask([prompt])
        assert answer.cached == 0
        answers.append(answer.tokens)
    return answers


@pytest.fixture
def daemon() -> Iterator[SharedDaemon]:
    """A daemon that outlives engines."""
    folder = Path(tempfile.mkdtemp(prefix="kv"))  # a socket's path must be short
    shared = SharedDaemon(folder)
    yield shared
    if shared.process.poll() is None:
        shared.signal(signal.SIGCONT)
        shared.signal(signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
