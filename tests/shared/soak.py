"""Many requests of all kinds at once, for as long as you say; every answer is checked.

    PYTHONPATH=src python tests/shared/soak.py --minutes 30

runs vLLM on the tiny Llama over a daemon whose tiers are as small as the engine's own cache, kills
the daemon once in the middle, and prints what happened. It exits with 1 after a wrong answer.
What is right was said before by the same engine without kvstrata, one request at a time.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit import SharedDaemon, write_llama

__all__ = ["Conversation", "Soak", "conversations", "main", "soak"]

AT_ONCE = 64
ANSWER_TOKENS = 12
SMALL = {"max_num_seqs": AT_ONCE, "max_num_batched_tokens": 192, "kv_cache_memory_bytes": 12 << 20}
"""Prompts are prefilled in pieces, and 64 requests need more pages than there are."""


@dataclass
class Conversation:
    """Prompts that grow turn by turn, each with the answer that is right."""

    head: list[int]
    """The first turn's prompt."""
    news: list[list[int]]
    """What each later turn adds behind the answer before it."""
    turns: list[tuple[list[int], tuple[int, ...]]] = field(default_factory=list)
    """Prompt and answer of every turn, filled in by the engine without kvstrata."""

    def next_prompt(self) -> list[int] | None:
        """Return the prompt of the next turn that has no answer yet; None after the last."""
        if not self.turns:
            return self.head
        if len(self.turns) > len(self.news):
            return None
        prompt, answer = self.turns[-1]
        return [*prompt, *answer, *self.news[len(self.turns) - 1]]


def conversations(count: int, seed: int) -> list[Conversation]:
    """Return conversations of up to three turns; eight beginnings are shared among them."""
    luck = random.Random(seed)

    def words(low: int, high: int) -> list[int]:
        return [luck.randrange(3, 512) for _ in range(luck.randint(low, high))]

    shared = [words(64, 200) for _ in range(8)]
    return [
        Conversation(
            [*(luck.choice(shared) if luck.random() < 0.8 else []), *words(5, 90)],
            [words(10, 70) for _ in range(luck.randrange(3))],
        )
        for _ in range(count)
    ]


def answer_all(engine: Any, talks: Sequence[Conversation]) -> None:
    """Let an engine without kvstrata say what is right, turn by turn."""
    while waiting := [(talk, prompt) for talk in talks if (prompt := talk.next_prompt())]:
        answers = engine.ask([prompt for _, prompt in waiting], max_tokens=ANSWER_TOKENS)
        for (talk, prompt), answer in zip(waiting, answers, strict=True):
            talk.turns.append((prompt, answer.tokens))


class Soak:
    """An engine kept busy with `AT_ONCE` requests, and what came of them."""

    def __init__(self, engine: Any, talks: Sequence[Conversation], seed: int) -> None:
        self.llm = engine.llm.llm_engine
        self.turns = [turn for talk in talks for turn in talk.turns]
        self.luck = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.wrong: list[dict[str, Any]] = []
        self._running: dict[str, tuple[list[int], tuple[int, ...]]] = {}
        self._number = 0

    def run(self, until: Callable[[], bool], *, rude: bool = True) -> None:
        """Serve until told, then let the last requests end; `rude` aborts and resets too."""
        while not until():
            while len(self._running) < AT_ONCE:
                self._arrive()
            self._step()
            if rude and self.luck.random() < 0.05:
                self._abort()
            if rude and self.luck.random() < 0.02 and not self._loading():
                assert self.llm.reset_prefix_cache(reset_running_requests=True)
                self.counts["resets"] += 1
        while self._running:
            self._step()

    def _loading(self) -> bool:
        """Whether a request waits for its KV; vLLM cannot reset its cache then, and raises."""
        requests = self.llm.engine_core.engine_core.scheduler.requests.values()
        return any(request.status.name == "WAITING_FOR_REMOTE_KVS" for request in requests)

    def _arrive(self) -> None:
        from vllm import SamplingParams

        self._number += 1
        name = f"soak-{self._number}"
        turn = self.luck.choice(self.turns)
        prompt: dict[str, Any] = {"prompt_token_ids": turn[0]}
        if self.luck.random() < 0.2:
            prompt["cache_salt"] = self.luck.choice(["red", "green"])
        hints: dict[str, Any] = {}
        if self.luck.random() < 0.1:
            hints = {"kv_transfer_params": {"kvstrata": {"store": False}}}
        sampling = SamplingParams(
            temperature=0,
            max_tokens=ANSWER_TOKENS,
            ignore_eos=True,
            detokenize=False,
            extra_args=hints or None,
        )
        self.llm.add_request(name, prompt, sampling)
        self._running[name] = turn
        self.counts["requests"] += 1
        self.counts["salted"] += "cache_salt" in prompt
        self.counts["not_to_be_kept"] += bool(hints)

    def _abort(self) -> None:
        name = self.luck.choice(list(self._running))
        self.llm.abort_request([name])
        del self._running[name]
        self.counts["aborts"] += 1

    def _step(self) -> None:
        for output in self.llm.step():
            if not output.finished or output.request_id not in self._running:
                continue
            prompt, right = self._running.pop(output.request_id)
            said = tuple(output.outputs[0].token_ids)
            self.counts["answers"] += 1
            found = (output.kv_transfer_params or {}).get("kvstrata", {}).get("tokens_from", {})
            for tier, tokens in found.items():
                self.counts[f"tokens_from_{tier}"] += tokens
                self.counts[f"requests_from_{tier}"] += tokens > 0
            if said != right:
                self.wrong.append({"prompt": prompt, "right": right, "said": said, "from": found})


