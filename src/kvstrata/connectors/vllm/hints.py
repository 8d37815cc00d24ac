"""What a request says about its own blocks, in its `kv_transfer_params`."""

from __future__ import annotations

import logging
from typing import Annotated, Any, Final

import msgspec

from kvstrata.core.errors import ConfigError
from kvstrata.core.retention import HINTS_MAX, BlockHint, Retention
from kvstrata.core.tenants import TENANT_NAME_MAX

__all__ = ["RequestHints", "hints_for", "read_hints"]

log = logging.getLogger("kvstrata.vllm")

_PIN_S_MAX: Final = 3600.0  # as the daemon's leases, unless it was told otherwise


class RequestHints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The value of `kvstrata` in a request's `kv_transfer_params`."""

    retention: Annotated[list[Retention], msgspec.Meta(max_length=HINTS_MAX)] = []
    """How long ranges of its tokens are to be kept, those that it generates included."""
    tenant: Annotated[str, msgspec.Meta(max_length=TENANT_NAME_MAX)] | None = None
    """Whose it is: who is charged, and finds it. None takes the engine's `tenant` setting."""
    pin_s: Annotated[float, msgspec.Meta(ge=0, le=_PIN_S_MAX)] | None = None
    """For so long from its end nothing evicts its blocks from the host; 0 ends that; None asks for
    nothing."""
    store: bool = True
    """False: what this request computes is not kept."""
    tokens_from: Any = None
    """Ours, from an answer that a client handed on; not read."""


def read_hints(params: Any) -> RequestHints | None:
    """Return what the request asks for; None if it names a tenant and it cannot be told which.

    A hint that is wrong must not cost an answer: it is logged, and the request is served without.
    """
    asked = params.get("kvstrata") if isinstance(params, dict) else None
    if asked is None:
        return RequestHints()
    try:
        return msgspec.convert(asked, RequestHints)
    except (msgspec.ValidationError, ConfigError) as error:
        log.warning("kv_transfer_params.kvstrata of a request is ignored: %s", error)
    # What is wrong with the rest must not make it another tenant's.
    tenant = asked.get("tenant") if isinstance(asked, dict) else None
    if tenant is None or (isinstance(tenant, str) and len(tenant) <= TENANT_NAME_MAX):
        return RequestHints(tenant=tenant)
    return None


def hints_for(
    retention: list[Retention], block_tokens: int, first: int, last: int
) -> list[BlockHint]:
    """Return the hints of `retention` for the blocks from `first` up to `last`, counted from it."""
    found = []
    for each in retention:
        hint = each.hint(block_tokens, last)
        if hint is None or hint.first + hint.count <= first:
            continue
        start = max(hint.first, first)
        count = hint.first + hint.count - start
        found.append(BlockHint(start - first, count, hint.priority, hint.duration_s, hint.ttl_s))
    return found
