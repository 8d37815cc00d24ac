"""kvstrata: a KV block manager for LLM inference.

KV blocks are kept in tiers (host memory, disk) under keys that name a token prefix, verified on
every arrival, and given back faster than an engine recomputes them. `Client` is the way in for a
program of your own, `Retention` says how long; engines use `kvstrata.connectors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstrata.core.retention import Retention
    from kvstrata.runtime.client import Client

__all__ = ["Client", "Retention", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load `Client` on first use: an engine that imports us at start must not pay for sockets."""
    if name == "Client":
        from kvstrata.runtime.client import Client

        return Client
    if name == "Retention":
        from kvstrata.core.retention import Retention

        return Retention
    message = f"module 'kvstrata' has no attribute {name!r}"
    raise AttributeError(message)
