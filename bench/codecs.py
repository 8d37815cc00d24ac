"""What each codec does to KV of the demo's model: size, and GB/s of one core each way.

    python bench/codecs.py [--json FILE] [--quick]

The model's weights are random, its KV is not: keys are rotated, channels differ in scale. It is
computed by transformers (requirements/vllm-cpu.txt) for a text of the repository's own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvstrata.apps.cli.demo.model import make_model
from kvstrata.storage.codecs import BlockFacts, CodecSettings, make_chain
from kvstrata.storage.codecs.fp8 import Fp8Codec, measure_error

CHAINS = ("zstd", "aes", "zstd+aes", "fp8", "fp8+zstd")
BLOCK_TOKENS = 64
SECRET = bytes(range(32))


def model_kv(tokens: int) -> np.ndarray:
    """Return KV as [block, layer, key or value, head, token, channel], float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        wanted = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
        with torch.no_grad():
            cache = model(wanted, use_cache=True).past_key_values
    layers = [torch.stack([each.keys[0], each.values[0]]) for each in cache.layers]
    whole = torch.stack(layers).numpy()
    blocks = whole.shape[3] // BLOCK_TOKENS
    cut = whole[:, :, :, : blocks * BLOCK_TOKENS]
    parts = cut.reshape(*cut.shape[:3], blocks, BLOCK_TOKENS, cut.shape[4])
    return np.ascontiguousarray(parts.transpose(3, 0, 1, 2, 4, 5))


def best_s(call: Callable[[], object], times: int) -> float:
    """Return the shortest of several runs."""
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
    return min(found)


def measure(name: str, dtype: str, blocks: list[bytes], times: int) -> dict:
    """Return one line of the table."""
    chain = make_chain(name, CodecSettings(dtype, SECRET))
    facts = BlockFacts(b"k" * 16, b"f" * 16, b"n" * 8, b"t" * 8, len(blocks[0]))  # type: ignore[arg-type]
    label = chain.label(facts)
    stored = [bytes(chain.encode(memoryview(raw), facts)) for raw in blocks]
    into = memoryview(bytearray(len(blocks[0])))
    for raw, data in zip(blocks, stored, strict=True):
        assert chain.decode(label, memoryview(data), into, facts) is None
        assert chain.lossy or bytes(into) == raw
    total = len(blocks) * len(blocks[0])

    def encode() -> None:
        for raw in blocks:
            chain.encode(memoryview(raw), facts)

    def decode() -> None:
        for data in stored:
            chain.decode(label, memoryview(data), into, facts)

    return {
        "codec": name,
        "dtype": dtype,
        "block_bytes": len(blocks[0]),
        "ratio": round(total / sum(map(len, stored)), 3),
        "encode_gb_s": round(total / best_s(encode, times) / 1e9, 2),
        "decode_gb_s": round(total / best_s(decode, times) / 1e9, 2),
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    import ml_dtypes

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few tokens; only shows that it works")
    options = parser.parse_args()
    kv = model_kv(128 if options.quick else 1024)
    lines, errors = [], {}
    for dtype, kind in (("bfloat16", ml_dtypes.bfloat16), ("float32", np.float32)):
        blocks = [each.astype(kind).view(np.uint8).tobytes() for each in kv]
        for name in CHAINS:
            lines.append(line := measure(name, dtype, blocks, 1 if options.quick else 7))
            print(
                f"{dtype:9} {name:9} size / {line['ratio']:.2f}  encode {line['encode_gb_s']:5.2f}"
                f"  decode {line['decode_gb_s']:5.2f} GB/s"
            )
        codec = Fp8Codec(CodecSettings(dtype))
        facts = BlockFacts(b"k" * 16, b"f" * 16, b"n" * 8, b"t" * 8, len(blocks[0]))  # type: ignore[arg-type]
        found = [measure_error(codec, memoryview(raw), facts) for raw in blocks]
        worst = max(found, key=lambda each: each.relative_max)
        print(f"{dtype:9} {worst}")
        errors[dtype] = {
            "relative_max": round(worst.relative_max, 4),
            "root_mean_square": round(max(each.root_mean_square for each in found), 4),
            "within_bound": all(each.within_bound for each in found),
        }
    if options.json:
        options.json.write_text(json.dumps({"codecs": lines, "fp8_error": errors}, indent=1) + "\n")


if __name__ == "__main__":
    main()
