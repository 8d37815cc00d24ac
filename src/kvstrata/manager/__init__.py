"""The brain: decides what is kept, staged, written and given up. Sans-I/O: time is an argument."""

from kvstrata.manager.costs import Costs
from kvstrata.manager.loading import EngineSpeed, LookupAnswer
from kvstrata.manager.manager import Manager, ReserveAnswer
from kvstrata.manager.speed import TierSeed
from kvstrata.manager.state import Counters, LowerTier

__all__ = [
    "Costs",
    "Counters",
    "EngineSpeed",
    "LookupAnswer",
    "LowerTier",
    "Manager",
    "ReserveAnswer",
    "TierSeed",
]
