"""The connector's own settings: what stands in `kv_connector_extra_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from kvstrata.core.config import (
    BLOCK_TOKENS_DEFAULT,
    Limits,
    NodeConfig,
    parse_tiers,
)
from kvstrata.core.errors import ConfigError
from kvstrata.core.tenants import TENANT_NAME_MAX
from kvstrata.runtime.session import SessionLimits
from kvstrata.transfer.cuda.choose import check_copier_name

__all__ = ["ConnectorSettings", "read_settings"]

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]


class ConnectorSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every key that `kv_connector_extra_config` may have."""

    address: str = ""
    """Daemon to use, such as `ipc:///run/user/1000/kvstrata/node.sock`; empty starts one."""
    tiers: str = "host:1GiB"
    """Tiers of the private daemon: `host:2GiB,disk:/var/kv:20GiB`. Not read with an address."""
    policy: str = "lru"
    """Eviction policy of the private daemon: lru, arc, lru2, s3fifo, 2q, auto, or a plug-in's."""
    tenant: Annotated[str, msgspec.Meta(max_length=TENANT_NAME_MAX)] = ""
    """Who is charged for what requests store that name no tenant themselves."""
    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=65536)] | None = None
    """Tokens in one block, a multiple of vLLM's block size; engines that share blocks must agree on
    it. None takes the smallest multiple that is at least 64."""
    model_name: str = ""
    """Name of the model for engines that share blocks; empty takes its directory's or hub name."""
    weights_revision: str = ""
    """Name of the weights' revision; empty derives one from the files."""
    secret_file: str | None = None
    """File with the cluster secret for the private daemon; None keeps one beside the disk tier."""
    start_timeout_s: _Seconds = 60.0
    """Longest wait at the engine's start for the daemon to start and open its stores."""
    call_timeout_s: _Seconds = 1.0
    """Longest wait of the engine's scheduler for one answer of the daemon."""
    staging_timeout_s: _Seconds = 5.0
    """Longest wait of a request for its blocks to come from disk (private daemon)."""
    loading: Literal["async", "layerwise"] = "async"
    """When blocks are loaded: before their request is scheduled, or layer by layer beside its first
    forward pass."""
    saving: Literal["blocks", "layerwise"] = "blocks"
    """When blocks are saved: whole at the end of a step, or each layer while the next computes."""
    layer_timeout_s: _Seconds = 5.0
    """Longest wait of a forward pass for the layers of its loads (`loading: layerwise`)."""
    retry_interval_s: _Seconds = 1.0
    """Time between two attempts to reach a daemon that is gone."""
    outermost: Literal["layers", "blocks"] = "layers"
    """How vLLM is asked to lay out its cache: each layer by itself (its `LBHNC`), or all layers of
    a block beside each other (`BLHNC`), which its CPU platform cannot. Blocks are the same."""
    device_copier: str | None = None
    """What copies between a GPU and the host: auto tries all at start and takes the fastest that is
    exact; batch, runs, triton, or torch, which is the reference. On a GPU it must be said, since no
    GPU has run this yet. Not read where there is no GPU."""

    def block_tokens_for(self, page_tokens: int) -> int:
        """Return the tokens in one block for an engine with pages of `page_tokens`."""
        if self.block_tokens is not None:
            return self.block_tokens
        return -(-BLOCK_TOKENS_DEFAULT // page_tokens) * page_tokens

    @property
    def layerwise(self) -> bool:
        """Whether anything is moved layer by layer."""
        return "layerwise" in {self.loading, self.saving}

    @property
    def where(self) -> str | NodeConfig:
        """The daemon's address, or what a private one is to own."""
        if self.address:
            return self.address
        limits = Limits(staging_timeout_s=self.staging_timeout_s)
        return NodeConfig(parse_tiers(self.tiers), self.secret_file, limits, self.policy)

    @property
    def session_limits(self) -> SessionLimits:
        """How long the scheduler half waits."""
        return SessionLimits(
            call_timeout_s=self.call_timeout_s,
            start_timeout_s=self.start_timeout_s,
            retry_interval_s=self.retry_interval_s,
        )


def read_settings(extra_config: Mapping[str, Any]) -> ConnectorSettings:
    """Return the checked settings; raises ConfigError that names the key and what it may be."""
    try:
        settings = msgspec.convert(dict(extra_config), ConnectorSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"kv_connector_extra_config: {error}",
            hint=f"known keys are {', '.join(ConnectorSettings.__struct_fields__)}",
        ) from error
    if settings.device_copier is not None:
        check_copier_name(settings.device_copier)
    return settings
