"""What kvstrata's two seams cost an SGLang that finds nothing in them.

    .venv-sglang/bin/python bench/engines_sglang.py [--json FILE] [--quick] [--rounds N]

Four SGLangs, each in a process of its own, answer eight new prompts of 512 tokens with 32 tokens,
one after the other, in turns: one alone; one with its hierarchical cache, which SGLang wants for a
storage; that with kvstrata as the storage; and one with kvstrata's linker. So the storage is held
against the hierarchical cache, and the linker against the SGLang alone. Both save all they see, and
a round ends when it is where it is to be, outside of the measured time. Run it after `make
test-sglang`, which makes the environment; the engines start as the tests start them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

# A script's own folder comes first on the path, and this one has files named like packages.
sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != Path(__file__).parent]
ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "tests" / "shared")]

from bench.engines import VOCABULARY, turned, write_model  # noqa: E402
from kit import SharedDaemon  # noqa: E402
from tests.sglang.conftest import Engine, run_engine  # noqa: E402
from tests.sglang.test_sglang_linker import linked_options, wait_saved  # noqa: E402

BATCH = 8
ANSWER_TOKENS = 32


BASES = {"hierarchy": "alone", "storage": "hierarchy", "linker": "alone"}
"""What each side is held against."""


def measure(
    engines: dict[str, Engine], daemon: SharedDaemon, rounds: int, tokens: int
) -> dict[str, list[float]]:
    """Return the seconds of each round by side; the first round only warms up."""
    luck = random.Random(0)
    spent: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name in turned(list(engines), number):
            prompts = [[luck.randrange(3, VOCABULARY) for _ in range(tokens)] for _ in range(BATCH)]
            began = time.perf_counter()
            answers = engines[name].ask(prompts, ANSWER_TOKENS)
            took = time.perf_counter() - began
            assert not any(each.cached for each in answers), "found what is new"
            if number:
                spent[name].append(took)
            wait_saved(daemon)  # what it still writes must not slow the next side down
    return spent


def compared(spent: dict[str, list[float]], moved: int) -> dict[str, Any]:
    """Return throughput by side, and the ratio to what it is held against."""
    sides: dict[str, Any] = {}
    for name, took in spent.items():
        base = BASES.get(name, name)
        ratios = [b / t for b, t in zip(spent[base], took, strict=True)]
        sides[name] = {
            "tokens_per_s": round(moved / median(took), 1),
            "against": base,
            "ratio": round(median(spent[base]) / median(took), 4),
            "ratio_of_rounds": round(median(ratios), 4),
        }
    return sides


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="only show that it works")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    rounds, tokens = (1, 128) if given.quick else (given.rounds, 512)
    with tempfile.TemporaryDirectory(prefix="engines-") as folder, ExitStack() as stack:
        scratch = Path(folder)
        model = write_model(scratch / "model")
        daemon = SharedDaemon(scratch, host="1GiB", disk="4GiB")
        stack.callback(daemon.signal, signal.SIGKILL)
        options: dict[str, Any] = {"max_total_tokens": 8192}
        plain = {"enable_hierarchical_cache": False}
        sides: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
            "alone": (None, plain),
            "hierarchy": (None, {"hicache_ratio": 2}),
            "storage": ({"address": daemon.address}, {"hicache_ratio": 2}),
            "linker": (None, linked_options(daemon.address)),
        }
        engines = {
            name: stack.enter_context(
                run_engine(model, scratch / f"{name}.log", extra, **options | added)
            )
            for name, (extra, added) in sides.items()
        }
        spent = measure(engines, daemon, rounds, tokens)
        stored = daemon.statistics()["counters"]["stored_blocks"]
    assert stored, "nothing was saved, so nothing was measured"
    result = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "rounds": rounds,
        "stored_blocks": stored,
        "sides": compared(spent, BATCH * (tokens + ANSWER_TOKENS)),
    }
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
