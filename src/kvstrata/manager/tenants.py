"""Who stored what: owners, by the tags that index lines keep, and the names that go with them.

An *owner* is one tenant in one namespace, a small number that pools charge slots to. Numbers are
given out as tenants come and taken back, when they run out, from owners that hold nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from kvstrata.core.errors import ConfigError
from kvstrata.core.tenants import (
    NO_TAG,
    TAG_BYTES,
    TenantConfig,
    guaranteed_slots,
    tenant_tag,
)
from kvstrata.policy import TenantPolicy, make_policy
from kvstrata.policy.base import EvictionPolicy
from kvstrata.pool import Pool
from kvstrata.storage.base import NOBODY
from kvstrata.tokens import Namespace

__all__ = ["OWNERS_MAX", "Tenants"]

OWNERS_MAX: Final = 1 << 16
"""Most owners that hold blocks at one time; what comes on top is charged to owner 0."""
_NAMESPACES_MAX: Final = 1024
_NAMES_SHOWN: Final = 100


class Tenants:
    """The owners of one node's blocks."""

    def __init__(
        self, configured: Sequence[TenantConfig] = (), owners_max: int = OWNERS_MAX
    ) -> None:
        """Know the tenants with a guarantee; the others as they come."""
        self._configured = tuple(configured)
        self._owners_max = owners_max
        self._account_of = {
            tenant_tag(tenant.name): account for account, tenant in enumerate(self._configured, 1)
        }
        self._names = {tenant_tag(tenant.name): tenant.name for tenant in self._configured}
        self._namespaces: dict[bytes, Namespace] = {}
        self._tags = [NOBODY]
        self._owner_of = {NOBODY: 0}
        self._pools: dict[str, Pool] = {}
        self._guaranteed: dict[str, list[int]] = {}
        self._spare: list[int] = []
        self._until_sweep = 0
        self.accounts = [0]
        """Owner -> account of `TenantPolicy`: 0, or that of a tenant with a guarantee. Live."""
        for tag in self._account_of:  # there is always one to charge: a guarantee has to count
            self.recall(NO_TAG + tag)

    # -- setting up ----------------------------------------------------------------------------

    def policy_for(self, name: str, tier: str, capacity_bytes: int, slots: int) -> EvictionPolicy:
        """Return the eviction policy of a tier of so many slots, with quotas if there are any."""
        self._guaranteed[tier] = guaranteed_slots(self._configured, tier, capacity_bytes, slots)
        if not self._configured:
            return make_policy(name)
        return TenantPolicy(lambda: make_policy(name), self._guaranteed[tier], self.accounts)

    def watch(self, pools: Mapping[str, Pool]) -> None:
        """Learn the pools, by tier, whose slots are charged."""
        self._pools = dict(pools)

    # -- owners --------------------------------------------------------------------------------

    def meet_namespace(self, tag: bytes, namespace: Namespace) -> None:
        """Learn what `tag` stands for; of more than a thousand the oldest is forgotten."""
        self._namespaces.pop(tag, None)
        self._namespaces[tag] = namespace
        if len(self._namespaces) > _NAMESPACES_MAX:
            del self._namespaces[next(iter(self._namespaces))]

    def namespace(self, tag: bytes) -> Namespace | None:
        """Return what `tag` stands for, if that is known."""
        return self._namespaces.get(tag)

    def owner(self, namespace: bytes, tenant: str) -> int:
        """Return the owner that a tenant's blocks in a namespace, given by tag, are charged to."""
        tag = tenant_tag(tenant)
        if namespace + tag not in self._owner_of and len(self._tags) >= self._owners_max:
            self._sweep()
        owner = self.recall(namespace + tag)
        if owner:
            self._names.setdefault(tag, tenant)
        return owner

    def recall(self, tag: bytes) -> int:
        """Return the owner of an index line's tag: namespace and tenant, `TAG_BYTES` each."""
        owner = self._owner_of.get(tag)
        if owner is not None:
            return owner
        if self._spare:
            owner = self._spare.pop()
            self._tags[owner] = tag
        elif len(self._tags) < self._owners_max:
            owner = len(self._tags)
            self._tags.append(tag)
            self.accounts.append(0)
        else:
            return self._owner_of.get(NO_TAG + tag[TAG_BYTES:], 0)
        self._owner_of[tag] = owner
        self.accounts[owner] = self._account_of.get(tag[TAG_BYTES:], 0)
        return owner

    def tag_of(self, owner: int) -> bytes:
        """Return what stands in the index lines of an owner's blocks."""
        return self._tags[owner]

    def matching(self, namespace: str, tenant: str | None) -> set[int]:
        """Return the owners of a tenant, given by name, in a namespace, by model name or hex tag.

        An empty namespace means any, and so does no tenant; the empty tenant is one.
        Raises ConfigError, with a hint that lists the known ones, where nothing is kept.
        """
        held = self._held()
        spaces = {self._tags[owner][:TAG_BYTES] for owner in held}
        if namespace:
            spaces = {tag for tag in spaces if namespace in {tag.hex(), self._model(tag)}}
            if not spaces:
                known = {self._tags[owner][:TAG_BYTES] for owner in held}
                raise _unknown("namespace", namespace, map(self._space_name, known))
        names = {self._tags[owner][TAG_BYTES:] for owner in held}
        if tenant is not None:
            if tenant_tag(tenant) not in names:
                raise _unknown("tenant", tenant, map(self._tenant_name, names))
            names = {tenant_tag(tenant)}
        return {
            owner
            for owner in held
            if self._tags[owner][:TAG_BYTES] in spaces and self._tags[owner][TAG_BYTES:] in names
        }

    # -- looking -------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        """Return, by tenant and by namespace, the slots held in each tier; the largest ones first.

        A tenant's slots count whatever they hold, one that is being filled too.
        """
        tenants: dict[bytes, Counter[str]] = {tag: Counter() for tag in self._account_of}
        spaces: dict[bytes, Counter[str]] = {}
        for tier, pool in self._pools.items():
            for owner, count in pool.owned().items():
                tag = self._tags[owner]
                tenants.setdefault(tag[TAG_BYTES:], Counter())[tier] += count
                spaces.setdefault(tag[:TAG_BYTES], Counter())[tier] += count
        shown = _largest(tenants, self._account_of)
        return {
            "tenants": [
                {
                    "tenant": self._tenant_name(tag),
                    "slots": dict(tenants[tag]),
                    "guaranteed": self._guarantees(tag),
                }
                for tag in shown
            ],
            "namespaces": [
                {"tag": tag.hex(), "model": self._model(tag), "slots": dict(spaces[tag])}
                for tag in _largest(spaces, ())
            ],
            "tenants_not_shown": len(tenants) - len(shown),
        }

    # -- private -------------------------------------------------------------------------------

    def _held(self) -> set[int]:
        return {owner for pool in self._pools.values() for owner in pool.owned()}

    def _sweep(self) -> None:
        """Take numbers back from owners that hold nothing."""
        self._until_sweep -= 1
        if self._spare or self._until_sweep > 0:
            return
        held = self._held()
        for owner in range(1 + len(self._configured), len(self._tags)):
            if owner not in held and self._owner_of.pop(self._tags[owner], None) is not None:
                self._spare.append(owner)
        known = {tag[TAG_BYTES:] for tag in self._owner_of} | self._account_of.keys()
        self._names = {tag: name for tag, name in self._names.items() if tag in known}
        self._until_sweep = 1024  # a sweep looks at every owner: not at each call that finds none

    def _guarantees(self, tag: bytes) -> dict[str, int]:
        account = self._account_of.get(tag)
        if account is None:
            return {}
        return {tier: slots[account - 1] for tier, slots in self._guaranteed.items()}

    def _model(self, tag: bytes) -> str:
        found = self._namespaces.get(tag)
        return found.model if found else ""

    def _space_name(self, tag: bytes) -> str:
        return f"{self._model(tag)} ({tag.hex()})" if self._model(tag) else tag.hex()

    def _tenant_name(self, tag: bytes) -> str:
        return "(unknown)" if tag == NO_TAG else self._names.get(tag, tag.hex())


def _largest(counts: Mapping[bytes, Counter[str]], always: Collection[bytes]) -> list[bytes]:
    order = sorted(counts, key=lambda tag: (tag in always, counts[tag].total()), reverse=True)
    return order[: max(_NAMES_SHOWN, len(always))]


def _unknown(what: str, name: str, known: Any) -> ConfigError:
    names = sorted({each or "'' (the default)" for each in known})
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""  # noqa: PLR2004
    return ConfigError(
        f"{what}: nothing of {name!r} is kept",
        hint=f"known here: {', '.join(names[:20]) or 'none'}{more}",
    )
