"""Every life of a very small node: all orders of all things that can happen, up to a depth.

Where `SimWorld` meets long lives by chance, this meets short ones without exception. A world has
one chain, two tiers of a few slots, and two requests for it; a step is one call, or one end of one
job, good or bad. Worlds that look alike are explored once, so counts are the same on each machine.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from kvstrata.core.config import Limits
from kvstrata.core.ids import Holder, SequenceHash, SessionId, SlotId
from kvstrata.core.tier import DISK, HOST, Admission, TierName
from kvstrata.manager import LowerTier, Manager
from kvstrata.policy import LruPolicy
from kvstrata.pool import Pool
from kvstrata.pool.states import LEGAL_MOVES
from kvstrata.testing.oracle import GARBAGE, Content, Disk, Flight, Ledger, Luck, Mover

__all__ = ["Census", "TinyWorld", "explore"]

_LIMITS = Limits(
    job_blocks_max=2, offload_blocks_in_flight_max=2, offload_backlog_blocks_max=3,
    staging_timeout_s=5.0, hold_timeout_s=30.0,
)  # fmt: skip
_GOOD = Luck(*[0.0] * 8)


@dataclass(slots=True)
class _Request:
    holder: Holder
    does: str = "lookup"
    ready: int = 0
    fills: dict[SlotId, Content] = field(default_factory=dict)


@dataclass(slots=True)
class Census:
    """What an exploration met."""

    states: int = 0
    """Different worlds."""
    steps: int = 0
    """Steps taken between them."""
    served: int = 0
    """Blocks given out to be read, over all steps."""
    moves: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Changes of slot state that were seen."""

    def add(self, other: Census) -> None:
        """Count what `other` met, too."""
        self.states += other.states
        self.steps += other.steps
        self.served += other.served
        self.moves.update(other.moves)


class TinyWorld:
    """One node, one chain of `blocks`, two requests from two sessions."""

    def __init__(
        self,
        blocks: int,
        host_slots: int,
        disk_slots: int,
        admission: Admission = Admission.WRITE_THROUGH,
    ) -> None:
        """Make an empty node."""
        self.now = 0.0
        self.chain = [SequenceHash(bytes([number]) * 16) for number in range(blocks)]
        self.host = Pool(host_slots, LruPolicy())
        self.disk = Pool(disk_slots, LruPolicy())
        self.manager = Manager(self.host, [LowerTier(DISK, self.disk, admission)], _LIMITS)
        self.ledger = Ledger([GARBAGE] * host_slots, {DISK: Disk.empty(disk_slots)})
        self.mover = Mover(self.ledger, Random(0), _GOOD)
        self.requests = [_Request(Holder(SessionId(number), "r")) for number in (1, 2)]
        self.flights: list[Flight] = []
        self.served = 0

    def actions(self) -> Iterator[tuple[str, int]]:
        """Yield everything that can happen next."""
        for number, request in enumerate(self.requests):
            yield request.does, number
            if request.does == "fill":
                yield "abort", number
            if request.does in {"acquire", "read"}:
                yield "forget", number
        for number in range(len(self.flights)):
            yield "land", number
            yield "fail", number
        for name in ("late", "clear host", "clear disk", "clear both", "die"):
            yield name, 0

    def take(self, name: str, number: int) -> None:
        """Let one thing happen, let the manager work, and check every law."""
        act: Callable[[int], None] = getattr(self, f"_{name.replace(' ', '_')}")
        act(number)
        jobs = self.manager.step(self.now)
        self.ledger.decided(job.transfer for job in jobs)
        self.flights += [self.mover.start(job, 0.0) for job in jobs]
        self.ledger.check(self.host, {DISK: self.disk})
        counters = self.manager.counters
        assert all(getattr(counters, each) >= 0 for each in counters.__slots__), "a count fell"

    def fingerprint(self) -> Any:
        """Return what decides the future of this world, without names that do not."""
        manager: Any = self.manager
        storing, onboarding = manager._storing, manager._onboarding  # noqa: SLF001
        offloading, loading = manager._offloading, manager._loading  # noqa: SLF001
        (edge,) = offloading._edges  # noqa: SLF001
        disk = self.ledger.disks[DISK]
        ledger: Any = self.ledger
        order = {flight.job.transfer: place for place, flight in enumerate(self.flights)}
        return (
            _pool(self.host),
            _pool(self.disk),
            tuple(self._meaning(content) for content in self.ledger.host),
            tuple(self._meaning(content) for content in disk.blocks),
            tuple(line and (line.block.key, line.block.parent) for line in disk.lines),
            tuple((r.does, r.ready, tuple(r.fills)) for r in self.requests),
            tuple((type(f.job).__name__, _shape(f.job), f.intact) for f in self.flights),
            tuple((slot, fill.holder, fill.key) for slot, fill in storing._fills.items()),  # noqa: SLF001
            frozenset(storing._coming), frozenset(storing._stale),  # noqa: SLF001
            tuple((order[t], seal.stale) for t, seal in storing._seals.items()),  # noqa: SLF001
            tuple(
                (order[t], read.stale, read.given_up, frozenset(read.waiters))
                for t, read in onboarding._reads.items()  # noqa: SLF001
            ),
            tuple((order[t], write.stale) for t, write in offloading._writes.items()),  # noqa: SLF001
            tuple(edge.backlog), frozenset(edge.writing), frozenset(edge.kept),
            tuple(sorted(offloading._uses._young.items())) if offloading._uses else (),  # noqa: SLF001
            tuple(
                (holder, hold.acquired, bool(hold.staging_until), frozenset(hold.held))
                for holder, hold in loading._holds.items()  # noqa: SLF001
            ),
            frozenset(ledger._reading),  # noqa: SLF001
        )  # fmt: skip

    def _meaning(self, content: Content) -> tuple[bytes, bool]:
        ledger: Any = self.ledger
        return content.key, content.tick > ledger._cleared_all  # noqa: SLF001

    # -- what can happen -----------------------------------------------------------------------

    def _lookup(self, number: int) -> None:
        request = self.requests[number]
        answer = self.manager.lookup(request.holder, self.chain, self.now)
        if not answer.pending:
            request.ready = answer.ready
            request.does = "acquire" if answer.ready else "store"

    def _acquire(self, number: int) -> None:
        request = self.requests[number]
        wanted = self.chain[: request.ready]
        answer = self.manager.acquire(request.holder, wanted, self.now)
        for key, slot, mark in zip(wanted, answer.slots, answer.generations, strict=False):
            self.ledger.read(request.holder, key, slot, mark, self.host)
        self.served += len(answer.slots)
        request.ready, request.does = len(answer.slots), "read"

    def _read(self, number: int) -> None:
        self._forget(number)
        self.requests[number].does = "store"

    def _forget(self, number: int) -> None:
        request = self.requests[number]
        self.ledger.stop_reading(request.holder)
        self.manager.release(request.holder)
        request.does = "lookup"

    def _store(self, number: int) -> None:
        request = self.requests[number]
        first = request.ready
        offered = self.chain[first:]
        parent = self.chain[first - 1] if first else None
        answer = self.manager.reserve(request.holder, parent, offered)
        for index, slot in zip(answer.indices, answer.slots, strict=True):
            tick = self.ledger.next_tick()
            request.fills[slot] = Content(offered[index], tick)
            self.ledger.fill(slot, GARBAGE, tick)
        request.does = "fill" if request.fills else "lookup"

    def _fill(self, number: int) -> None:
        request = self.requests[number]
        slots = list(request.fills)
        for slot in slots:
            content = request.fills.pop(slot)
            self.ledger.fill(slot, content, content.tick)
        self.manager.seal(request.holder, slots)
        self._forget(number)

    def _abort(self, number: int) -> None:
        request = self.requests[number]
        self.manager.abort(request.holder, list(request.fills))
        request.fills.clear()
        self._forget(number)

    def _land(self, number: int) -> None:
        self._end(number, _GOOD)

    def _fail(self, number: int) -> None:
        self._end(number, Luck(fail=1 / 3))

    def _end(self, number: int, luck: Luck) -> None:
        self.mover.luck = luck
        done = self.mover.finish(self.flights.pop(number))
        self.mover.luck = _GOOD
        self.ledger.ended(done.transfer)
        self.manager.complete(done)

    def _late(self, _: int) -> None:
        self.now += 6.0
        self.manager.late(self.now)

    def _clear_host(self, _: int) -> None:
        self._clear([HOST])

    def _clear_disk(self, _: int) -> None:
        self._clear([DISK])

    def _clear_both(self, _: int) -> None:
        self._clear([HOST, DISK])

    def _clear(self, tiers: list[TierName]) -> None:
        self.manager.clear(tiers)
        if DISK in tiers:
            self.ledger.disks[DISK].floor = self.manager.written(DISK)
        self.ledger.cleared(tiers)

    def _die(self, _: int) -> None:
        request = self.requests[1]
        self.ledger.stop_reading(request.holder)
        self.manager.session_dead(request.holder.session)
        request.fills.clear()
        request.does, request.ready = "lookup", 0


