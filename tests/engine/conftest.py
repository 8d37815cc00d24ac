"""Real vLLM engines in this process, on a tiny Llama that is made here."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kit import write_llama

# vLLM reads these when it is first imported. One thread: two engines and a daemon share two cores.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
)

EngineFactory = Callable[..., AbstractContextManager["Engine"]]


@dataclass
class Answer:
    """What came back for one prompt."""

    tokens: tuple[int, ...]
    cached: int
    tokens_from: dict[str, int]


class Engine:
    """A vLLM in this process, with or without kvstrata."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    @property
    def connector(self) -> Any:
        """The scheduler half's connector."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler.connector

    @property
    def worker(self) -> Any:
        """The worker half."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker

    def ask(
        self, prompts: Sequence[Sequence[int]], max_tokens: int = 16, **extra: Any
    ) -> list[Answer]:
        """Answer every prompt greedily; `extra` goes into each prompt."""
        from vllm import SamplingParams

        sampling = extra.pop("sampling", {})
        parameters = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **sampling
        )
        inputs = [{"prompt_token_ids": list(prompt), **extra} for prompt in prompts]
        outputs = self.llm.generate(inputs, parameters, use_tqdm=False)
        return [
            Answer(
                tuple(output.outputs[0].token_ids),
                output.num_cached_tokens,
                (output.kv_transfer_params or {}).get("kvstrata", {}).get("tokens_from", {}),
            )
            for output in outputs
        ]

    def forget(self) -> None:
        """Empty the engine's own prefix cache; kvstrata keeps its blocks."""
        assert self.llm.reset_prefix_cache()

    def wait_idle(self) -> None:
        """Wait until everything saved has reached the disk."""
        from kvstrata.runtime.admin import AdminClient

        with AdminClient(self.connector.daemon_address) as admin:
            admin.wait_idle(30)

    def counters(self) -> dict[str, int]:
        """Return the daemon's counters."""
        from kvstrata.runtime.admin import AdminClient

        with AdminClient(self.connector.daemon_address) as admin:
            counters: dict[str, int] = admin.stats()["node"]["counters"]
        return counters

    def stored(self, prompt: Sequence[int]) -> tuple[Any, list[bytes]]:
        """Return the layout and the bytes of the blocks that are kept for a prompt."""
        from kvstrata.storage.arena import Arena
        from kvstrata.tokens import lineage_digests, sequence_hashes
        from kvstrata.tokens.namespace import ModelKey, salted_key

        session = self.connector._scheduler.session
        key = salted_key(ModelKey(session.welcome.model_key), "")
        hashes = sequence_hashes(key, lineage_digests(prompt, 64))
        assert session.lookup("ours", hashes).ready == len(hashes)
        slots = session.acquire("ours", hashes).slots
        arena = Arena.attach(session.welcome.arena, session.layout)
        blocks = [bytes(arena.slot(slot)) for slot in slots]
        arena.close()
        session.release(["ours"])
        return session.layout, blocks


@contextmanager
def run_engine(
    model: Path, extra: dict[str, Any] | None = None, **options: Any
) -> Iterator[Engine]:
    """Run an engine on `model`; `extra` is kvstrata's configuration, None runs without it."""
    from vllm import LLM
    from vllm.config import KVTransferConfig
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    transfer = None
    if extra is not None:
        transfer = KVTransferConfig(
            kv_connector="KvstrataConnector",
            kv_connector_module_path="kvstrata.connectors.vllm",
            kv_role="kv_both",
            kv_connector_extra_config=extra,
        )
    settings: dict[str, Any] = {
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 8,
        "block_size": 32,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 64 << 20,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "kv_transfer_config": transfer,
    }
    llm = None
    try:
        llm = LLM(str(model), **(settings | options))
        yield Engine(llm)
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()  # a refused start leaves its worker half behind
        cleanup_dist_env_and_memory()
        gc.collect()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines warn of things that are not ours to mend; our own warnings stay errors."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("error:::kvstrata"), append=False)
            item.add_marker(pytest.mark.filterwarnings("default"), append=False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, made once."""
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeek-V2, made once: latents in its cache (MLA)."""
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=512,  # the only sizes that vLLM's CPU kernels know
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        max_position_embeddings=2048,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("deepseek")
    DeepseekV2ForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Path]:
    """`make_llama(folder, seed=0, spread=0.2)` writes a model."""
    return write_llama


