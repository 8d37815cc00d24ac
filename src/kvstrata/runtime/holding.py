"""Which layout a daemon holds: its first client's, or that of the blocks in its tiers already.

Blocks that an engine of another layout has left in a tier are found again if their layout can be
bridged (docs/adr/0014); the layout of a slab counts most, since a slab has only one.
"""

from __future__ import annotations

from pathlib import Path

from kvstrata.core.config import Limits, NodeConfig, TierConfig
from kvstrata.core.errors import ConfigError, LayoutError
from kvstrata.core.tier import TierKind
from kvstrata.layout import BlockLayout, check_bridge, parse_layout
from kvstrata.storage.base import PAGE_BYTES
from kvstrata.storage.footing import SLAB_NAME, is_device
from kvstrata.storage.inspection.directory import find_folders
from kvstrata.storage.inspection.objects import find_prefixes
from kvstrata.storage.superblock import decode_superblock

__all__ = ["choose_layout", "refuse_layout"]


def choose_layout(config: NodeConfig, own: BlockLayout) -> BlockLayout:
    """Return `own`, or the layout of blocks in the tiers if a client of `own` can bridge it.

    In a shared directory or a bucket `own` comes first, then the lowest fingerprint: daemons that
    start later decide as those before them. What cannot be read is left to whoever opens it.
    """
    tiers = sorted(config.lower.values(), key=lambda tier: tier.kind.keyed)
    for tier in tiers:
        found = _found(tier, config.limits)
        if own.fingerprint in [fingerprint for fingerprint, _ in found]:
            return own
        for fingerprint, description in sorted(found):
            held = parse_layout(description, fingerprint)
            if held and _bridged(own, held):
                return held
    return own


def refuse_layout(own: BlockLayout, held: BlockLayout, *, bridges: bool) -> None:
    """Raise ConfigError unless a client of `own` can use blocks of `held`."""
    why = ""
    if own != held and bridges:
        try:
            check_bridge(own, held)
        except LayoutError as error:
            why = f": {error.message}"
        else:
            return
    if own != held:
        raise ConfigError(
            f"layout: this daemon holds blocks of {held.describe()}, the client has "
            f"{own.describe()}{why}",
            hint="start another daemon with its own address and directory for this layout",
        )


def _bridged(own: BlockLayout, held: BlockLayout) -> bool:
    try:
        check_bridge(own, held)
    except LayoutError:
        return False
    return True


def _found(tier: TierConfig, limits: Limits) -> list[tuple[bytes, str]]:
    """Return fingerprint and description of each layout that a tier has blocks of."""
    try:
        match tier.kind:
            case TierKind.DISK:
                return _slab(tier.places[0])
            case TierKind.SHARED if tier.directory and Path(tier.directory).expanduser().is_dir():
                folders = find_folders(Path(tier.directory).expanduser())
                return [(each.fingerprint, each.description) for each in folders]
            case TierKind.OBJECT if tier.url:
                prefixes = find_prefixes(tier.url, limits.object_timeout_s)
                return [(each.fingerprint, each.description) for each in prefixes]
            case _:  # a plug-in's store does not tell
                return []
    except (ConfigError, OSError):
        return []


def _slab(place: str) -> list[tuple[bytes, str]]:
    """Return what the slab in a directory or on a device holds; nothing if there is none."""
    path = Path(place).expanduser()
    path = path if is_device(place) else path / SLAB_NAME
    with path.open("rb", buffering=0) as file:
        found = decode_superblock(file.read(PAGE_BYTES), str(path))
    return [(found.fingerprint, found.description)]
