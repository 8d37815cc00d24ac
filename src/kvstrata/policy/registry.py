"""Policies by name: those that ship here, and those that other packages offer by entry point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from kvstrata.core.errors import ConfigError
from kvstrata.policy.arc import ArcPolicy
from kvstrata.policy.auto import AutoPolicy
from kvstrata.policy.base import EvictionPolicy
from kvstrata.policy.lru import LruPolicy
from kvstrata.policy.lru2 import Lru2Policy
from kvstrata.policy.s3fifo import S3FifoPolicy
from kvstrata.policy.twoq import TwoQPolicy

__all__ = ["ENTRY_POINTS", "SHIPPED", "make_policy", "policy_names"]

ENTRY_POINTS: Final = "kvstrata.policies"
"""Entry point group; each entry is a callable without arguments that returns a new policy."""

SHIPPED: Final[Mapping[str, Callable[[], EvictionPolicy]]] = {
    "lru": LruPolicy,
    "arc": ArcPolicy,
    "lru2": Lru2Policy,
    "s3fifo": S3FifoPolicy,
    "2q": TwoQPolicy,
    "auto": AutoPolicy,
}
"""The policies of this package."""

_VERBS: Final = ("bind", "admit", "reclaim", "spare", "victims", "forget", "__len__")


def policy_names() -> list[str]:
    """Return every name that `make_policy` knows here, shipped ones first."""
    return [*SHIPPED, *sorted(_plugged().keys() - SHIPPED.keys())]


def make_policy(name: str) -> EvictionPolicy:
    """Return a new policy.

    Raises ConfigError for a name nobody offers, and for a plug-in that cannot be loaded or is not
    a policy. A plug-in cannot take the name of a shipped policy.
    """
    if name in SHIPPED:
        return SHIPPED[name]()
    plugged = _plugged().get(name)
    if plugged is None:
        raise ConfigError(
            f"policy: unknown policy {name!r}", hint=f"known here: {', '.join(policy_names())}"
        )
    return _load(name, plugged)


def _plugged() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def _load(name: str, entry: EntryPoint) -> EvictionPolicy:
    try:
        made = entry.load()()
    except Exception as error:  # whatever a plug-in raises: say whose it is
        raise ConfigError(
            f"policy: plug-in {name!r} ({entry.value}) cannot be made: {error}",
            hint="mend or remove the package that offers it",
        ) from error
    missing = [verb for verb in _VERBS if not callable(getattr(made, verb, None))]
    if missing:
        raise ConfigError(
            f"policy: plug-in {name!r} ({entry.value}) has no {', '.join(missing)}",
            hint="implement EvictionPolicy, see docs/contracts/eviction-policy.md",
        )
    policy: EvictionPolicy = made
    return policy