@pytest.fixture(scope="session")
def engine_on(tiny_model: Path) -> EngineFactory:
    """`with engine_on(extra) as engine:` runs the tiny Llama."""

    def start(
        extra: dict[str, Any] | None = None, *, model: Path | None = None, **options: Any
    ) -> AbstractContextManager[Engine]:
        return run_engine(model or tiny_model, extra, **options)

    return start


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Prompts of lengths that end inside, at and just behind a block's end."""
    import random

    luck = random.Random(0)
    return [[luck.randrange(3, 512) for _ in range(length)] for length in (100, 128, 257, 40)]


@pytest.fixture(scope="session")
def reference(engine_on: EngineFactory, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """The answers of vLLM without kvstrata."""
    with engine_on() as engine:
        return [answer.tokens for answer in engine.ask(prompts)]


class Router:
    """What one who subscribes to vLLM's KV events believes of kvstrata's tiers."""

    def __init__(self, subscriber: Any) -> None:
        self.held: dict[tuple[str, int], set[Any]] = {}
        """By tier and by vLLM's cache group, the names of the pages there."""
        self.groups: dict[int, tuple[str, int, int | None]] = {}
        """Of each group its kind, the tokens of a page, and its window."""
        self._subscriber = subscriber
        self._next: dict[tuple[Any, tuple[int, ...]], Any] = {}  # names by parent and tokens

    def received(self) -> list[Any]:
        """Return the events that came, after they were believed."""
        import msgspec
        from vllm.distributed.kv_events import KVEventBatch

        told: list[Any] = []
        while self._subscriber.poll(300):
            data = self._subscriber.recv_multipart()[-1]
            told += msgspec.msgpack.decode(data, type=KVEventBatch).events
        for each in told:
            if not (getattr(each, "ownership", None) or "").startswith("kvstrata."):
                continue
            held = self.held.setdefault((each.ownership, each.group_idx), set())
            if hasattr(each, "token_ids"):
                held.update(each.block_hashes)
                self._learn(each)
            else:
                assert held.issuperset(each.block_hashes), "removed, and never told of"
                held.difference_update(each.block_hashes)
        return told

    def _learn(self, stored: Any) -> None:
        size = stored.block_size
        self.groups[stored.group_idx] = (
            stored.kv_cache_spec_kind, size, stored.kv_cache_spec_sliding_window,
        )  # fmt: skip
        parent = stored.parent_block_hash
        for place, name in enumerate(stored.block_hashes):
            tokens = tuple(stored.token_ids[place * size : (place + 1) * size])
            self._next[parent, tokens] = parent = name

    def tokens(self, prompt: Sequence[int], owner: str) -> int:
        """Return how many leading tokens of a prompt a tier has, by vLLM's rules for a hit."""
        best = 0
        for end in range(len(prompt) + 1 if self.groups else 0):
            needed = [self._needed(prompt, end, *group) for group in self.groups.values()]
            held = (self.held.get((owner, group), set()) for group in self.groups)
            if all(names and names <= has for names, has in zip(needed, held, strict=True)):
                best = end
        return best

    def _needed(
        self, prompt: Sequence[int], end: int, kind: str, size: int, window: int | None
    ) -> set[Any]:
        """Return the pages that one group needs for a hit of `end` tokens; none if it has none."""
        if end % size:
            return set()
        pages = end // size
        first = {
            "full_attention": 0,
            "sliding_window": max(0, end - (window or 0) + 1) // size,
            "mamba": pages - 1,
        }[kind]
        names, parent = [], None
        for page in range(pages):
            parent = self._next.get((parent, tuple(prompt[page * size : (page + 1) * size])), "?")
            names.append(parent)
        return set(names[first:])


@pytest.fixture
def router_at() -> Callable[[str], AbstractContextManager[Router]]:
    """`with router_at(address) as router:` subscribes to vLLM's publisher, from outside."""
    import zmq

    @contextmanager
    def subscribe(address: str) -> Iterator[Router]:
        with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
            subscriber.linger = 0
            subscriber.connect(address)
            subscriber.subscribe("")
            time.sleep(0.3)  # until the publisher knows of it
            yield Router(subscriber)

    return subscribe
