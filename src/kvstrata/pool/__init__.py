"""Slots of one tier: states, registry hash -> slot, pins, leaf-first eviction. Holds no bytes."""

from kvstrata.pool.pins import Pin
from kvstrata.pool.pool import Pool
from kvstrata.pool.records import PoolStatistics, Reservation
from kvstrata.pool.states import SlotState

__all__ = ["Pin", "Pool", "PoolStatistics", "Reservation", "SlotState"]
