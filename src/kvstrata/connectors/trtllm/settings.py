"""The connector's own settings: a file named by a variable, and variables for single keys.

TensorRT-LLM hands its connectors nothing but its own arguments, and forwards to the processes that
it spawns only variables whose names begin with `TLLM` or `TRTLLM`. So `TLLM_KVSTRATA_CONFIG` names
a file (YAML, TOML or JSON, by its suffix), and `TLLM_KVSTRATA_<KEY>` sets one key and has the last
word.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from kvstrata.core.config import BLOCK_TOKENS_DEFAULT, Limits, NodeConfig, parse_tiers
from kvstrata.core.errors import ConfigError
from kvstrata.core.tenants import TENANT_NAME_MAX
from kvstrata.runtime.session import SessionLimits

__all__ = ["ENVIRONMENT_PREFIX", "ConnectorSettings", "read_settings"]

ENVIRONMENT_PREFIX: Final = "TLLM_KVSTRATA_"
"""Begins the name of every variable that is ours."""

_FILE: Final = f"{ENVIRONMENT_PREFIX}CONFIG"
_FILE_BYTES_MAX: Final = 1 << 20
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]


class ConnectorSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every key of the settings file, and of the variables (in upper case there)."""

    address: str = ""
    """Daemon to use, such as `ipc:///run/user/1000/kvstrata/node.sock`; empty starts one."""
    tiers: str = "host:1GiB"
    """Tiers of the private daemon: `host:2GiB,disk:/var/kv:20GiB`. Not read with an address."""
    policy: str = "lru"
    """Eviction policy of the private daemon: lru, arc, lru2, s3fifo, 2q, auto, or a plug-in's."""
    tenant: Annotated[str, msgspec.Meta(max_length=TENANT_NAME_MAX)] = ""
    """Who is charged for what this engine stores."""
    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=65536)] | None = None
    """Tokens in one block, a multiple of the engine's `tokens_per_block`. None takes the smallest
    multiple that is at least 64."""
    weights_revision: str = ""
    """Name of the weights' revision; empty derives one from the files."""
    adapters: dict[Annotated[int, msgspec.Meta(ge=0)], str] = {}
    """LoRA task ids and a name for the weights behind each, such as a commit. An adapter that is
    not named has blocks that only this run of the engine finds."""
    background: bool = True
    """Copy in a thread beside the engine. False copies within its steps."""
    staging_wait_s: Annotated[float, msgspec.Meta(ge=0, le=60)] = 0.05
    """Longest time that a request's lookup waits for blocks to come from below the host. The
    engine's scheduler waits with it; what is not there by then is computed."""
    secret_file: str | None = None
    """File with the cluster secret for the private daemon; None keeps one beside the disk tier."""
    start_timeout_s: _Seconds = 60.0
    """Longest wait at the engine's start for the daemon to start and open its stores."""
    call_timeout_s: _Seconds = 1.0
    """Longest wait of the engine's scheduler for one answer of the daemon."""
    retry_interval_s: _Seconds = 1.0
    """Time between two attempts to reach a daemon that is gone."""

    def block_tokens_for(self, page_tokens: int) -> int:
        """Return the tokens in one block for pages of `page_tokens`; ConfigError for a fraction."""
        if self.block_tokens is None:
            return -(-BLOCK_TOKENS_DEFAULT // page_tokens) * page_tokens
        if self.block_tokens % page_tokens:
            raise ConfigError(
                f"block_tokens: {self.block_tokens} is no multiple of the engine's "
                f"tokens_per_block of {page_tokens}",
                hint=f"set block_tokens to a multiple of {page_tokens}",
            )
        return self.block_tokens

    @property
    def where(self) -> str | NodeConfig:
        """The daemon's address, or what a private one is to own."""
        if self.address:
            return self.address
        return NodeConfig(parse_tiers(self.tiers), self.secret_file, Limits(), self.policy)

    @property
    def session_limits(self) -> SessionLimits:
        """How long the scheduler half waits."""
        return SessionLimits(
            call_timeout_s=self.call_timeout_s,
            start_timeout_s=self.start_timeout_s,
            retry_interval_s=self.retry_interval_s,
        )


def read_settings(environment: Mapping[str, str] | None = None) -> ConnectorSettings:
    """Return the checked settings; raises ConfigError that names the file or variable and the key.

    `environment` is the process's own unless given.
    """
    variables = os.environ if environment is None else environment
    path = variables.get(_FILE, "")
    settings = _convert(_read_file(Path(path)), _FILE) if path else ConnectorSettings()
    single = {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in variables.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name != _FILE
    }
    if not single:
        return settings
    _refuse_unknown(single)
    # A variable is text; strict=False lets the numbers and switches among them be read as such.
    merged: dict[str, Any] = msgspec.structs.asdict(settings)
    for key, value in single.items():
        merged[key] = _parsed(key, value) if key == "adapters" else value
    return _convert(merged, f"{ENVIRONMENT_PREFIX}*", strict=False)


def _refuse_unknown(single: Mapping[str, str]) -> None:
    known = ConnectorSettings.__struct_fields__
    unknown = sorted(set(single) - set(known))
    if unknown:
        raise ConfigError(
            f"{ENVIRONMENT_PREFIX}{unknown[0].upper()}: there is no such setting",
            hint=f"known keys are config (a file), {', '.join(known)}",
        )


def _convert(values: Any, where: str, *, strict: bool = True) -> ConnectorSettings:
    try:
        return msgspec.convert(values, ConnectorSettings, strict=strict, str_keys=True)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{where}: {error}",
            hint=f"known keys are {', '.join(ConnectorSettings.__struct_fields__)}",
        ) from error


def _parsed(key: str, text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{ENVIRONMENT_PREFIX}{key.upper()}: {error}",
            hint='write it as JSON, such as {"1": "commit-of-the-adapter"}',
        ) from error


def _read_file(path: Path) -> Any:
    decoders = {
        ".json": msgspec.json.decode,
        ".toml": msgspec.toml.decode,
        ".yaml": msgspec.yaml.decode,
        ".yml": msgspec.yaml.decode,
    }
    decode = decoders.get(path.suffix.lower())
    if decode is None:
        raise ConfigError(
            f"{_FILE}: {path.name!r} has no suffix that says what it is",
            hint=f"name the file with one of {', '.join(decoders)}",
        )
    try:
        if path.stat().st_size > _FILE_BYTES_MAX:
            raise ConfigError(
                f"{_FILE}: {path.name!r} is larger than 1 MiB", hint="name a settings file"
            )
        values = decode(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{_FILE}: cannot read {str(path)!r} ({error.strerror})",
            hint="give an absolute path that every rank can read",
        ) from error
    except (msgspec.DecodeError, ImportError) as error:
        raise ConfigError(
            f"{_FILE}: {path.name!r} cannot be read: {error}", hint="mend the file"
        ) from error
    return {} if values is None else values
