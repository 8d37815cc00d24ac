"""A prompt answered by transformers three times: computed, from memory, and from disk.

python examples/transformers_example.py

With a model of your own: put its path or hub name where the tiny one is written.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from tiny_llama import PROMPT, write_tiny_llama
from transformers import AutoModelForCausalLM

from kvstrata.connectors.transformers import KvstrataCache


def main(folder: Path) -> None:
    """Answer without kvstrata, then with it, and compare."""
    model = AutoModelForCausalLM.from_pretrained(write_tiny_llama(folder / "model"))
    prompt = torch.tensor([PROMPT])
    options = {
        "attention_mask": torch.ones_like(prompt),
        "do_sample": False,
        "max_new_tokens": 16,
        "pad_token_id": 0,
    }
    plain = model.generate(prompt, **options)
    answers = []
    tiers = f"host:256MiB,disk:{folder}/blocks:256MiB"
    # The second cache has a daemon of its own, which starts with what the first left on disk.
    for place in ("memory", "disk"):
        with KvstrataCache.for_model(model, tiers=tiers) as cache:
            for _ in range(2 if place == "memory" else 1):
                before = cache.statistics.loaded_tokens
                answers.append(cache.generate(prompt, **options))
                loaded = cache.statistics.loaded_tokens - before
                print(f"of {len(PROMPT)} tokens loaded {loaded} from {place if loaded else '-'}")
    if not all(torch.equal(plain, answer) for answer in answers):
        sys.exit("the answers differ")
    print("the answers are the same")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
