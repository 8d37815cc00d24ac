"""Which device copiers work on this machine, and which would be chosen: for `kvstrata doctor`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from kvstrata.core.errors import ConfigError, TransferError
from kvstrata.transfer.cuda.choose import (
    AUTO,
    COPIERS,
    DIRECTIONS,
    CopierChoice,
    CopierTry,
    CopyShape,
    Trying,
    TryLimits,
    choose_copier,
)
from kvstrata.transfer.cuda.platform import DevicePlatform
from kvstrata.transfer.cuda.torchcuda import TorchCuda, driver_absent

__all__ = ["SHAPES", "choose_all", "fit_shape", "survey", "try_platform"]

SHAPES: Final = (
    CopyShape("nhd", layers=32, parts=2, run_bytes=32 << 10),
    CopyShape("hnd", layers=32, parts=1, run_bytes=64 << 10),
    CopyShape("cross-layer", layers=1, parts=1, run_bytes=2 << 20),
)
"""Blocks of 16 tokens of a model of 8 billion weights, in three orders of the engine's cache."""

_TRY_BYTES_MAX: Final = 64 << 20
_PACKAGES: Final = {"batch": "cuda-bindings", "triton": "triton", "torch": "torch"}
_MODULES: Final = {"batch": "cuda", "triton": "triton", "torch": "torch"}


def survey(progress: Callable[[str], None]) -> tuple[list[CopierTry], list[CopierChoice]]:
    """Return a line for each copier, and the choice for each of `SHAPES` and direction.

    Without a GPU it loads nothing, says why no copier is usable, and chooses nothing.
    """
    absent, remedy = driver_absent(), "needed only for engines on an NVIDIA GPU: install its driver"
    if not absent:
        progress("trying device copiers")
        try:
            return try_platform(TorchCuda())
        except (ConfigError, TransferError) as error:
            absent, remedy = str(error), "device copies are refused until this is mended"
    tries = [CopierTry(name, usable=False, why=_why(name, absent), remedy=remedy)
             for name in COPIERS]  # fmt: skip
    return tries, []


def try_platform(
    platform: DevicePlatform, shapes: Iterable[CopyShape] = SHAPES
) -> tuple[list[CopierTry], list[CopierChoice]]:
    """Try every copier on every shape; a copier that failed on one of them is not usable."""
    choices = choose_all(platform, shapes)
    lines = []
    for name in COPIERS:
        tried = [(choice, each) for choice in choices for each in choice.tries if each.name == name]
        bad = next((each for _, each in tried if not each.usable), None)
        good = "; ".join(
            f"{choice.shape} {choice.direction}: {each.gb_per_s:.2f} GB/s"
            for choice, each in tried
            if each.gb_per_s is not None
        )
        lines.append(
            CopierTry(name, usable=bad is None, why=bad.why if bad else good,
                      remedy=bad.remedy if bad else "")
        )  # fmt: skip
    return lines, choices


def choose_all(
    platform: DevicePlatform,
    shapes: Iterable[CopyShape],
    *,
    forced: str = AUTO,
    limits: TryLimits = TryLimits(),  # noqa: B008  # frozen
) -> list[CopierChoice]:
    """Choose a copier for each shape and direction.

    Raises ConfigError if there is no memory to try with, TransferError if a copy never ended.
    """
    choices = []
    for shape in map(fit_shape, shapes):
        memory = platform.probe_memory(shape.device_bytes, shape.host_bytes)
        makers = platform.makers(memory.tensors)
        trying = Trying(platform.streams, makers, platform.now, platform.pause, limits)
        choices += [
            choose_copier(shape, direction, trying, memory, forced=forced)
            for direction in DIRECTIONS
        ]
    return choices


def fit_shape(shape: CopyShape) -> CopyShape:
    """Return the shape with fewer blocks, and then layers, if a try would move too much."""
    one = shape.parts * shape.run_bytes
    blocks = max(1, min(shape.blocks, _TRY_BYTES_MAX // (one * shape.layers)))
    layers = max(1, min(shape.layers, _TRY_BYTES_MAX // (one * blocks)))
    return CopyShape(shape.name, layers, shape.parts, shape.run_bytes, blocks)


def _why(name: str, absent: str) -> str:
    package = _PACKAGES.get(name)
    if package is None:
        return absent
    if importlib.util.find_spec(_MODULES[name]) is None:
        return f"{absent}; {package} is not installed"
    try:
        return f"{absent}; {package} {version(package)} is installed"
    except PackageNotFoundError:
        return f"{absent}; {package} is installed"
