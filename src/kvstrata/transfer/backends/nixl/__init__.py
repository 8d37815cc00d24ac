"""NIXL: between memories of processes and machines, and between memory and files."""

from __future__ import annotations

from kvstrata.transfer.backends.nixl.agent import NixlAgent
from kvstrata.transfer.backends.nixl.backend import NixlBackend
from kvstrata.transfer.backends.nixl.binding import load_binding, nixl_version
from kvstrata.transfer.backends.nixl.invitation import PeerMemory
from kvstrata.transfer.backends.nixl.requests import NixlStatistics, Request, RequestState

__all__ = [
    "NixlAgent",
    "NixlBackend",
    "NixlStatistics",
    "PeerMemory",
    "Request",
    "RequestState",
    "load_binding",
    "nixl_version",
]
