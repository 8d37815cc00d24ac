"""What bytes really are where, kept beside a manager that must never be wrong about it.

The ledger is told of every write, whoever makes it, and asserts on the bytes themselves: it knows
nothing of how the manager decides. Ticks order events; a clear is a tick that nothing stored
before it may cross.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstrata.core.ids import Holder, SequenceHash, SlotId, TransferId
from kvstrata.core.tier import HOST, TierName
from kvstrata.pool import Pool
from kvstrata.storage.base import NOBODY, StoredBlock
from kvstrata.transfer.base import EraseJob, Job, JobDone, ProbeJob, ReadJob, SealJob, WriteJob

__all__ = ["GARBAGE", "Content", "Disk", "Flight", "Ledger", "Line", "Luck", "Mover", "seal_of"]


class Content(NamedTuple):
    """The bytes in one slot, by what they mean."""

    key: SequenceHash
    """The key that the bytes were computed for; empty for bytes that mean nothing."""
    tick: int
    """When their slot was given to the engine that computed them."""
    damage: int = 0
    """0 for whole bytes; any other number is one way to be broken."""


GARBAGE = Content(SequenceHash(b""), 0)
"""Bytes that belong to no key."""

_FATES = ("good", "nothing", "torn", "no line", "torn line", "line reported lost")


@dataclass(frozen=True, slots=True)
class Line:
    """An index line on the simulated disk."""

    block: StoredBlock
    """What it says."""
    tick: int
    """When the write that it ends was decided."""


def seal_of(key: SequenceHash, content: Content) -> bytes:
    """Return the seal of `content` under `key`; as the real one, it binds both."""
    return b"%b|%b|%d|%d" % (key, content.key, content.tick, content.damage)


@dataclass(frozen=True, slots=True)
class Luck:
    """How likely each thing is, per step or per block; all zero is a world without faults."""

    fail: float = 0.05
    """A block of a job fails."""
    late: float = 0.1
    """A job takes far longer than anybody waits."""
    rot: float = 0.03
    """A block on disk changes by itself."""
    clear: float = 0.02
    """Somebody clears one tier or both."""
    close: float = 0.01
    """A session ends while its process lives on."""
    death: float = 0.01
    """A client's process ends."""
    crash: float = 0.006
    """The daemon ends and starts again."""
    jump: float = 0.01
    """The clock jumps ahead."""


@dataclass(slots=True)
class _Reading:
    key: SequenceHash
    generation: int
    content: Content


@dataclass(slots=True)
class Disk:
    """Bytes and index of one tier below the host."""

    blocks: list[Content]
    """What each slot holds."""
    lines: list[Line | None]
    """The index line of each slot."""
    floor: int = 0
    """Write counter up to which blocks were cleared."""

    @classmethod
    def empty(cls, slots: int) -> Disk:
        """Return a disk of `slots` that holds nothing."""
        return cls([GARBAGE] * slots, [None] * slots)

    def recoverable(self) -> list[StoredBlock]:
        """Return what the index says as a store does: newest line of a key, oldest first."""
        found: dict[SequenceHash, StoredBlock] = {}
        for line in self.lines:
            if line is None or line.block.written <= self.floor:
                continue
            rival = found.get(line.block.key)
            if rival is None or rival.written < line.block.written:
                found[line.block.key] = line.block
        return sorted(found.values(), key=lambda block: block.written)