def explore(world: TinyWorld, depth: int) -> Census:
    """Take every path of up to `depth` steps from `world`; AssertionError names a bad one."""
    census = Census()
    seen = {world.fingerprint()}
    front: list[tuple[TinyWorld, tuple[tuple[str, int], ...]]] = [(world, ())]
    for _ in range(depth):
        behind: list[tuple[TinyWorld, tuple[tuple[str, int], ...]]] = []
        for here, path in front:
            for action in here.actions():
                there = copy.deepcopy(here)
                try:
                    there.take(*action)
                except AssertionError as error:
                    raise AssertionError(f"{error}, after {[*path, action]}") from error
                census.steps += 1
                census.served += there.served - here.served
                _note_moves(here, there, census.moves)
                mark = there.fingerprint()
                if mark not in seen:
                    seen.add(mark)
                    behind.append((there, (*path, action)))
        front = behind
    census.states = len(seen)
    return census


def _note_moves(before: TinyWorld, after: TinyWorld, moves: Counter[tuple[int, int]]) -> None:
    for one, other in ((before.host, after.host), (before.disk, after.disk)):
        old: Any = one
        new: Any = other
        for source, target in zip(old._state, new._state, strict=True):  # noqa: SLF001
            if source != target:
                moves[source, target] += 1


def direct_moves(census: Census) -> set[tuple[int, int]]:
    """Return the legal moves that were seen as they are, not as two in one step."""
    return {move for move in census.moves if move in LEGAL_MOVES}


def _pool(pool: Pool) -> Any:
    inside: Any = pool
    return (
        bytes(inside._state), tuple(inside._hash), tuple(inside._pins), tuple(inside._free),  # noqa: SLF001
        tuple(inside._policy._default._order), tuple(inside._ahead._order),  # noqa: SLF001
        frozenset(inside._ahead._back),  # noqa: SLF001
        tuple(inside._leaves.orphans.items()), tuple(inside._leaves.children),  # noqa: SLF001
    )  # fmt: skip


def _shape(job: Any) -> Any:
    return tuple(
        getattr(job, name, None) for name in ("slots", "targets", "sources", "keys", "parents")
    )
