"""The brain: decides what is kept, staged, written and given up. Sans-I/O: time is an argument."""

from kvstrata.manager.manager import LookupAnswer, Manager, ReserveAnswer
from kvstrata.manager.state import Counters

__all__ = ["Counters", "LookupAnswer", "Manager", "ReserveAnswer"]
