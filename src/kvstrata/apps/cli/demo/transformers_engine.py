"""The demo's Hugging Face transformers, in this process."""

from __future__ import annotations

import time
from typing import Any, Final

import torch
import transformers

from kvstrata.apps.cli.demo.daemonhits import DaemonHits
from kvstrata.apps.cli.demo.engines import BLOCK_TOKENS, tiers_of
from kvstrata.connectors.transformers import KvstrataCache

__all__ = ["TransformersEngine"]

_WARM_UP_TOKENS: Final = 1100


class TransformersEngine:
    """A model of transformers, with or without `KvstrataCache`."""

    def __init__(
        self, model_directory: str, disk_directory: str | None, place: list[str] | None = None
    ) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            model_directory, dtype=torch.float32
        )
        model.eval()
        model.generation_config.eos_token_id = None  # every answer has its full length
        self._model = model
        self._cache: KvstrataCache | None = None
        if disk_directory is not None:
            tiers, secret_file = tiers_of(disk_directory, place)
            self._cache = KvstrataCache.for_model(
                model, tiers=tiers, block_tokens=BLOCK_TOKENS, secret_file=secret_file
            )
            # Its turns are measured: one-time costs must fall before.
            self.generate([5 + number % 250 for number in range(_WARM_UP_TOKENS)], 2)

    def generate(self, prompt_token_ids: list[int], max_tokens: int) -> dict[str, Any]:
        """See `DemoEngine`."""
        ids = torch.tensor([prompt_token_ids])
        options = {
            "attention_mask": torch.ones_like(ids),
            "do_sample": False,
            "max_new_tokens": max_tokens,
            "streamer": (clock := _Clock()),
        }
        source = self._model if self._cache is None else self._cache
        loaded = self._loaded_tokens()
        with DaemonHits(self.info()["daemon_address"]) as hits:
            started = time.perf_counter()
            output = source.generate(ids, **options)
        assert clock.first_token is not None, "a request ended without a token"
        return {
            "token_ids": output[0, len(prompt_token_ids) :].tolist(),
            "ttft_s": clock.first_token - started,
            "cached_tokens": self._loaded_tokens() - loaded,
            "tokens_from": hits.tokens_from,
        }

    def reset_prefix_cache(self) -> dict[str, Any]:
        """Nothing: transformers forgets each prompt with its answer."""
        return {}

    def info(self) -> dict[str, Any]:
        """See `DemoEngine`."""
        if self._cache is None:
            return {"daemon_pid": None, "daemon_address": None}
        session = self._cache.binding.prefixes.session
        return {"daemon_pid": session.daemon_pid, "daemon_address": session.daemon_address}

    def shutdown(self) -> dict[str, Any]:
        """See `DemoEngine`."""
        if self._cache is not None:
            self._cache.close()
        return {}

    def _loaded_tokens(self) -> int:
        return self._cache.statistics.loaded_tokens if self._cache is not None else 0


class _Clock(transformers.generation.BaseStreamer):  # type: ignore[misc]  # untyped here
    """Notes when the first token of the answer came; the prompt is given to it before."""

    def __init__(self) -> None:
        self.first_token: float | None = None
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then each token."""
        del value
        if self._prompt_seen and self.first_token is None:
            self.first_token = time.perf_counter()
        self._prompt_seen = True

    def end(self) -> None:
        """The answer is complete."""
