"""The layout of a stored block: one contiguous run of bytes and what each of them means."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod
from typing import Final

from kvstrata.core.errors import LayoutError

__all__ = ["DTYPE_BYTES", "BlockLayout", "Dimension", "Shard", "parse_layout"]

DTYPE_BYTES: Final = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
}  # fmt: skip
"""Element types that a block may have, with the size of one element in bytes."""

_BLOCK_BYTES_MAX: Final = 1 << 30
_DESCRIPTION: Final = re.compile(
    r"(?P<writer>\S+) \[(?P<axes>[^\]]*)\] (?P<dtype>\S+) (?P<tokens>\d+) tokens "
    r"tp=(?P<tp>\d+)/(?P<tps>\d+) pp=(?P<pp>\d+)/(?P<pps>\d+) group=(?P<group>\d+)"
)


@dataclass(frozen=True, slots=True)
class Dimension:
    """One axis of a block."""

    name: str
    """What the axis counts: `layer`, `page`, `head`, `token`, `channel`, or an array's own."""
    size: int
    """How many there are; at least 1."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a block that one worker holds; the default is the whole."""

    tensor_rank: int = 0
    """Rank among the workers that split the heads."""
    tensor_size: int = 1
    """How many workers split the heads."""
    pipeline_rank: int = 0
    """Rank among the workers that split the layers."""
    pipeline_size: int = 1
    """How many workers split the layers."""
    group: int = 0
    """Index of the cache group that the layers belong to."""


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Dimensions, outermost first, of one contiguous block.

    Raises LayoutError for an unknown dtype, an empty or repeated dimension, or an absurd size,
    so that a layout that exists is a layout that can be stored.
    """

    dimensions: tuple[Dimension, ...]
    """Axes in the order of memory, outermost first."""
    dtype: str
    """Element type, a key of `DTYPE_BYTES`."""
    block_tokens: int
    """Tokens whose KV the block holds."""
    writer: str
    """Which code knows how to read it back, such as `vllm-paged-fused-kv` or `array`."""
    shard: Shard = field(default_factory=Shard)
    """Which part of the model's KV this is."""

    def __post_init__(self) -> None:
        names = [each.name for each in self.dimensions]
        if self.dtype not in DTYPE_BYTES:
            known = ", ".join(DTYPE_BYTES)
            raise LayoutError(f"dtype: unknown element type {self.dtype!r}", hint=f"use {known}")
        if not self.writer.replace("-", "_").isidentifier():
            raise LayoutError(
                f"writer: {self.writer!r} is not a name",
                hint="use letters, digits and hyphens, such as vllm-paged-fused-kv",
            )
        if any(not name.isidentifier() for name in names):  # `describe` would not tell them apart
            raise LayoutError(
                f"dimensions: {names!r} are not all names", hint="use letters, digits, underscores"
            )
        if not names or len(set(names)) != len(names) or any(d.size < 1 for d in self.dimensions):
            raise LayoutError(
                f"dimensions: {self.dimensions!r} are empty, repeated or not positive",
                hint="name each axis once and give it a size of at least 1",
            )
        if self.block_tokens < 1 or not 0 < self.block_bytes <= _BLOCK_BYTES_MAX:
            raise LayoutError(
                f"block of {self.block_tokens} tokens and {self.block_bytes} bytes is out of range",
                hint="a block has at least 1 token and at most 1 GiB",
            )

    @property
    def block_bytes(self) -> int:
        """Length of one block in bytes."""
        return prod(each.size for each in self.dimensions) * DTYPE_BYTES[self.dtype]

    @property
    def geometry(self) -> str:
        """Axes and sizes independent of their order in memory: part of a block's identity."""
        axes = sorted(f"{d.name}={d.size}" for d in self.dimensions)
        return ";".join([*axes, f"shard={self.shard}"])

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that two layouts share only if they are equal in everything."""
        return sha256(self.describe().encode()).digest()[:16]

    def describe(self) -> str:
        """Return the layout as one line for people; also the text under the fingerprint."""
        axes = " ".join(f"{d.name}={d.size}" for d in self.dimensions)
        shard = self.shard
        where = (
            f"tp={shard.tensor_rank}/{shard.tensor_size} "
            f"pp={shard.pipeline_rank}/{shard.pipeline_size} group={shard.group}"
        )
        return f"{self.writer} [{axes}] {self.dtype} {self.block_tokens} tokens {where}"


def parse_layout(description: str, fingerprint: bytes) -> BlockLayout | None:
    """Return the layout that `describe` gave this text, None if it is not the fingerprint's."""
    found = _DESCRIPTION.fullmatch(description)
    if found is None:
        return None
    axes = [axis.split("=") for axis in found["axes"].split()]
    try:
        layout = BlockLayout(
            tuple(Dimension(name, int(size)) for name, size in axes),
            found["dtype"],
            int(found["tokens"]),
            found["writer"],
            Shard(*(int(found[name]) for name in ("tp", "tps", "pp", "pps", "group"))),
        )
    except (LayoutError, ValueError):
        return None
    return layout if layout.fingerprint == fingerprint else None
