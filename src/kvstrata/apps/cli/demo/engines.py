"""The engines that the demo can play on: what each needs, and where its adaptor is."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any, Final, Protocol

from kvstrata.core.errors import ConfigError

__all__ = ["BLOCK_TOKENS", "ENGINES", "DemoEngine", "EngineKind", "engine_kind", "tiers_of"]

BLOCK_TOKENS: Final = 64
"""Tokens in one block, whatever the engine."""

_HOST_TIER: Final = "host:512MiB"
_DISK_TIER_SIZE: Final = "1GiB"
_OBJECT_TIER_SIZE: Final = "1GiB"


class DemoEngine(Protocol):
    """One engine in the child's process, with or without kvstrata. One request at a time."""

    def generate(self, prompt_token_ids: list[int], max_tokens: int) -> dict[str, Any]:
        """Answer one prompt greedily; return once nothing of it is on its way to the daemon.

        `token_ids`; `ttft_s`; `cached_tokens`, which were not computed, wherever from; and
        `tokens_from`, the part of them that kvstrata gave, by tier.
        """

    def reset_prefix_cache(self) -> dict[str, Any]:
        """Empty the engine's own cache; kvstrata keeps its blocks."""

    def info(self) -> dict[str, Any]:
        """Tell `daemon_pid` and `daemon_address`, both None without kvstrata."""

    def shutdown(self) -> dict[str, Any]:
        """End the engine, and its daemon; no other command may follow."""


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One engine that the demo can play on."""

    title: str
    """Its name, as people write it."""
    package: str
    """Module that is there if it is installed."""
    remedy: str
    """How to install it."""
    adaptor: str
    """`module:class` of its `DemoEngine`, made from model directory, disk directory and place."""
    early: str
    """Module that takes seconds to import, and can be while the model is made."""
    own_model: str
    """What to type to use kvstrata with a model of one's own."""

    def make(self, *arguments: Any, **settings: Any) -> DemoEngine:
        """Build the engine in this process."""
        module, _, name = self.adaptor.partition(":")
        made: DemoEngine = getattr(import_module(module), name)(*arguments, **settings)
        return made


ENGINES: Final[Mapping[str, EngineKind]] = MappingProxyType(
    {
        "vllm": EngineKind(
            "vLLM",
            "vllm",
            "run make env in a checkout of kvstrata, or see docs/guides/vllm.md; with torch and "
            "transformers alone, play kvstrata demo --engine transformers.",
            "kvstrata.apps.cli.demo.vllm_engine:VllmEngine",
            "vllm.entrypoints.llm",
            """\
python -m vllm.entrypoints.openai.api_server --model MODEL
                                --kv-transfer-config '{"kv_connector": "KvstrataConnector",
                                "kv_connector_module_path": "kvstrata.connectors.vllm", "kv_role":
                                "kv_both", "kv_connector_extra_config": {"tiers": "host:8GiB"}}'""",
        ),
        "sglang": EngineKind(
            "SGLang",
            "sglang",
            "it needs an environment of its own: make test-sglang in a checkout of kvstrata makes "
            ".venv-sglang, or pip install kvstrata where SGLang is; see docs/guides/sglang.md.",
            "kvstrata.apps.cli.demo.sglang_engine:SglangEngine",
            "sglang",
            "docs/guides/sglang.md has the command line",
        ),
        "transformers": EngineKind(
            "transformers",
            "transformers",
            "pip install torch 'kvstrata[transformers]'",
            "kvstrata.apps.cli.demo.transformers_engine:TransformersEngine",
            "transformers",
            """\
cache = KvstrataCache.for_model(model, tiers="host:8GiB")
                                cache.generate(**inputs, max_new_tokens=32)""",
        ),
    }
)
"""Name on the command line -> engine."""


def engine_kind(name: str) -> EngineKind:
    """Return the engine of that name; raises ConfigError if unknown or not installed."""
    kind = ENGINES.get(name)
    if kind is None:
        raise ConfigError(
            f"The demo plays on {', '.join(ENGINES)}, not on {name!r}.",
            hint="leave --engine out to play on vllm.",
        )
    missing = [each for each in (kind.package, "torch") if importlib.util.find_spec(each) is None]
    if missing:
        raise ConfigError(
            f"The demo plays on {kind.title}, but {missing[0]} is not installed here.",
            hint=kind.remedy,
        )
    return kind


def tiers_of(disk_directory: str, place: list[str] | None) -> tuple[str, str | None]:
    """Return the daemon's tiers, and the file of its secret if blocks outlive the disk.

    `place` is the URL of an object tier behind the disk and the path of the cluster secret.
    """
    tiers = f"{_HOST_TIER},disk:{disk_directory}:{_DISK_TIER_SIZE}"
    if place is None:
        return tiers, None
    url, secret_file = place
    return f"{tiers},object:{url}:{_OBJECT_TIER_SIZE}", secret_file
