"""Real SGLang engines on a CPU, on a tiny Llama that is made here."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SUPPORT = Path(__file__).parent / "support"
PAGE_TOKENS = 16

# What SGLang's processes read when they start. One thread: two cores serve engine and daemon.
os.environ.update(
    PYTHONPATH=os.pathsep.join([str(_SUPPORT), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
    SGLANG_USE_CPU_ENGINE="1",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
)
if importlib.util.find_spec("sglang") is not None and str(_SUPPORT) not in sys.path:
    sys.path.insert(0, str(_SUPPORT))
    spec = importlib.util.spec_from_file_location("kvstrata_site", _SUPPORT / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))

EngineFactory = Callable[..., AbstractContextManager["Engine"]]


@dataclass
class Answer:
    """What came back for one prompt."""

    tokens: tuple[int, ...]
    from_storage: int
    cached: int


class Engine:
    """An SGLang engine, its scheduler in a process of its own."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def ask(
        self, prompts: Sequence[Sequence[int]], max_tokens: int = 8, **extra: Any
    ) -> list[Answer]:
        """Answer every prompt greedily, one after the other."""
        return [self._answer(prompt, max_tokens, extra) for prompt in prompts]

    def _answer(self, prompt: Sequence[int], max_tokens: int, extra: dict[str, Any]) -> Answer:
        sampling = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
        given = {"input_ids": list(prompt), "sampling_params": sampling, **extra}
        output = self.engine.generate(**given)
        meta = output["meta_info"]
        details = meta.get("cached_tokens_details") or {}
        return Answer(tuple(output["output_ids"]), details.get("storage", 0), meta["cached_tokens"])

    def forget(self) -> None:
        """Empty device and host pool; the storage keeps its pages."""
        assert self.engine.flush_cache().success


def write_llama(folder: Path, seed: int = 0) -> Path:
    """Write a Llama of 0.7 million random weights; its greedy answers are varied."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


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
def run_engine(model: Path, extra: dict[str, Any] | None, **options: Any) -> Iterator[Engine]:
    """Run an engine on `model`; `extra` is kvstrata's settings, None runs without a storage."""
    import sglang

    settings: dict[str, Any] = {
        "model_path": str(model),
        "skip_tokenizer_init": True,
        "device": "cpu",
        "attention_backend": "torch_native",
        "dtype": "float32",
        "disable_overlap_schedule": True,
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
    engine = sglang.Engine(**(settings | options))
    try:
        yield Engine(engine)
    finally:
        engine.shutdown()


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
def engine_on(tiny_model: Path) -> EngineFactory:
    """`with engine_on(settings) as engine:` runs the tiny Llama."""

    def start(
        extra: dict[str, Any] | None = None, *, model: Path | None = None, **options: Any
    ) -> AbstractContextManager[Engine]:
        return run_engine(model or tiny_model, extra, **options)

    return start


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """A dozen prompts of lengths that end inside, at and just behind a page's end."""
    import random

    luck = random.Random(0)
    lengths = (100, 128, 129, 143, 160, 257, 300, 320, 33, 48, 200, 400)
    return [[luck.randrange(3, 512) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="session")
def reference(engine_on: EngineFactory, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """The answers of SGLang without kvstrata, each computed in full."""
    with engine_on(disable_radix_cache=True, enable_hierarchical_cache=False) as engine:
        return [answer.tokens for answer in engine.ask(prompts)]


class SharedDaemon:
    """`kvstrata serve` in a process of its own."""

    def __init__(self, folder: Path, host: str = "64MiB", disk: str = "64MiB") -> None:
        self.folder = folder
        self.address = f"ipc://{folder}/node.sock"
        self.tiers = f"host:{host},disk:{folder / 'kv'}:{disk}"
        self.start()

    def start(self) -> None:
        """Start it and wait until it serves."""
        command = [sys.executable, "-m", "kvstrata.apps.cli.main", "serve"]
        self.process = subprocess.Popen(
            [*command, "--tiers", self.tiers, "--address", self.address],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "serves" in line:
                return
        raise AssertionError("the daemon did not start")

    def signal(self, number: int) -> None:
        """Send it a signal; after SIGKILL wait until it is gone."""
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait(10)
            self.process.stderr.close()

    def statistics(self) -> dict[str, Any]:
        """Return the daemon's statistics once everything saved has reached the disk."""
        from kvstrata.runtime.admin import AdminClient

        with AdminClient(self.address) as admin:
            admin.wait_idle(30)
            node: dict[str, Any] = admin.stats()["node"]
        return node


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
