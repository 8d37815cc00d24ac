"""Looking into stores from outside, without a daemon: what they hold, whether it is whole, litter.

Nothing needs to be known beforehand: a slab's superblock, a directory's or a prefix's marker and
each block's header say what is there. Nothing is changed but by `quarantine` and `reclaim`.
"""

from __future__ import annotations

from kvstrata.storage.inspection.places import open_place
from kvstrata.storage.inspection.reclaim import GcOptions, Reclaimed, reclaim
from kvstrata.storage.inspection.records import Checked, FoundBlock, Inspected, Verdict

__all__ = [
    "Checked",
    "FoundBlock",
    "GcOptions",
    "Inspected",
    "Reclaimed",
    "Verdict",
    "open_place",
    "reclaim",
]
