"""A prompt answered by SGLang twice; the second time its KV comes from kvstrata.

python examples/sglang_example.py

With a model of your own: put its path or hub name where the tiny one is written.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import sglang
import torch
from tiny_llama import PROMPT, write_tiny_llama

GREEDY = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
FLUSHES_MAX = 300


def main(folder: Path) -> None:
    """Answer, forget what SGLang itself has cached, answer again, and compare."""
    storage = {
        "backend_name": "kvstrata",
        "module_path": "kvstrata.connectors.sglang.storage",
        "class_name": "KvstrataStorage",
        "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": True,
        "prefetch_threshold": 64,
        "tiers": f"host:256MiB,disk:{folder}/blocks:256MiB",
    }
    engine = sglang.Engine(
        model_path=str(write_tiny_llama(folder / "model")),
        skip_tokenizer_init=True,
        device="cuda" if torch.cuda.is_available() else "cpu",
        attention_backend="torch_native",
        dtype="float32",
        mem_fraction_static=0.2,
        max_total_tokens=1024,
        page_size=64,
        disable_overlap_schedule=True,
        log_level="warning",
        enable_cache_report=True,
        enable_hierarchical_cache=True,
        hicache_io_backend="direct",
        hicache_mem_layout="page_first_direct",
        hicache_write_policy="write_through",
        hicache_storage_backend="dynamic",
        hicache_storage_backend_extra_config=json.dumps(storage),
        hicache_storage_prefetch_policy="wait_complete",
    )
    first = ask(engine, "first time")
    forget(engine)  # from here on, every hit is kvstrata's
    again = ask(engine, "again")
    engine.shutdown()
    if first != again:
        sys.exit("the answers differ")
    print("the answers are the same")


def ask(engine: sglang.Engine, when: str) -> list[int]:
    """Return the answer's tokens; print where the prompt's KV came from."""
    output = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
    places = output["meta_info"].get("cached_tokens_details") or {}
    loaded = {name: tokens for name, tokens in places.items() if name != "storage_backend"}
    print(f"{when}: of {len(PROMPT)} tokens loaded {loaded}")
    return list(output["output_ids"])


def forget(engine: sglang.Engine) -> None:
    """Empty device and host pool; SGLang refuses while something is being written."""
    for _ in range(FLUSHES_MAX):
        if engine.flush_cache().success:
            return
        time.sleep(0.1)
    sys.exit("SGLang does not come to rest")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
