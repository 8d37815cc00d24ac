"""What kvstrata's storage costs an SGLang that finds nothing in it.

    .venv-sglang/bin/python bench/engines_sglang.py [--json FILE] [--quick] [--rounds N]

One SGLang with its hierarchical cache alone, and one with kvstrata attached to it, each in a
process of its own, answer eight new prompts of 512 tokens with 32 tokens, one after the other, in
turns. Run it after `make test-sglang`, which makes the environment; the engines start as the tests
start them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

# A script's own folder comes first on the path, and this one has files named like packages.
sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != Path(__file__).parent]
ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "tests" / "shared")]

from bench.engines import VOCABULARY, write_model  # noqa: E402
from tests.sglang.conftest import Engine, run_engine  # noqa: E402

BATCH = 8
ANSWER_TOKENS = 32


def measure(engines: dict[str, Engine], rounds: int, tokens: int) -> dict[str, list[float]]:
    """Return the seconds of each round by side; the first round only warms up."""
    luck = random.Random(0)
    spent: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        names = list(engines)
        for name in names if number % 2 else names[::-1]:
            prompts = [[luck.randrange(3, VOCABULARY) for _ in range(tokens)] for _ in range(BATCH)]
            began = time.perf_counter()
            answers = engines[name].ask(prompts, ANSWER_TOKENS)
            took = time.perf_counter() - began
            assert not any(each.from_storage for each in answers), "found what is new"
            if number:
                spent[name].append(took)
    return spent


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="only show that it works")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    rounds, tokens = (1, 128) if given.quick else (given.rounds, 512)
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        scratch = Path(folder)
        model = write_model(scratch / "model")
        options: dict[str, Any] = {"max_total_tokens": 8192, "hicache_ratio": 2}
        kept = {"tiers": f"host:1GiB,disk:{scratch / 'disk'}:4GiB"}
        with (
            run_engine(model, scratch / "alone.log", None, **options) as alone,
            run_engine(model, scratch / "kvstrata.log", kept, **options) as ours,
        ):
            spent = measure({"alone": alone, "kvstrata": ours}, rounds, tokens)
    moved = BATCH * (tokens + ANSWER_TOKENS)
    ratios = [b / t for b, t in zip(spent["alone"], spent["kvstrata"], strict=True)]
    result = {
        name: {"tokens_per_s": round(moved / median(took), 1)} for name, took in spent.items()
    } | {"rounds": rounds, "ratio": round(median(ratios), 4)}
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
