"""The machine that a replay assumes: stated in a file, never guessed from the one it runs on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import msgspec

from kvstrata.core.errors import ConfigError

__all__ = ["EXAMPLE", "Hardware", "TierSpeed", "load_hardware"]

_Positive = Annotated[float, msgspec.Meta(gt=0)]
_Whole = Annotated[int, msgspec.Meta(ge=1)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0)]


class TierSpeed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tier's road to the engine and its price."""

    read_bytes_per_s: _Positive
    """Bytes per second from this tier to the next nearer one."""
    latency_s: _NotNegative = 0.0
    """Seconds before the first byte of a request's blocks."""
    price_per_gib: _NotNegative = 0.0
    """Cost of one GiB, in the unit of the budget."""
    bytes_max: _Whole | None = None
    """Most bytes that the machine can have of it; None for no bound but the budget."""


class Hardware(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one engine can do, and what its tiers can."""

    name: str
    """Printed beside every number that depends on it."""
    prefill_tokens_per_s: _Positive
    """Prompt tokens that one engine computes per second, one prompt after another."""
    kv_bytes_per_token: _Whole
    """Bytes of KV of one token, all layers: 2 * layers * KV heads * head size * bytes a value."""
    engines: _Whole
    """Engines that share the tiers; a request goes to the one that is free first."""
    host: TierSpeed
    """Host memory: its speed is that of the copy to the device."""
    disk: TierSpeed
    """Disk: its speed is that of reading into host memory."""
    tiers: dict[str, TierSpeed] = {}
    """The same for lower tiers by name, such as `disk2`; those not named are like `disk`."""

    def speed(self, tier: str) -> TierSpeed:
        """Return the speed of a tier below the host."""
        return self.tiers.get(tier, self.disk)

    def block_bytes(self, block_tokens: int) -> int:
        """Return the bytes of one block."""
        return block_tokens * self.kv_bytes_per_token


EXAMPLE: Final = Hardware(
    name="example: 8 engines of an 8B model (32 layers, 8 KV heads of 128), PCIe 4, one NVMe disk",
    prefill_tokens_per_s=12_000.0,
    engines=8,
    kv_bytes_per_token=2 * 32 * 8 * 128 * 2,
    host=TierSpeed(read_bytes_per_s=20e9, latency_s=50e-6, price_per_gib=3.0),
    disk=TierSpeed(read_bytes_per_s=5e9, latency_s=150e-6, price_per_gib=0.1),
)
"""Used where no file is given; round numbers for orientation, measured on no machine."""


def load_hardware(path: Path) -> Hardware:
    """Return the hardware that a TOML file describes; raises ConfigError that names the field."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"hardware: cannot read {str(path)!r} ({error.strerror})",
            hint="name a TOML file, see docs/guides/replay.md for its fields",
        ) from error
    try:
        return msgspec.toml.decode(data, type=Hardware)
    except msgspec.MsgspecError as error:
        raise ConfigError(
            f"hardware: {path.name}: {error}",
            hint="see docs/guides/replay.md for the fields and an example",
        ) from error
