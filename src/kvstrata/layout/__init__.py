"""The geometry of a block's bytes: what they mean and in which order they lie. Pure."""

from kvstrata.layout.block import BlockLayout, Dimension, Shard
from kvstrata.layout.grouped import GroupedCache, LayerGroup, LayerRun
from kvstrata.layout.paged import PagedCache, page_view
from kvstrata.layout.transform import StridedCopy, apply_transform, plan_gather, plan_transform

__all__ = [
    "BlockLayout",
    "Dimension",
    "GroupedCache",
    "LayerGroup",
    "LayerRun",
    "PagedCache",
    "Shard",
    "StridedCopy",
    "apply_transform",
    "page_view",
    "plan_gather",
    "plan_transform",
]
