"""The connector's own settings: what stands in SGLang's storage backend extra config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec

from kvstrata.core.config import Limits, NodeConfig, parse_tiers
from kvstrata.core.errors import ConfigError
from kvstrata.core.tenants import TENANT_NAME_MAX
from kvstrata.layout import Shard
from kvstrata.runtime.session import SessionLimits

__all__ = ["LINKER_OPTION", "SGLANG_KEYS", "StorageSettings", "read_settings"]

_STORAGE_OPTION: Final = "hicache-storage-backend-extra-config"
LINKER_OPTION: Final = "unified-cache-external-linker-config: linker_extra_config"
"""Where the linker's settings stand; a storage's stand in its extra config."""

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]

SGLANG_KEYS: Final = frozenset(
    {"backend_name", "module_path", "class_name", "interface_v1", "allocator"}
)
"""Keys of the same table that SGLang reads and leaves in it; the others it takes out."""


class StorageSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every key of ours that the extra config may have."""

    address: str = ""
    """Daemon to use, such as `ipc:///run/user/1000/kvstrata/node.sock`; empty starts one.
    `{tp_rank}` and `{pp_rank}` in it stand for the ranks: a daemon holds blocks of one shard."""
    tiers: str = "host:1GiB"
    """Tiers of the private daemon: `host:2GiB,disk:/var/kv:20GiB`, with ranks as in `address`."""
    policy: str = "lru"
    """Eviction policy of the private daemon: lru, arc, lru2, s3fifo, 2q, auto, or a plug-in's."""
    tenant: Annotated[str, msgspec.Meta(max_length=TENANT_NAME_MAX)] = ""
    """Who is charged for what this engine stores."""
    model_name: str = ""
    """Name of the model for engines that share blocks; empty takes its directory's or hub name."""
    weights_revision: str = ""
    """Name of the weights' revision; empty derives one from the files."""
    secret_file: str | None = None
    """File with the cluster secret for the private daemon; None keeps one beside the disk tier."""
    start_timeout_s: _Seconds = 60.0
    """Longest wait at attach for the daemon to start and open its stores."""
    call_timeout_s: _Seconds = 1.0
    """Longest wait for one answer of the daemon."""
    batch_timeout_s: _Seconds = 5.0
    """Longest time that one call of SGLang's may take, the start of its last copy included."""
    retry_interval_s: _Seconds = 1.0
    """Time between two attempts to reach a daemon that is gone."""

    def where(self, shard: Shard, *, replicated: bool) -> str | NodeConfig:
        """Return the daemon's address, or what a private one is to own, for one rank.

        `replicated`: there are further ranks with the same blocks, and one of them writes. Raises
        ConfigError where the ranks of one engine would be in each other's way.
        """
        ranks = {"tp_rank": shard.tensor_rank, "pp_rank": shard.pipeline_rank}
        shards = shard.tensor_size > 1 or shard.pipeline_size > 1
        if self.address:
            if shards and _filled(self.address, ranks) == self.address:
                raise ConfigError(
                    "address: ranks that hold different shards cannot share one daemon",
                    hint="start one daemon for each rank and put {tp_rank} or {pp_rank} in address",
                )
            return _filled(self.address, ranks)
        if replicated:
            raise ConfigError(
                "address: this model's KV is the same on every rank and only one rank writes, so "
                "private daemons would stay empty on the others",
                hint="start kvstrata serve and give its address",
            )
        tiers = _filled(self.tiers, ranks)
        if shards and tiers == self.tiers and "disk:" in tiers:
            raise ConfigError(
                "tiers: two daemons cannot use one disk directory",
                hint="put {tp_rank} or {pp_rank} in it, as in disk:/var/kv/{tp_rank}:1TiB",
            )
        # A question may wait for staging as long as SGLang's call may take.
        limits = Limits(staging_timeout_s=self.batch_timeout_s)
        return NodeConfig(parse_tiers(tiers), self.secret_file, limits, self.policy)

    @property
    def session_limits(self) -> SessionLimits:
        """How long a call to the daemon is waited for."""
        return SessionLimits(
            call_timeout_s=self.call_timeout_s,
            start_timeout_s=self.start_timeout_s,
            retry_interval_s=self.retry_interval_s,
        )


def read_settings(
    extra_config: Mapping[str, Any] | None, option: str = _STORAGE_OPTION
) -> StorageSettings:
    """Return the checked settings; raises ConfigError that names the key and what it may be."""
    ours = {key: value for key, value in (extra_config or {}).items() if key not in SGLANG_KEYS}
    try:
        return msgspec.convert(ours, StorageSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{option}: {error}",
            hint=f"known keys are {', '.join(StorageSettings.__struct_fields__)}",
        ) from error


def _filled(text: str, ranks: Mapping[str, int]) -> str:
    for name, rank in ranks.items():
        text = text.replace(f"{{{name}}}", str(rank))
    return text
