"""Time to the first token of transformers, without the cache and with it: host hit, disk hit.

    python bench/ttft_transformers.py [--json FILE] [--quick] [--rounds N]

The model is a Llama of 82 million random weights in float32. Every time is a whole call that
answers one token: `model.generate` for `cold`; `cache.generate`, looking and storing included, for
the rest. `stored` is the first call with a prompt: all is computed, and kept. For `disk` the host
tier is cleared before. Rounds go through all ways in turn; times are medians. All answers of one
prompt are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

# A script's own folder comes first on the path, and this file has the name of what it measures.
sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != Path(__file__).parent]

import torch  # noqa: E402
import transformers  # noqa: E402

from kvstrata.connectors.transformers import KvstrataCache  # noqa: E402
from kvstrata.runtime.admin import AdminClient  # noqa: E402

LENGTHS = (512, 1024, 2048)
VOCABULARY = 8192


def make_model() -> Any:
    """The model; the same weights each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=11, num_attention_heads=12,
        num_key_value_heads=4, vocab_size=VOCABULARY, max_position_embeddings=4096,
        eos_token_id=None, bos_token_id=None, pad_token_id=None, initializer_range=0.05,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return milliseconds and the answer."""
    began = time.perf_counter()
    answer = call()
    return 1e3 * (time.perf_counter() - began), answer


def measure(model: Any, cache: KvstrataCache, tokens: int, rounds: int) -> dict[str, Any]:
    """Return the medians for prompts of `tokens`, and check that all ways answer the same."""
    times: dict[str, list[float]] = {"cold": [], "stored": [], "host": [], "disk": []}
    loaded: dict[str, int] = {}
    with AdminClient(cache.address) as admin:
        for number in range(rounds + 1):  # the first round only warms up
            luck = torch.Generator().manual_seed(1000 * tokens + number)
            ids = torch.randint(0, VOCABULARY, (1, tokens), generator=luck)
            answers = []
            for way, took in times.items():
                if way in {"host", "disk"}:
                    admin.wait_idle(60.0)  # what was stored is sealed and written behind us
                if way == "disk":
                    admin.clear(["host"])
                before = cache.statistics.loaded_tokens
                source = model if way == "cold" else cache
                spent, answer = timed(
                    partial(source.generate, ids, max_new_tokens=1, do_sample=False)
                )
                loaded[way] = cache.statistics.loaded_tokens - before
                answers.append(answer)
                if number:
                    took.append(spent)
            assert all(torch.equal(answers[0], each) for each in answers), "answers differ"
            assert loaded["host"] == loaded["disk"] == (tokens - 1) // 64 * 64, loaded
    line: dict[str, Any] = {"tokens": tokens, "loaded_tokens": loaded["host"]}
    line |= {f"{way}_ms": round(median(each), 1) for way, each in times.items()}
    return line | {
        "cold_by_host": round(line["cold_ms"] / line["host_ms"], 1),
        "cold_by_disk": round(line["cold_ms"] / line["disk_ms"], 1),
    }


def main() -> None:
    """Measure, print a table, write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="only shows that it works")
    chosen = parser.parse_args()
    lengths, rounds = (LENGTHS[:1], 1) if chosen.quick else (LENGTHS, chosen.rounds)
    torch.set_num_threads(1)  # two would wait for each other on a shared machine
    model = make_model()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        tiers = f"host:1GiB,disk:{folder}/kv:2GiB"
        start_ms, cache = timed(lambda: KvstrataCache.for_model(model, tiers=tiers))
        with cache:
            unusable_ms, _ = timed(cache.binding.unusable)
            print(f"for_model {start_ms:.0f} ms, looking for changes {unusable_ms:.1f} ms")
            print(f"{'tokens':>6}{'cold':>9}{'stored':>9}{'host':>9}{'disk':>9}   ms")
            for tokens in lengths:
                lines.append(line := measure(model, cache, tokens, rounds))
                ways = "".join(
                    f"{line[f'{way}_ms']:>9.1f}" for way in ("cold", "stored", "host", "disk")
                )
                print(f"{tokens:>6}{ways}", flush=True)
    result = {
        "command": f"python bench/ttft_transformers.py --rounds {rounds}",
        "machine": {
            "cores": os.cpu_count(), "shared": True, "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        },
        "parameters": sum(each.numel() for each in model.parameters()),
        "for_model_ms": round(start_ms, 1),
        "unusable_ms": round(unusable_ms, 2),
        "results": lines,
    }  # fmt: skip
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
