"""One cache for all: blocks of one engine continue in the others, to the tokens of a cold run.

vLLM runs in a process of another environment, where its packages are; SGLang in one of this one's,
transformers in this process. One daemon serves them all; who comes first decides its layout.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from kit import SharedDaemon

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]  # three engines start first

BLOCK_TOKENS = 64
LENGTHS = (100, 200, 321, 450)
WHOLE = [length // BLOCK_TOKENS * BLOCK_TOKENS for length in LENGTHS]
ANSWER_TOKENS = 16
ROUNDING_MAX = 1e-4  # of the largest number; float32


def vllm_python() -> Path | None:
    """The Python of the environment that has vLLM, beside this one; None if there is none."""
    named = os.environ.get("KVSTRATA_TEST_VLLM_PYTHON")
    python = Path(named) if named else Path(sys.prefix).parent / ".venv" / "bin" / "python"
    if not python.exists():
        return None
    found = subprocess.run(
        [python, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"],
        check=False,
        env=clean_environment(),
    )
    return python if found.returncode == 0 else None


def clean_environment() -> dict[str, str]:
    """This environment without what SGLang needs on a CPU, and with our own package."""
    import kvstrata

    ours = {"PYTHONPATH": str(Path(kvstrata.__file__).parents[1])}
    return {k: v for k, v in os.environ.items() if not k.startswith("SGLANG")} | ours


class Daemon(SharedDaemon):
    """`kvstrata serve` at one address, that may be emptied or killed and started again.

    It offers all that it keeps: a tiny model computes so fast that a load may not be worth it.
    """

    def __init__(self, folder: Path) -> None:
        self._at, self._kept = folder, 0
        super().__init__(
            folder,
            tiers=self._tiers(),
            limits={"weigh_costs": False},
            environment=clean_environment(),
        )

    def _tiers(self) -> str:
        return f"host:64MiB,disk:{self._at / f'kv{self._kept}'}:64MiB"

    def emptied(self) -> None:
        """Start over with nothing kept, and no layout."""
        self.signal(signal.SIGKILL)
        self._kept += 1
        self.tiers = self._tiers()
        self.start()

    def killed(self) -> None:
        """Start over with what the disk has."""
        self.statistics()
        self.signal(signal.SIGKILL)
        self.start()

    def sessions(self) -> int:
        from kvstrata.runtime.admin import AdminClient

        with AdminClient(self.address) as admin:
            return admin.stats()["sessions"]


@pytest.fixture(scope="module")
def shared():
    """A daemon for every engine of this module."""
    import shutil

    folder = Path(tempfile.mkdtemp(prefix="kv"))  # a socket's path must be short
    daemon = Daemon(folder)
    yield daemon
    daemon.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def prompts():
    import random

    luck = random.Random(5)
    return [[luck.randrange(3, 512) for _ in range(length)] for length in LENGTHS]


class Vllm:
    """A vLLM with two workers in its own environment (vllm_driver.py)."""

    def __init__(self, engine, shared) -> None:
        self._engine, self._shared = engine, shared

    def _step(self) -> None:
        prompt = [9] * (BLOCK_TOKENS + 1)  # a shorter one asks the daemon nothing
        self._engine._order({"do": "ask", "given": {"prompts": [prompt], "max_tokens": 2}})

    def ask(self, prompts) -> tuple[list, list[int]]:
        """Answer with an empty device cache; return tokens, and how many each were loaded."""
        deadline = time.monotonic() + 120
        while not self._engine._order({"do": "forget"}):
            assert time.monotonic() < deadline
        self._step()
        while not self._shared.sessions():  # it looks for a daemon that was lost while it steps
            assert time.monotonic() < deadline
            time.sleep(0.1)
            self._step()
        self._step()
        given = {"prompts": prompts, "max_tokens": ANSWER_TOKENS}
        said = self._engine._order({"do": "ask", "given": given})
        return [each["tokens"] for each in said], [sum(each["from"].values()) for each in said]


@pytest.fixture(scope="module")
def vllm(shared, tiny_model, start_process):
    python = vllm_python()
    if python is None:
        pytest.skip("no vLLM beside this environment (KVSTRATA_TEST_VLLM_PYTHON names another)")
    arguments = {
        "model": str(tiny_model),
        "kvstrata": {"address": shared.address, "block_tokens": BLOCK_TOKENS},
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 4,
        "block_size": 32,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 64 << 20,
        "skip_tokenizer_init": True,
    }
    driver = Path(__file__).parent / "vllm_driver.py"
    with start_process(arguments, driver, python, clean_environment()) as engine:
        yield Vllm(engine, shared)


class Sglang:
    """An SGLang with one worker, which attaches for each run."""

    def __init__(self, engine, address: str) -> None:
        self._engine, self._address = engine, address

    def ask(self, prompts) -> tuple[list, list[int]]:
        with self._engine.attached(address=self._address):
            said = self._engine.ask(prompts, max_tokens=ANSWER_TOKENS)
        return [list(each.tokens) for each in said], [each.from_storage for each in said]

    def cold(self, prompts) -> list:
        self._engine.forget()
        return [list(each.tokens) for each in self._engine.ask(prompts, max_tokens=ANSWER_TOKENS)]


@pytest.fixture(scope="module")
def sglang(shared, engine_on):
    with engine_on(page_size=BLOCK_TOKENS, max_total_tokens=4096) as engine:
        yield Sglang(engine, shared.address)


class Transformers:
    """A model in this process, with a cache for each run."""

    def __init__(self, folder: Path, address: str) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        self._folder, self._address = folder, address

    def cache(self):
        from kvstrata.connectors.transformers import KvstrataCache

        return KvstrataCache.for_model(
            self._model, address=self._address, model_name=self._folder.name
        )

    def _generate(self, ask, prompt) -> list:
        import torch

        ids = torch.tensor([prompt])
        said = ask(ids, max_new_tokens=ANSWER_TOKENS, min_new_tokens=ANSWER_TOKENS, do_sample=False)
        return said[0, len(prompt) :].tolist()

    def ask(self, prompts) -> tuple[list, list[int]]:
        tokens, loaded = [], []
        with self.cache() as cache:
            for prompt in prompts:
                before = cache.statistics.loaded_tokens
                tokens.append(self._generate(cache.generate, prompt))
                loaded.append(cache.statistics.loaded_tokens - before)
        return tokens, loaded

    def cold(self, prompts) -> list:
        return [self._generate(self._model.generate, prompt) for prompt in prompts]

    def differences(self, prompts) -> list[float]:
        """How far the kept KV of each prompt is from what this model computes, as a share."""
        import torch
        from transformers import DynamicCache

        found = []
        with self.cache() as cache:
            for prompt in prompts:
                ids = torch.tensor([prompt])
                mine = DynamicCache(config=self._model.config)
                with torch.no_grad():
                    self._model(ids, past_key_values=mine)
                cache.begin(ids)
                size = len(prompt) // BLOCK_TOKENS * BLOCK_TOKENS
                assert cache.get_seq_length() == size, "all full blocks are kept"
                for kept, own in zip(cache.layers, mine.layers, strict=True):
                    for ours, theirs in ((kept.keys, own.keys), (kept.values, own.values)):
                        off = (ours - theirs[:, :, :size]).abs().max() / theirs.abs().max()
                        found.append(float(off))
        return found


@pytest.fixture(scope="module")
def transformers(shared, tiny_model):
    return Transformers(tiny_model, shared.address)


@pytest.fixture(scope="module")
def engines(vllm, sglang, transformers):
    return {"vllm": vllm, "sglang": sglang, "transformers": transformers}


@pytest.fixture(scope="module")
def cold(shared, engines, prompts):
    """Each engine's own answers, with nothing loaded, by its name."""
    shared.emptied()
    tokens, loaded = engines["vllm"].ask(prompts)
    assert loaded == [0] * len(prompts)
    own = {name: engines[name].cold(prompts) for name in ("sglang", "transformers")}
    return own | {"vllm": tokens}