@dataclass(slots=True)
class Ledger:
    """Bytes of all tiers, the indices of those below the host, and who reads what."""

    host: list[Content]
    """What each host slot holds."""
    disks: dict[TierName, Disk]
    """What the tiers below it hold, by name."""
    tick: int = 0
    """The last event's number."""
    births: dict[TransferId, int] = field(default_factory=dict)
    """When each job was decided."""
    _since: dict[int, int] = field(default_factory=dict)
    _cleared: dict[TierName, int] = field(default_factory=dict)
    _cleared_all: int = 0
    _forgotten: dict[SequenceHash, int] = field(default_factory=dict)
    _reading: dict[Holder, dict[SlotId, _Reading]] = field(default_factory=dict)
    _ended: set[TransferId] = field(default_factory=set)

    def next_tick(self) -> int:
        """Return the number of a new event."""
        self.tick += 1
        return self.tick

    def decided(self, transfers: Iterable[TransferId]) -> None:
        """Note when jobs were decided, unless that is known."""
        for transfer in transfers:
            self.births.setdefault(transfer, self.next_tick())

    def ended(self, transfer: TransferId) -> None:
        """Note the single end of a job."""
        assert transfer not in self._ended, f"{transfer=} ended twice"
        self._ended.add(transfer)

    def restarted(self) -> None:
        """Forget what a daemon's process takes with it: host bytes, readers, job numbers."""
        self.host[:] = [GARBAGE] * len(self.host)
        self._reading.clear()
        self._ended.clear()
        self._since.clear()
        self._forgotten.clear()  # their index lines may not have been blanked
        self.births.clear()

    def cleared(self, tiers: Collection[TierName]) -> None:
        """Note a clear: nothing stored before it may be found after it."""
        tick = self.next_tick()
        self._cleared |= dict.fromkeys(tiers, tick)
        if set(tiers) == {HOST, *self.disks}:
            self._cleared_all = tick

    def forgotten(self, keys: Iterable[SequenceHash]) -> None:
        """Note that no copy of `keys` from before may be found, until a crash."""
        self._forgotten |= dict.fromkeys(keys, self.next_tick())

    def fill(self, slot: SlotId, content: Content, tick: int) -> None:
        """Put bytes in a host slot, on a decision made at `tick`."""
        self.host[slot] = content
        self._since[slot] = tick
        self.check_readers_of(slot)

    # -- readers -------------------------------------------------------------------------------

    def read(
        self, holder: Holder, key: SequenceHash, slot: SlotId, generation: int, pool: Pool
    ) -> None:
        """Note that `holder` was told to read `key` from `slot`; it must be there."""
        content = self.host[slot]
        assert content.key == key, f"{slot=} serves {content}, asked was {key!r}"
        assert content.damage == 0, f"{slot=} serves damaged bytes"
        assert content.tick > self._cleared_all, f"{slot=} serves a block that was cleared"
        assert generation == pool.generations[slot], f"{slot=} was given out already"
        self._reading.setdefault(holder, {})[slot] = _Reading(key, generation, content)

    def stop_reading(self, holder: Holder) -> None:
        """Note that `holder` reads no more."""
        self._reading.pop(holder, None)

    def check_readers_of(self, slot: SlotId) -> None:
        """Assert that nobody has just lost what it reads in `slot`."""
        for holder, slots in self._reading.items():
            if slot in slots:
                assert self.host[slot] == slots[slot].content, f"{slot=} changed under {holder}"

    # -- laws ----------------------------------------------------------------------------------

    def check(self, host: Pool, lower: Mapping[TierName, Pool]) -> None:
        """Assert everything that must hold between any two calls."""
        host.check()
        for slots in self._reading.values():
            for slot, reading in slots.items():
                assert host.generations[slot] == reading.generation, f"{slot=} was given out"
                assert host.hash_of(slot) in (reading.key, None), f"{slot=} was registered anew"
        keys = host.resident()
        for key, slot in zip(keys, host.match(keys), strict=True):
            content = self.host[slot]
            assert content.key == key, f"{slot=} is findable as {key!r} and holds {content}"
            assert content.damage == 0, f"{slot=} is findable and damaged"
            assert content.tick > self._cleared_all, f"{slot=} crossed a clear"
            assert content.tick > self._forgotten.get(key, 0), f"{slot=} was forgotten"
            assert self._since[slot] > self._cleared.get(HOST, 0), f"{slot=} crossed a host clear"
        for name, pool in lower.items():
            pool.check()
            self._check_disk(name, pool)

    def _check_disk(self, name: TierName, pool: Pool) -> None:
        keys = pool.resident()
        for key, slot in zip(keys, pool.match(keys), strict=True):
            line = self.disks[name].lines[slot]
            assert line is not None, f"{name} {slot=} is findable without a line"
            assert line.block.key == key, f"{name} {slot=} has another block's line"
            assert line.tick > self._cleared.get(name, 0), f"{name} {slot=} crossed a clear"
            assert line.tick > self._forgotten.get(key, 0), f"{name} {slot=} was forgotten"


