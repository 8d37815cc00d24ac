"""The geometry of a block's bytes: what they mean and in which order they lie. Pure."""

from kvstrata.layout.block import BlockLayout, Dimension, Shard
from kvstrata.layout.paged import PagedCache, page_view

__all__ = ["BlockLayout", "Dimension", "PagedCache", "Shard", "page_view"]
