"""A tier of vLLM's own `TieringOffloadingSpec`: name it `KvstrataTier` and give this module_path.

vLLM keeps its CPU tier and its connector; what it writes below goes to kvstrata's tiers.
"""

from kvstrata.connectors.vllm.tiering.tier import KvstrataTier

__all__ = ["KvstrataTier"]
