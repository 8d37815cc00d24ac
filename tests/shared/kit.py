"""What several lanes start and look at: a tiny Llama, a daemon, a demo's report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

__all__ = ["LLAMA", "SharedDaemon", "demo_kept_its_promises", "write_llama", "write_qwen3_next"]


LLAMA: Final = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
"""The tiny Llama's configuration. `examples/tiny_llama.py` has its own: users copy it."""


def write_llama(folder: Path, seed: int = 0, spread: float = 0.2) -> Path:
    """Write a Llama of 0.7 million random weights; its greedy answers are varied.

    `spread` is the deviation of its weights; from 0.1 down it repeats itself, as a draft needs.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**(LLAMA | {"initializer_range": spread}))
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


def write_qwen3_next(folder: Path) -> Path:
    """Write a tiny Qwen3-Next: three layers with states to one of attention.

    Its heads are wide for its states, so that vLLM's pages, as long as states, have 96 tokens.
    """
    import torch
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=2048,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        full_attention_interval=4,
        initializer_range=0.2,
    )
    Qwen3NextForCausalLM(config).float().save_pretrained(folder)
    return folder


_SERVE_WITH_LIMITS = """
import json, sys
from kvstrata.core.config import Limits, NodeConfig, parse_tiers
from kvstrata.runtime import daemon
tiers, address, limits = sys.argv[1:]
given = json.loads(limits)
secret = given.pop("secret_file", None)
config = NodeConfig(parse_tiers(tiers), secret, Limits(**given))
daemon.serve(config, address, ready=lambda: print("serves", file=sys.stderr, flush=True))
"""


class SharedDaemon:
    """`kvstrata serve` in a process of its own.

    `more` are options of the command; `limits` are `core.config.Limits` that it has none for (and
    `secret_file`), and take the place of `more`. `python` and `environment` are another
    environment's.
    """

    def __init__(
        self,
        folder: Path,
        *more: str,
        host: str = "64MiB",
        disk: str = "64MiB",
        limits: dict[str, Any] | None = None,
        tiers: str = "",
        python: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.limits, self._more = limits, more
        self._python, self._environment = str(python or sys.executable), environment
        self.address = f"ipc://{folder}/node.sock"
        self.tiers = tiers or f"host:{host},disk:{folder / 'kv'}:{disk}"
        self.start()

    def start(self) -> None:
        """Start it and wait until it serves."""
        command = [self._python, "-m", "kvstrata.apps.cli.main", "serve"]
        command += ["--tiers", self.tiers, "--address", self.address, *self._more]
        if self.limits is not None:
            given = [self.tiers, self.address, json.dumps(self.limits)]
            command = [self._python, "-c", _SERVE_WITH_LIMITS, *given]
        self.process = subprocess.Popen(
            command,
            env=self._environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "serves" in line:
                return
        raise AssertionError("the daemon did not start")

    def signal(self, number: int) -> None:
        """Send it a signal; after SIGKILL wait until it is gone."""
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait(10)
            self.process.stderr.close()

    def close(self) -> None:
        """End it, whatever it is doing; twice is harmless."""
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)

    def statistics(self) -> dict[str, Any]:
        """Return the daemon's statistics once everything saved has reached the disk."""
        from kvstrata.runtime.admin import AdminClient

        with AdminClient(self.address) as admin:
            admin.wait_idle(30)
            node: dict[str, Any] = admin.stats()["node"]
        return node


def demo_kept_its_promises(report: Path) -> None:
    """Check a demo's report: every answer the same, every full block from where it was to come."""
    phases = {phase["name"]: phase["turns"] for phase in json.loads(report.read_text())["phases"]}
    assert list(phases) == ["cold", "warm", "after_restart"]
    assert all(turn["identical"] for turns in phases.values() for turn in turns)
    assert all(not sum(turn["tokens_from"].values()) for turn in phases["cold"])
    for name, tier in (("warm", "host"), ("after_restart", "disk")):
        for turn in phases[name]:
            assert turn["tokens_from"][tier] == turn["full_block_tokens"], (name, turn)
            assert sum(turn["tokens_from"].values()) == turn["full_block_tokens"]
