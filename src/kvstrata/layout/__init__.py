"""The geometry of a block's bytes: what they mean and in which order they lie. Pure."""

from kvstrata.layout.block import BlockLayout, Dimension, Shard, parse_layout
from kvstrata.layout.bridge import Bridge, check_bridge
from kvstrata.layout.grouped import GroupedCache, LayerGroup, LayerRun
from kvstrata.layout.paged import PagedCache, page_view
from kvstrata.layout.places import model_geometry, rank_part
from kvstrata.layout.transform import StridedCopy, apply_transform, plan_gather, plan_transform

__all__ = [
    "BlockLayout",
    "Bridge",
    "Dimension",
    "GroupedCache",
    "LayerGroup",
    "LayerRun",
    "PagedCache",
    "Shard",
    "StridedCopy",
    "apply_transform",
    "check_bridge",
    "model_geometry",
    "page_view",
    "parse_layout",
    "plan_gather",
    "plan_transform",
    "rank_part",
]