@dataclass(slots=True)
class Flight:
    """A job on its way."""

    due: float
    """When it lands."""
    job: Job
    """What it is to do."""
    intact: tuple[bool, ...]
    """Of a write: which host blocks still matched their seals at its start."""


class Mover:
    """Carries out jobs on a ledger's bytes, each at one moment and as badly as luck has it."""

    def __init__(self, ledger: Ledger, dice: random.Random, luck: Luck) -> None:
        """Use `dice` for everything that `luck` leaves open."""
        self.luck = luck
        self._ledger, self._dice = ledger, dice

    def start(self, job: Job, due: float) -> Flight:
        """Accept `job`; a write verifies its host blocks now."""
        if not isinstance(job, WriteJob):
            return Flight(due, job, ())
        sources = zip(job.keys, job.slots, job.checksums, strict=True)
        host = self._ledger.host
        return Flight(due, job, tuple(seal_of(key, host[at]) == mark for key, at, mark in sources))

    def finish(self, flight: Flight) -> JobDone:
        """Move the bytes and say which blocks are well."""
        fail = self.luck.fail
        return self._move(flight, [1 - 3 * fail, fail, fail / 2, fail / 2, fail / 2, fail / 2])

    def break_off(self, flight: Flight) -> None:
        """Move what a job has moved when its daemon dies; nothing of what it was in memory."""
        if isinstance(flight.job, WriteJob | EraseJob):
            self._move(flight, [1.0] * len(_FATES))

    def _move(self, flight: Flight, odds: list[float]) -> JobDone:
        job = flight.job
        if isinstance(job, EraseJob):
            lines = self._ledger.disks[job.tier].lines
            erased = tuple(self._erase(lines, slot, odds) for slot in job.targets)
            return JobDone(job.transfer, erased)
        assert not isinstance(job, ProbeJob), "only keyed tiers are probed"
        places = range(len(job.slots))
        match job:
            case SealJob():
                ok = [self._dice.random() >= self.luck.fail / 5 for _ in places]
            case ReadJob():
                ok = [self._read(job, place) for place in places]
            case WriteJob():
                fates = self._dice.choices(_FATES, odds, k=len(places))
                ok = [
                    flight.intact[place] and self._write(job, place, fates[place])
                    for place in places
                ]
        marks = zip(job.keys, job.slots, strict=True)
        seals = tuple(seal_of(key, self._ledger.host[slot]) for key, slot in marks)
        return JobDone(job.transfer, tuple(ok), seals)

    def _read(self, job: ReadJob, place: int) -> bool:
        content = self._ledger.disks[job.tier].blocks[job.sources[place]]
        tick = self._ledger.births[job.transfer]
        chance = self._dice.random()
        if chance < self.luck.fail:
            content = GARBAGE
        elif chance < self.luck.fail * 1.5:
            content = content._replace(damage=content.damage + 1)
        self._ledger.fill(job.slots[place], content, tick)
        return chance >= self.luck.fail

    def _write(self, job: WriteJob, place: int, fate: str) -> bool:
        ledger, target = self._ledger, job.targets[place]
        disk = ledger.disks[job.tier]
        if fate == "nothing":
            return False
        disk.blocks[target] = GARBAGE if fate == "torn" else ledger.host[job.slots[place]]
        if fate in {"torn", "no line"}:
            return False  # new bytes under an old line
        written = job.written + len(job.slots) - 1 - place
        key, parent, mark = job.keys[place], job.parents[place], job.checksums[place]
        owner = job.owners[place] if job.owners else NOBODY
        block = StoredBlock(target, key, parent, mark, written, owner)
        tick = ledger.births[job.transfer]
        disk.lines[target] = None if fate == "torn line" else Line(block, tick)
        return fate == "good"

    def _erase(self, lines: list[Line | None], target: SlotId, odds: list[float]) -> bool:
        if self._dice.choices(_FATES, odds) != ["good"]:
            return False
        lines[target] = None
        return True
