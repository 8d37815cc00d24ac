"""What kvstrata costs and gains in real engines, beside vLLM's own tiers and LMCache.

    python bench/engines.py [--only overhead] [--json FILE] [--quick] [--rounds N]
        [--lmcache PYTHON]

**Overhead.** Eight requests of 512 prompt and 32 answer tokens at once, none seen before: a vLLM
alone, one with a connector that does nothing (vLLM's own share), one with kvstrata that looks and
saves, the same where it only looks, and vLLM's own tiers. Ratios are of throughput and of the
engine thread's CPU time; a side settles before the next begins. One more round says how long each
call to the connector takes.

**Time to the first token** of one request, on a vLLM alone (`cold`) and where its prompt is kept:
in the host, or on disk after the engine and its cache were stopped and the system's page cache of
the files was dropped. Peers: vLLM's OffloadingConnector with its file system tier (which runs on
CPUs by `peers/vllm_tiering.py`) and, if `--lmcache` names a Python that has it, LMCache's server.

Every round goes through all sides, in an order that turns; times are medians. All answers to one
prompt are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

# A script's own folder comes first on the path, and this one has files named like packages.
sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != Path(__file__).parent]

VOCABULARY = 8192
LENGTHS = (512, 1024, 2048)
CONTEXT_TOKENS = 2304
CACHE_BYTES = 384 << 20
BATCH = 8
ANSWER_TOKENS = 32
START_S = 300.0
ORDER_S = 300.0


class Child:
    """One engine in a process of its own (vllm_child.py)."""

    def __init__(self, python: str, log: Path, **arguments: Any) -> None:
        """Begin to start it."""
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        self._log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [python, str(Path(__file__).with_name("vllm_child.py")), str(orders), str(answers),
                 json.dumps(arguments)],
                pass_fds=(orders, answers), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        os.close(orders)
        os.close(answers)
        self._lines = os.fdopen(self._answers)
        self._read()

    def ask(self, prompts: Sequence[Sequence[int]], max_tokens: int, **extra: Any) -> Any:
        """Return seconds, tokens and how many tokens were found, for all prompts at once."""
        return self.order(do="ask", prompts=prompts, max_tokens=max_tokens, **extra)

    def order(self, **order: Any) -> Any:
        """Return what it answers to an order."""
        os.write(self._orders, (json.dumps(order) + "\n").encode())
        return self._read()

    def close(self) -> None:
        """End it."""
        os.close(self._orders)
        self._process.wait(60)
        self._lines.close()

    def _read(self) -> Any:
        line = self._lines.readline()
        if not line:
            self._process.wait(60)
            end = "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])
            raise SystemExit(f"an engine ended with {self._process.returncode}:\n{end}")
        return json.loads(line)


def write_model(folder: Path) -> Path:
    """Write a Llama of 82 million random weights; its answers are varied."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=11, num_attention_heads=12,
        num_key_value_heads=4, vocab_size=VOCABULARY, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
        initializer_range=0.05,
    )  # fmt: skip
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


def prompt_of(tokens: int, seed: int) -> list[int]:
    """Return a prompt that no other seed begins like."""
    luck = random.Random(seed)
    return [luck.randrange(3, VOCABULARY) for _ in range(tokens)]


def turned(names: Sequence[str], number: int) -> list[str]:
    """Return the names in another order each round."""
    at = number % len(names)
    return [*names[at:], *names[:at]]


class Sides:
    """The engines of one measurement, each with a folder for its disk."""

    def __init__(self, model: Path, scratch: Path, lmcache: str | None) -> None:
        """Know the sides; `lmcache` is a Python that has LMCache, or None."""
        self.names = ["alone", "kvstrata", "tiering", *(["lmcache"] if lmcache else [])]
        self._model = model
        self._scratch = scratch
        self._lmcache = lmcache

    @contextmanager
    def running(self, names: Sequence[str]) -> Iterator[dict[str, Child]]:
        """Run them; what they keep on disk is not in the page cache when they start."""
        with ExitStack() as stack:
            children = {}
            for name in names:
                folder = self._scratch / name
                folder.mkdir(exist_ok=True)
                forget_pages(folder)
                address = ""
                if name == "lmcache":
                    address = stack.enter_context(lmcache_server(self._lmcache or "", folder))
                children[name] = Child(
                    self._lmcache or "" if name == "lmcache" else sys.executable,
                    self._scratch / f"{name}.log",
                    model=str(self._model), way=name, folder=str(folder), address=address,
                    context_tokens=CONTEXT_TOKENS, cache_bytes=CACHE_BYTES,
                )  # fmt: skip
                stack.callback(children[name].close)
            yield children


