"""The engine releases that each connector was tested with; every other one is refused at start.

A release of two numbers stands for all of its patch releases; one of three for itself alone.
Where an engine changes its caches between two releases, a guess would be wrong KV.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from kvstrata.core.errors import LayoutError

__all__ = ["TESTED_VERSIONS", "EngineReleases", "refuse_untested"]

_PATCHES: Final = 2
"""Numbers of a release that stands for all of its patch releases."""


@dataclass(frozen=True, slots=True)
class EngineReleases:
    """What one connector was tested with."""

    title: str
    """The engine, as people write it."""
    releases: tuple[str, ...]
    """Its releases; empty while there is no connector for it."""


TESTED_VERSIONS: Final[Mapping[str, EngineReleases]] = MappingProxyType(
    {
        "vllm": EngineReleases("vLLM", ("0.32",)),
        "sglang": EngineReleases("SGLang", ("0.5.23",)),
        "tensorrt-llm": EngineReleases("TensorRT-LLM", ()),
        "transformers": EngineReleases(
            "transformers",
            ("5.16", "5.17", "5.18", "5.19", "5.20", "5.21", "5.22", "5.23", "5.24"),
        ),
    }
)
"""Engine -> what its tests ran against."""


def refuse_untested(engine: str, version: str) -> None:
    """Raise LayoutError unless `version` of `engine` is one that its connector was tested with."""
    tested = TESTED_VERSIONS[engine]
    release = ".".join(version.split(".")[:_PATCHES])
    if version in tested.releases or release in tested.releases:
        return
    raise LayoutError(
        f"{tested.title} {version} is not a version that kvstrata was tested with",
        hint=f"tested are {', '.join(tested.releases) or 'none'} (`kvstrata matrix` has the table "
        "of all engines); others may keep their KV in another way",
    )
