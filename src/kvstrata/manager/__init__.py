"""The brain: decides what is kept, staged, written and given up. Sans-I/O: time is an argument."""

from kvstrata.manager.loading import LookupAnswer
from kvstrata.manager.manager import Manager, ReserveAnswer
from kvstrata.manager.state import Counters, LowerTier

__all__ = ["Counters", "LookupAnswer", "LowerTier", "Manager", "ReserveAnswer"]