def forget_pages(folder: Path) -> None:
    """Drop the system's cached pages of every file below `folder`."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def lmcache_server(python: str, folder: Path) -> Iterator[str]:
    """Run LMCache's server, with its file system tier in `folder`; yields its address."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        port, http = one.getsockname()[1], two.getsockname()[1]
    command = [
        str(Path(python).with_name("lmcache")), "server", "--supported-transfer-mode", "auto",
        "--host", "127.0.0.1", "--port", str(port),
        "--http-host", "127.0.0.1", "--http-port", str(http),
        "--l1-size-gb", "1", "--l1-init-size-gb", "1", "--chunk-size", "64",
        "--eviction-policy", "LRU",
        "--l2-adapter", json.dumps({"type": "fs", "base_path": str(folder)}),
    ]  # fmt: skip
    with (folder.parent / "lmcache-server.log").open("ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {
            "LMCACHE_TRACK_USAGE": "false", "OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"LMCache's server does not start, see {log.name}")
            time.sleep(0.2)
        yield f"tcp://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def overhead(sides: Sides, rounds: int, tokens: int) -> dict[str, Any]:
    """Return throughput, and its ratio to a vLLM alone, where nothing is ever found."""
    looking = {"kv_transfer_params": {"kvstrata": {"store": False}}}
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "alone": ("alone", {}),
        "null connector": ("null", {}),
        "kvstrata": ("kvstrata", {}),
        "kvstrata, not saving": ("kvstrata", {"extra": looking}),
        "tiering": ("tiering", {}),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    busy: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    with sides.running(["alone", "null", "kvstrata", "tiering"]) as children:
        for number in range(rounds + 1):
            for place, name in enumerate(turned(list(ways), number)):
                child, given = ways[name]
                seed = 100_000 + 1000 * number + 100 * place
                prompts = [prompt_of(tokens, seed + each) for each in range(BATCH)]
                answer = children[child].ask(prompts, ANSWER_TOKENS, **given)
                assert not any(answer["cached"]), "something was found of a prompt that is new"
                # What it still writes must not slow the next side down.
                children[child].order(do="settle")
                if number:  # the first round only warms up
                    spent[name].append(answer["seconds"])
                    busy[name].append(answer["cpu"])
        calls = {
            name: accounted(children[ways[name][0]], tokens, place, ways[name][1])
            for place, name in enumerate(ways)
            if name != "alone"
        }
    moved = BATCH * (tokens + ANSWER_TOKENS)
    return {
        name: against(name, spent, busy, moved) | ({"calls": calls[name]} if name in calls else {})
        for name in ways
    }


def against(
    name: str, spent: dict[str, list[float]], busy: dict[str, list[dict[str, float]]], moved: int
) -> dict[str, Any]:
    """Return throughput and CPU time of one side, and their ratios to a vLLM alone."""
    took, base = spent[name], spent["alone"]
    base_cpu = [each["engine"] for each in busy["alone"]]
    return {
        "tokens_per_s": round(moved / median(took), 1),
        "ratio": round(median(base) / median(took), 4),
        "ratio_of_rounds": round(median(b / t for b, t in zip(base, took, strict=True)), 4),
        "cpu_us_per_token": {
            who: round(1e6 * median(each[who] for each in busy[name]) / moved, 1)
            for who in busy[name][0]
        },
        "cpu_ratio_of_rounds": round(
            median(b / c["engine"] for b, c in zip(base_cpu, busy[name], strict=True)), 4
        ),
    }


def accounted(child: Child, tokens: int, place: int, given: dict[str, Any]) -> dict[str, Any]:
    """Return what one further round spends in the connector: all calls, and each, in ms."""
    prompts = [prompt_of(tokens, 90_000 + 100 * place + each) for each in range(BATCH)]
    answer = child.order(do="account", prompts=prompts, max_tokens=ANSWER_TOKENS, **given)
    assert not any(answer["cached"]), "something was found of a prompt that is new"
    child.order(do="settle")
    found = {
        name: {"times": times, "ms": round(1e3 * seconds, 2)}
        for name, (times, seconds) in sorted(answer["calls"].items(), key=lambda one: -one[1][1])
    }
    outer = sum(seconds for name, (_, seconds) in answer["calls"].items() if name[0] != ".")
    return {"share_of_round": round(outer / answer["seconds"], 5), "each": found}


def first_token(sides: Sides, lengths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Return the time to the first token by length and side: cold, host hit, disk hit."""
    prompts = {
        tokens: [prompt_of(tokens, 1000 * tokens + each) for each in range(rounds + 1)]
        for tokens in lengths
    }
    rows = {tokens: {"tokens": tokens, "ms": {}, "found": {}} for tokens in lengths}
    answers: dict[tuple[int, int], Any] = {}

    def measure(children: dict[str, Child], kind: str, tokens: int) -> None:
        took: dict[str, list[float]] = {name: [] for name in children}
        found: dict[str, list[int]] = {name: [] for name in children}
        for number, prompt in enumerate(prompts[tokens]):
            for name in turned(list(children), number):
                answer = children[name].ask([prompt], 1)
                first = answers.setdefault((tokens, number), answer["tokens"])
                assert answer["tokens"] == first, f"{name} answers {tokens}/{number} otherwise"
                if number:
                    took[name].append(1e3 * answer["seconds"])
                    found[name].append(answer["cached"][0])
        for name in children:
            rows[tokens]["ms"][f"{kind}, {name}"] = round(median(took[name]), 2)
            rows[tokens]["found"][f"{kind}, {name}"] = int(median(found[name]))

    def rest(children: dict[str, Child]) -> None:
        for child in children.values():
            child.order(do="settle")
            child.order(do="forget")

    keeping = [name for name in sides.names if name != "alone"]
    with sides.running(sides.names) as children:
        for tokens in lengths:
            measure({"alone": children["alone"]}, "cold", tokens)
            keepers = {name: children[name] for name in keeping}
            measure(keepers, "stored", tokens)
            rest(keepers)
            measure(keepers, "host", tokens)
            rest(keepers)
    with sides.running(keeping) as children:
        for tokens in lengths:
            measure(children, "disk", tokens)
    return list(rows.values())


def show(result: dict[str, Any]) -> None:
    """Print both tables."""
    print(f"\n{'Where nothing is found':<28} tokens/s  of a vLLM alone  its CPU  in our calls")
    for name, line in result["overhead"].items():
        share = line.get("calls", {}).get("share_of_round", 0.0)
        ratios = f"{line['ratio_of_rounds']:>15.3f} {line['cpu_ratio_of_rounds']:>8.3f}"
        print(f"  {name:<26} {line['tokens_per_s']:>8} {ratios} {100 * share:>11.2f} %")
        print(f"    CPU us a token: {line['cpu_us_per_token']}")
        for call, spent in list(line.get("calls", {}).get("each", {}).items())[:12]:
            print(f"      {call:<44} {spent['times']:>5} x {spent['ms']:>9.2f} ms in all")
    for row in result.get("first_token", []):
        print(f"\nTime to the first token, {row['tokens']} tokens      ms      tokens found")
        for name, each in row["ms"].items():
            print(f"  {name:<28} {each:>12.1f} {row['found'][name]:>12}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="only show that it works")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("overhead", "first_token"), help="measure only this")
    parser.add_argument("--lmcache", metavar="PYTHON", help="a Python that has vLLM and LMCache")
    given = parser.parse_args()
    rounds, lengths, tokens = given.rounds, LENGTHS, 512
    if given.quick:
        rounds, lengths, tokens = 1, LENGTHS[:1], 128
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        scratch = Path(folder)
        model = write_model(scratch / "model")
        result: dict[str, Any] = {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "rounds": rounds,
            "overhead": {},
        }
        if given.only != "first_token":
            result["overhead"] = overhead(Sides(model, scratch, None), rounds, tokens)
        if given.only != "overhead":
            sides = Sides(model, scratch, given.lmcache)
            result["first_token"] = first_token(sides, lengths, rounds)
    show(result)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
