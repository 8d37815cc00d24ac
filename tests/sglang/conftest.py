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

import pytest

_SUPPORT = Path(__file__).parent / "support"
PAGE_TOKENS = 16
_SETTLE_S = 30.0

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

    def ask(self, prompts: Sequence[Sequence[int]], max_tokens: int = 8, **extra: Any) -> list[Answer]:
        """Answer every prompt greedily, one after the other."""
        return [self._answer(prompt, max_tokens, extra) for prompt in prompts]

    def _answer(self, prompt: Sequence[int], max_tokens: int, extra: dict[str, Any]) -> Answer:
        sampling = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
        given = {"input_ids": list(prompt), "sampling_params": sampling, **extra}
        output = self.engine.generate(**given)
        meta = output["meta_info"]
        details = meta.get("cached_tokens_details") or {}
        return Answer(
            tuple(output["output_ids"]), details.get("storage", 0), meta["cached_tokens"]
        )

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