LAYOUTS = {
    "vllm": "vllm-cpu-vec [rank=2 ",
    "sglang": "sglang-pages [kv=2 ",
    "transformers": "transformers-dynamic [layer=4 ",
}


@pytest.mark.parametrize("writer", LAYOUTS)
def test_blocks_of_one_engine_continue_in_the_others(engines, cold, shared, prompts, writer):
    readers = [name for name in LAYOUTS if name != writer]
    shared.emptied()
    tokens, loaded = engines[writer].ask(prompts)
    assert (tokens, loaded) == (cold[writer], [0] * len(prompts)), "it writes, cold"
    largest = max(engines["transformers"].differences(prompts))
    sys.stderr.write(f"{writer}: largest difference {largest:.2e}\n")  # pytest -s shows it
    assert largest < ROUNDING_MAX
    for reader in readers:
        shared.killed()  # the reader is the first to say hello, over the writer's disk
        tokens, loaded = engines[reader].ask(prompts)
        assert tokens == cold[reader], f"{reader} goes on where {writer} was"
        node = shared.statistics()
        assert loaded == WHOLE, (reader, node["counters"])
        assert node["layout"].startswith(LAYOUTS[writer]), "the disk's layout is the daemon's"
        assert node["counters"]["corrupt_blocks"] == 0
    tokens, loaded = engines[reader].ask(prompts)
    assert (tokens, loaded) == (cold[reader], WHOLE), "from the host, too"
