"""Opens the keyed store that a tier's configuration names, and says how many blocks it may keep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from kvstrata.core.config import Limits, TierConfig
from kvstrata.core.errors import ConfigError
from kvstrata.core.tier import TierKind
from kvstrata.layout import BlockLayout
from kvstrata.storage.base import PAGE_BYTES, align
from kvstrata.storage.codecs import CodecChain, CodecSettings, make_chain
from kvstrata.storage.directory import DirectoryLimits, DirectoryStore
from kvstrata.storage.envelope import HEADER_BYTES
from kvstrata.storage.footing import check_directory
from kvstrata.storage.keyed import KeyedStore
from kvstrata.storage.location import parse_location
from kvstrata.storage.objects import ObjectStore
from kvstrata.storage.plugged import StoreRequest, check_plugged, open_plugged

__all__ = ["check_keyed", "keyed_slots", "lossy_codecs", "open_chain", "open_keyed"]

_ANY_DTYPE: Final = "float32"


def check_keyed(tier: TierConfig) -> None:
    """Raise ConfigError for what cannot work whatever the blocks' layout is."""
    if tier.kind is TierKind.OBJECT:
        assert tier.url is not None, "an object tier without a URL"
        parse_location(tier.url)
        try:
            import obstore  # noqa: F401  # only whether it is there
        except ImportError as error:
            raise ConfigError(
                "tiers.object: the object client is not installed",
                hint="pip install 'kvstrata[object]'",
            ) from error
    elif tier.kind is TierKind.STORE:
        assert tier.plugin is not None, "a store tier without a name"
        assert tier.url is not None, "a store tier without a URL"
        check_plugged(tier.plugin, tier.url)
    else:
        assert tier.directory is not None, "a shared tier without a directory"
        check_directory(tier.directory, field=f"tiers.{tier.kind.value}")
    open_chain(tier, CodecSettings(_ANY_DTYPE, bytes(32)))


def open_keyed(tier: TierConfig, layout: BlockLayout, limits: Limits) -> KeyedStore:
    """Return the store of `layout`; raises ConfigError, for what is not ours LayoutError."""
    if tier.kind is TierKind.SHARED:
        assert tier.directory is not None, "a shared tier without a directory"
        return DirectoryStore.open(tier.directory, tier.capacity_bytes, layout)
    assert tier.url is not None, f"{tier.kind.value} tier without a URL"
    if keyed_slots(tier, layout) < 1:
        raise ConfigError(
            f"tiers.{tier.kind.value}: {tier.capacity_bytes} bytes hold not one block of "
            f"{layout.block_bytes}",
            hint=f"use a larger {tier.kind.value} tier",
        )
    timeout_s = limits.object_timeout_s
    if tier.kind is TierKind.OBJECT:
        return ObjectStore.open(tier.url, layout, timeout_s=timeout_s)
    assert tier.plugin is not None, "a store tier without a name"
    request = StoreRequest(tier.url, layout, tier.capacity_bytes, timeout_s)
    return open_plugged(tier.plugin, request)


def open_chain(tier: TierConfig, settings: CodecSettings) -> CodecChain:
    """Return what the tier's blocks are written with; raises ConfigError."""
    return make_chain(tier.codec, settings)


def lossy_codecs(tiers: Iterable[TierConfig]) -> list[str]:
    """Return the codecs, by name, that change the numbers of blocks in some of `tiers`."""
    chains = [open_chain(tier, CodecSettings(_ANY_DTYPE, bytes(32))) for tier in tiers]
    return sorted({name for chain in chains for name in chain.changes})


def keyed_slots(tier: TierConfig, layout: BlockLayout) -> int:
    """Return how many blocks this daemon keeps there; encoded ones may take less, and count whole.

    Of a directory as many as its collector leaves, so that alone we never wake it.
    """
    if tier.kind is not TierKind.SHARED:
        return tier.capacity_bytes // (layout.block_bytes + HEADER_BYTES)
    usable = int(tier.capacity_bytes * DirectoryLimits().collect_to)
    return usable // (align(layout.block_bytes) + PAGE_BYTES)