def soak(
    run_engine: Callable[..., AbstractContextManager[Any]],
    folder: Path,
    *,
    model: Path,
    seconds: float,
    prompts: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Run the mix for so many seconds; return the report.

    `mismatches` are answers that differ. `mismatches_without` counts the same prompts' when an
    engine of the same sizes answers the same mix without kvstrata: above 0 it is the engine that
    wavers with its batches. It runs only after a mismatch.
    """
    talks = conversations(prompts, seed)
    with run_engine(model, None, max_num_seqs=1, enable_prefix_caching=False) as plain:
        answer_all(plain, talks)
    daemon = SharedDaemon(folder, host="6MiB", disk="12MiB")
    try:
        extra = {"address": daemon.address, "block_tokens": 64}
        with run_engine(model, extra, **SMALL) as engine:
            work = Soak(engine, talks, seed)
            start = time.monotonic()
            half = start + seconds / 2
            work.run(lambda: time.monotonic() > half)
            nodes = [daemon.statistics()]
            kill = time.monotonic() + 1.0
            strike = _Strike(daemon, kill)
            work.run(lambda: strike() and time.monotonic() > start + seconds)
            nodes.append(daemon.statistics())
            for metric in engine.llm.get_metrics():
                if metric.name == "vllm:num_preemptions":
                    work.counts["preemptions"] += int(metric.value)
    finally:
        daemon.signal(signal.SIGKILL)
    report: dict[str, Any] = dict(work.counts)
    report["daemons"] = [{name: node[name] for name in ("counters", "tiers")} for node in nodes]
    report["mismatches"] = len(work.wrong)
    report["wrong"] = work.wrong[:20]
    if work.wrong:
        report["mismatches_without"] = _without(run_engine, model, talks, work, seed)
    return report


class _Strike:
    """Kills the daemon at a time, with requests under way, and starts it again a second later."""

    def __init__(self, daemon: SharedDaemon, at: float) -> None:
        self._daemon, self._at = daemon, at
        self._todo = [self._daemon.start, lambda: daemon.signal(signal.SIGKILL)]

    def __call__(self) -> bool:
        """Do what is due; return whether all has been done."""
        if self._todo and time.monotonic() > self._at:
            self._todo.pop()()
            self._at += 1.0
        return not self._todo


def _without(
    run_engine: Any, model: Path, talks: Sequence[Conversation], work: Soak, seed: int
) -> int:
    with run_engine(model, None, **SMALL) as engine:
        again = Soak(engine, talks, seed)
        again.run(lambda: again.counts["requests"] >= work.counts["requests"])
    suspects = {tuple(each["prompt"]) for each in work.wrong}
    return sum(tuple(each["prompt"]) in suspects for each in again.wrong)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--prompts", type=int, default=400, help="conversations in the mix")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
    from conftest import run_engine

    with tempfile.TemporaryDirectory() as folder:
        report = soak(
            run_engine,
            Path(folder),
            model=write_llama(Path(folder) / "llama"),
            seconds=60 * options.minutes,
            prompts=options.prompts,
            seed=options.seed,
        )
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 1 if report["mismatches"] else 0


if __name__ == "__main__":
    sys.exit(main())
