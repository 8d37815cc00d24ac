"""How a block's bytes are written below the host: shorter, encrypted, or as they are."""

from kvstrata.storage.codecs.base import BlockFacts, Codec, CodecSettings
from kvstrata.storage.codecs.chain import CodecChain, make_chain

__all__ = ["BlockFacts", "Codec", "CodecChain", "CodecSettings", "make_chain"]
