"""Settings of `kvstrata serve`: command line, then `KVSTRATA_*` variables, then defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from kvstrata.core.config import (
    BACKEND_DEFAULT,
    HostMemoryConfig,
    HugePages,
    Limits,
    NodeConfig,
    parse_tenants,
    parse_tiers,
)
from kvstrata.core.errors import ConfigError
from kvstrata.runtime.addresses import check_address, default_address

__all__ = ["ServeSettings"]


class ServeSettings(BaseSettings):
    """What `kvstrata serve` owns and where it listens; each field is also `KVSTRATA_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="KVSTRATA_", extra="ignore")

    tiers: str = "host:1GiB"
    """Tiers, host first: `host:2GiB` or `host:2GiB,disk:/var/kv:20GiB`."""
    policy: str = "lru"
    """Eviction policy of every tier: lru, arc, lru2, s3fifo, 2q, auto, or a plug-in's name."""
    backend: str = BACKEND_DEFAULT
    """What moves blocks to and from disk: posix, nixl, a plug-in's name, or auto to try all."""
    address: str = Field(default_factory=default_address)
    """Where to listen: an absolute `ipc://` path."""
    secret_file: Path | None = None
    """File with the cluster secret of 32 bytes; left out, one is kept with the blocks."""
    staging_timeout_s: float = Field(default=5.0, gt=0, le=3600)
    """Longest wait of a request for its blocks to come from disk, in seconds."""
    offload_priority_min: int = Field(default=0, ge=0, le=100)
    """Blocks of a lower priority than this, and those behind them, are not written to disk."""
    tenants: str = ""
    """Tenants with a guarantee, `;` between them: `a=30%;b=host:8GiB,disk:100GiB`."""
    share_tenants: bool = False
    """Whether tenants of one salt find each other's blocks."""
    explain_across_salts: bool = False
    """Whether a client may learn that a prompt is stored under a salt that is not its own."""
    weigh_costs: bool = True
    """Whether a hit is loaded only as far as that is faster than computing it; else all of it."""
    cost_margin: float = Field(default=0.1, ge=0, le=100)
    """By which share of its own time loading must be faster than computing."""
    transfer_threads: int = Field(default=8, ge=1, le=64)
    """Threads that move bytes to and from disk."""
    checksum_threads: int = Field(default=1, ge=1, le=64)
    """Threads that compute block checksums."""

    probe_blocks_max: int = Field(default=32, ge=0, le=4096)
    """Blocks for which a shared or object tier is asked before a miss; 0 never asks."""

    host_huge_pages: HugePages = HugePages.AUTO
    """Huge pages for the host tier: off, auto, try or require."""
    host_numa_node: int | None = Field(default=None, ge=0)
    """Node of the machine whose memory the host tier gets; left out, the system chooses."""
    host_prefault: bool = False
    """Whether the host tier's memory is taken before the daemon is ready."""
    host_memory_share_max: float = Field(default=0.9, gt=0, le=1)
    """Share of the machine's or its cgroup's memory that the host tier may have."""

    @field_validator("address")
    @classmethod
    def _address(cls, address: str) -> str:
        return check_address(address)

    @field_validator("tiers")
    @classmethod
    def _tiers(cls, tiers: str) -> str:
        parse_tiers(tiers)
        return tiers

    @field_validator("tenants")
    @classmethod
    def _tenants(cls, tenants: str) -> str:
        parse_tenants(tenants.split(";"))
        return tenants

    @classmethod
    def read(cls, given: dict[str, Any]) -> Self:
        """Return the settings; what `given` does not say comes from the environment.

        Raises ConfigError that names the first field that is wrong.
        """
        try:
            return cls(**{name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise ConfigError(
                f"{field}: {first['msg']} (got {first['input']!r})",
                hint=f"see kvstrata serve --help, or check KVSTRATA_{field.upper()}",
            ) from error
        except ConfigError as error:
            field = error.message.partition(":")[0].partition(".")[0]
            if given.get(field) is not None:
                raise
            hint = f"{error.hint}; the value comes from KVSTRATA_{field.upper()}"
            raise ConfigError(error.message, hint=hint) from error

    def node_config(self) -> NodeConfig:
        """Return what the daemon is to own."""
        return NodeConfig(
            tiers=parse_tiers(self.tiers),
            secret_file=str(self.secret_file) if self.secret_file else None,
            policy=self.policy,
            backend=self.backend,
            tenants=parse_tenants(self.tenants.split(";")),
            share_tenants=self.share_tenants,
            explain_across_salts=self.explain_across_salts,
            host_memory=HostMemoryConfig(
                huge_pages=self.host_huge_pages,
                numa_node=self.host_numa_node,
                prefault=self.host_prefault,
                share_max=self.host_memory_share_max,
            ),
            limits=Limits(
                staging_timeout_s=self.staging_timeout_s,
                offload_priority_min=self.offload_priority_min,
                weigh_costs=self.weigh_costs,
                cost_margin=self.cost_margin,
                transfer_threads=self.transfer_threads,
                checksum_threads=self.checksum_threads,
                probe_blocks_max=self.probe_blocks_max,
            ),
        )
