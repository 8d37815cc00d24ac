"""A whole node in one thread and one seed: the real brain, and around it everything that fails.

    python -m kvstrata.testing.simworld --seeds 200 --first 1

Engines live and die, transfers are late, reordered, torn and wrong, the disk rots, the clock jumps,
the daemon crashes and recovers from what its index says. `Ledger` checks the bytes after each step.
The same seed takes the same steps on every machine.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from kvstrata.core.config import Limits
from kvstrata.core.ids import Holder, SequenceHash, SessionId, SlotId
from kvstrata.core.retention import BlockHint
from kvstrata.core.tier import DISK, HOST, Admission, TierName
from kvstrata.manager import Costs, Counters, EngineSpeed, LowerTier, Manager
from kvstrata.manager.groups import WHOLE, Chain
from kvstrata.policy import make_policy, policy_names
from kvstrata.pool import Pool
from kvstrata.testing.oracle import GARBAGE, Content, Disk, Flight, Ledger, Luck, Mover

__all__ = ["SimWorld", "main"]

HOST_SLOTS = 10
DISK_SLOTS = {DISK: 16, TierName("disk2"): 20}
ADMISSIONS = [
    [Admission.WRITE_THROUGH, Admission.WRITE_THROUGH],
    [Admission.ON_EVICT, Admission.ON_EVICT],
    [Admission.FREQUENCY, Admission.WRITE_THROUGH],
    [Admission.WRITE_THROUGH, Admission.ON_EVICT],
    [Admission.ON_EVICT, Admission.FREQUENCY],
    [Admission.WRITE_THROUGH],
    [],
]
BYPASS = (0, 3, 5)  # of them, those under which the host may be bypassed
SETTLE_STEPS_MAX = 400
WINDOWS = [WHOLE, (0, 2), (0, 1), (0, 0, 3), (2, 1)]
LIMITS = Limits(
    staging_timeout_s=5.0,
    hold_timeout_s=30.0,
    job_blocks_max=2,
    offload_blocks_in_flight_max=4,
    offload_backlog_blocks_max=5,
    offload_priority_min=20,
    relay_blocks_max=3,
    demote_share=0.4,
)


@dataclass(slots=True)
class _Request:
    holder: Holder
    chain: list[SequenceHash]
    windows: tuple[int, ...] = WHOLE
    does: str = "lookup"
    ready: int = 0
    fills: dict[SlotId, Content] = field(default_factory=dict)

    def chains(self, blocks: int) -> list[Chain]:
        """Return the first `blocks` in each group of layers; each has keys of its own."""
        first = self.chain[:blocks]
        return [
            Chain([_in_group(key, group) for key in first], window)
            for group, window in enumerate(self.windows)
        ]

    def keys(self, blocks: int) -> list[SequenceHash]:
        """Return the keys of the first `blocks`, one group after the other."""
        return [key for chain in self.chains(blocks) for key in chain.hashes]


class SimWorld:
    """One node, its clients and its bad luck."""

    def __init__(self, seed: int, luck: Luck | None = None) -> None:
        """Make an empty node; nothing happens before `run`."""
        self.seed = seed
        self.now = 0.0
        self.trace: deque[str] = deque(maxlen=40)
        self.served = self.restarts = 0
        self._luck = luck or Luck()
        self._random = random.Random(seed)
        self._digest = hashlib.blake2b(digest_size=16)
        kind = seed % len(ADMISSIONS)
        self._bypass = kind in BYPASS and seed // len(ADMISSIONS) % 3 == 0
        self._admissions = dict(zip(DISK_SLOTS, ADMISSIONS[kind], strict=False))
        disks = {name: Disk.empty(DISK_SLOTS[name]) for name in self._admissions}
        self._ledger = Ledger([GARBAGE] * HOST_SLOTS, disks)
        self._mover = Mover(self._ledger, self._random, self._luck)
        self._sessions = [SessionId(number) for number in (1, 2, 3)]
        self._names = 0
        self._last_session = 3
        self._requests: list[_Request] = []
        self._zombies: dict[SlotId, SessionId] = {}
        self._flights: list[Flight] = []
        self._expires: dict[SequenceHash, float] = {}
        self._leases: dict[Holder, tuple[float, dict[SlotId, int]]] = {}
        self._trees = _trees(self._random)
        self._start_daemon()

    @property
    def digest(self) -> str:
        """A fingerprint of everything that happened so far."""
        return self._digest.hexdigest()

    @property
    def counters(self) -> Counters:
        """What the daemon that runs now has counted."""
        return self._manager.counters

    def run(self, steps: int = 150) -> None:
        """Live through `steps`, then let the faults stop and everything end."""
        for _ in range(steps):
            self.step()
        self.settle()

    def step(self) -> None:
        """Let one thing happen, and the daemon do its work."""
        chance = self._random.random
        self.now += self._random.expovariate(1.0)
        if chance() < 0.5 and len(self._requests) < 8:
            self._begin()
        for request in self._random.sample(self._requests, min(2, len(self._requests))):
            self._advance(request)
        self._misfortunes()
        self._work()
        self._check()

    def settle(self) -> None:
        """Without faults every request must finish, every pin drain, every slot be had again."""
        self._luck = self._mover.luck = Luck(*[0.0] * 8)
        for _ in range(SETTLE_STEPS_MAX):
            manager = self._manager
            if not (self._requests or manager.pending or manager.holds or manager.leases):
                break
            self.now += 1.0
            for request in list(self._requests):
                self._advance(request)
            self._work()
            self._check()
        assert not self._requests, f"never finished: {self._requests}"
        assert not self._manager.pending, "work that never ends"
        assert not self._manager.holds, "holds that never end"
        found = self._host.statistics()
        assert found.filling == found.staged == found.in_use == 0, found
        assert found.quarantined == len(self._zombies), found
        for session in sorted(set(self._zombies.values())):
            self._manager.session_dead(session)
        for pool in (self._host, *self._lower.values()):
            found = pool.statistics()
            assert found.free + found.idle == found.total, found
            reservation = pool.reserve(pool.slots_total)
            assert reservation is not None, "a slot that can never be had again"
            pool.abort(reservation.slots)

    # -- the daemon ----------------------------------------------------------------------------

    def _start_daemon(self) -> None:
        names = policy_names()
        name = names[self.seed % len(names)]
        self._host = self._make_pool(HOST, HOST_SLOTS, name)
        self._lower = {
            tier: self._make_pool(tier, DISK_SLOTS[tier], name) for tier in self._admissions
        }
        lower = [
            LowerTier(tier, self._lower[tier], admission)
            for tier, admission in self._admissions.items()
        ]
        self._manager = self._make_manager(lower, name)
        for tier, disk in self._ledger.disks.items():
            self._manager.recover(disk.recoverable(), disk.floor, tier)

    def _make_pool(self, tier: TierName, slots: int, policy: str) -> Pool:
        del tier
        return Pool(slots, make_policy(policy))

    def _make_manager(self, lower: list[LowerTier], policy: str) -> Manager:
        costs = Costs(64, 1 << 20, probe_interval_s=20.0) if self.seed % 4 == 0 else None
        bypass = self._bypass
        return Manager(self._host, lower, LIMITS, policy, costs=costs, bypass=bypass)

    def _crash(self) -> None:
        """End the daemon between any two writes of any job, and start another one."""
        self._note("crash")
        for flight in self._flights:
            self._mover.break_off(flight)
        self._flights.clear()
        self._requests.clear()
        self._zombies.clear()
        self._expires.clear()
        self._leases.clear()
        self._ledger.restarted()
        self.restarts += 1
        self._start_daemon()

    def _work(self) -> None:
        for transfer in self._manager.late(self.now):
            self._note(f"late {transfer}")
            for flight in self._flights:
                if flight.job.transfer == transfer and self._random.random() < 0.5:
                    flight.due = self.now + self._random.random()
        landed = [flight for flight in self._flights if flight.due <= self.now]
        self._flights = [flight for flight in self._flights if flight.due > self.now]
        for flight in sorted(landed, key=lambda each: each.due):
            done = self._mover.finish(flight)
            self._note(f"done {done.transfer} {done.ok}")
            self._ledger.ended(done.transfer)
            self._manager.complete(done)
        jobs = self._manager.step(self.now)
        self._ledger.decided(job.transfer for job in jobs)
        for job in jobs:
            self._note(f"start {type(job).__name__} {job.transfer}")
            delay = self._random.expovariate(2.0)
            if self._random.random() < self._luck.late:
                delay += self._random.uniform(5.0, 40.0)
            self._flights.append(self._mover.start(job, self.now + delay))

    def _check(self) -> None:
        self._ledger.check(self._host, self._lower)
        counters = self._manager.counters
        for name in counters.__slots__:
            assert getattr(counters, name) >= 0, f"{name} fell below zero"
        for until, marks in self._leases.values():
            for slot, mark in marks.items() if self.now < until else ():
                assert self._host.generations[slot] == mark, f"{slot=} was given out under a lease"
        filled = sum(len(request.fills) for request in self._requests) + len(self._zombies)
        found = self._host.statistics()
        assert filled <= found.filling + found.quarantined, "a writer lost its slot"

    # -- clients -------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._names += 1
        session = self._random.choice(self._sessions)
        tree = self._random.choice(self._trees)
        chain = tree[: self._random.randint(1, len(tree))]
        windows = self._random.choice(WINDOWS) if self.seed % 3 == 0 else WHOLE
        self._requests.append(_Request(Holder(session, f"r{self._names}"), chain, windows))

    def _advance(self, request: _Request) -> None:
        self._note(f"{request.holder.request} {request.does}")
        match request.does:
            case "lookup":
                self._lookup(request)
            case "acquire":
                self._acquire(request)
            case "read":
                self._end_reading(request)
            case "store":
                self._reserve(request)
            case _:
                self._fill(request)

    def _lookup(self, request: _Request) -> None:
        keys = request.keys(len(request.chain))
        speed = EngineSpeed(self._random.choice([50.0, 500.0, 5000.0]), 0.0)
        answer = self._manager.lookup(request.holder, keys, self.now, request.windows, speed)
        self._note(f"ready {answer.ready} pending {answer.pending}")
        if answer.pending:
            assert answer.until > self.now, "told to wait until a moment that has passed"
            return
        request.ready = answer.ready
        request.does = "acquire" if answer.ready else "store"
        if self._random.random() < self._luck.fail:
            self._requests.remove(request)  # never comes back: its hold has to expire

    def _acquire(self, request: _Request) -> None:
        answer = self._manager.acquire(
            request.holder, request.keys(request.ready), self.now, request.windows
        )
        wanted = [
            chain.hashes[place]
            for chain in request.chains(answer.blocks)
            for place in chain.needed(answer.blocks)
        ]
        assert len(wanted) == len(answer.slots), "a hit is what all groups need, and no more"
        for key, slot, generation in zip(wanted, answer.slots, answer.generations, strict=False):
            self._ledger.read(request.holder, key, slot, generation, self._host)
            assert self.now < self._expires.get(key, inf), f"{key!r} is served past its life"
        self.served += len(answer.slots)
        request.ready = answer.blocks
        request.does = "read"
        if answer.slots and self._random.random() < 0.15 and request.windows == WHOLE:
            self._lease(request.holder, wanted, answer.slots)

    def _lease(self, holder: Holder, keys: list[SequenceHash], slots: list[SlotId]) -> None:
        lessee = holder._replace(request=self._random.choice("ab"))
        seconds = self._random.choice([0.0, 3.0, 25.0])
        kept = self._manager.lease(lessee, keys, seconds, self.now)
        marks = {slot: self._host.generations[slot] for slot in slots[:kept]}
        self._leases[lessee] = self.now + seconds, marks
        assert self._manager.leased <= HOST_SLOTS // 2, "leases have more than their share"

    def _end_reading(self, request: _Request) -> None:
        self._ledger.stop_reading(request.holder)
        self._manager.release(request.holder)
        request.does = "store"

    def _reserve(self, request: _Request) -> None:
        for chain in request.chains(len(request.chain)):
            self._offer(request, chain.hashes)
        request.does = "fill"

    def _offer(self, request: _Request, chain: Sequence[SequenceHash]) -> None:
        first = request.ready
        parent = chain[first - 1] if first else None
        offered = chain[first:]
        hints = self._hints(len(offered))
        below = [any(key in pool for pool in self._lower.values()) for key in offered]
        answer = self._manager.reserve(request.holder, parent, offered, hints, self.now)
        for index in answer.indices:
            if not below[index]:
                self._expires.pop(offered[index], None)
        for hint in hints:
            end = self.now + hint.ttl_s if hint.ttl_s else inf
            self._expires |= dict.fromkeys(offered[hint.first : hint.first + hint.count], end)
        for index, slot in zip(answer.indices, answer.slots, strict=True):
            tick = self._ledger.next_tick()
            request.fills[slot] = Content(offered[index], tick)
            self._ledger.fill(slot, GARBAGE, tick)
        self._note(f"slots {answer.slots}")

    def _hints(self, blocks: int) -> list[BlockHint]:
        dice = self._random
        if self.seed % 2 or not blocks or dice.random() < 0.6:  # every other world asks nothing
            return []
        return [
            BlockHint(
                first := dice.randrange(blocks),
                dice.randint(1, blocks - first),
                dice.choice([0, 10, 35, 60, 100]),
                dice.choice([None, 3.0, 20.0]),
                dice.choice([None, None, 4.0, 30.0]),
            )
            for _ in range(dice.randint(1, 2))
        ]

    def _fill(self, request: _Request) -> None:
        count = self._random.randint(1, max(len(request.fills), 1))
        slots = list(request.fills)[:count]
        wanted = self._random.random() >= self._luck.fail
        for slot in slots:
            content = request.fills.pop(slot)
            self._ledger.fill(slot, content if wanted else GARBAGE, content.tick)
        if wanted:
            self._manager.seal(request.holder, slots)
        else:
            self._manager.abort(request.holder, slots)
        if not request.fills:
            self._manager.release(request.holder)
            self._requests.remove(request)

    # -- bad luck ------------------------------------------------------------------------------

    def _misfortunes(self) -> None:
        luck, chance = self._luck, self._random.random
        if chance() < luck.jump:
            self.now += self._random.choice([6.0, 40.0, 3600.0])
        for disk in self._ledger.disks.values():
            self._rot(disk)
        if chance() < luck.clear:
            self._clear()
        if chance() < luck.clear:
            self._forget()
        if chance() < luck.close:
            self._end_session(dead=False)
        if chance() < luck.death:
            self._end_session(dead=True)
        for slot in self._zombies:
            if chance() < 0.2:
                self._ledger.fill(slot, GARBAGE, self._ledger.next_tick())
        if chance() < luck.crash:
            self._crash()

    def _rot(self, disk: Disk) -> None:
        if self._random.random() < self._luck.rot:
            slot = self._random.randrange(len(disk.blocks))
            content = disk.blocks[slot]
            disk.blocks[slot] = content._replace(damage=content.damage + 1)

    def _clear(self) -> None:
        names = [HOST, *self._lower]
        tiers = self._random.choice([[name] for name in names] + [names, names])
        self._note(f"clear {len(tiers)} {tiers[0]}")
        self._manager.clear(tiers)
        if HOST in tiers:
            self._leases.clear()
        for name, disk in self._ledger.disks.items():
            if name in tiers:
                disk.floor = self._manager.written(name)
        self._ledger.cleared(tiers)

    def _forget(self) -> None:
        tree = self._random.choice(self._trees)
        place = self._random.randrange(len(tree))
        self._note(f"forget {tree[place]!r}")
        self._manager.forget(tree[place])
        behind = {key for each in self._trees if tree[place] in each for key in each}
        self._ledger.forgotten(behind - set(tree[:place]))

    def _end_session(self, *, dead: bool) -> None:
        session = self._random.choice(self._sessions)
        self._note(f"session {session} {dead}")
        for request in [each for each in self._requests if each.holder.session == session]:
            self._requests.remove(request)
            self._ledger.stop_reading(request.holder)
            self._zombies |= dict.fromkeys(request.fills, session)
        if dead:
            self._bury(session)
            return
        self._manager.session_closed(session)
        self._sessions.remove(session)
        self._last_session += 1
        self._sessions.append(SessionId(self._last_session))
        closed = sorted(set(self._zombies.values()) - set(self._sessions))
        if len(closed) > 1:
            self._bury(closed[0])

    def _bury(self, session: SessionId) -> None:
        self._manager.session_dead(session)
        self._zombies = {slot: at for slot, at in self._zombies.items() if at != session}

    def _note(self, event: str) -> None:
        line = f"{self.now:.6f} {event}"
        self.trace.append(line)
        self._digest.update(line.encode())


def _in_group(key: SequenceHash, group: int) -> SequenceHash:
    return SequenceHash(key[:-1] + bytes([group])) if group else key


def _trees(luck: random.Random) -> list[list[SequenceHash]]:
    """Return conversations: chains that share beginnings."""
    chains: list[list[SequenceHash]] = []
    for number in range(8):
        trunk = luck.choice(chains)[: luck.randint(0, 3)] if chains and luck.random() < 0.7 else []
        grown = [bytes([number, place]).ljust(16, b"\0") for place in range(luck.randint(1, 4))]
        chains.append(trunk + [SequenceHash(key) for key in grown])
    return chains


def main(arguments: Sequence[str] | None = None) -> int:
    """Run many seeds; 1 and how to replay it if one of them fails."""
    parser = argparse.ArgumentParser(prog="simworld", description="simulate whole nodes")
    parser.add_argument("--seeds", type=int, default=200, help="how many worlds")
    parser.add_argument("--first", type=int, default=1, help="seed of the first")
    parser.add_argument("--steps", type=int, default=150, help="steps before faults stop")
    options = parser.parse_args(arguments)
    served = restarts = 0
    for done, seed in enumerate(range(options.first, options.first + options.seeds), 1):
        world = SimWorld(seed)
        try:
            world.run(options.steps)
        except Exception:  # noqa: BLE001  # whatever it is: say which seed and go on to fail
            sys.stderr.write("\n".join(world.trace) + "\n")
            sys.stderr.write(f"seed {seed} failed; again: make sim SEEDS=1 FIRST={seed}\n\n")
            traceback.print_exc()
            return 1
        served, restarts = served + world.served, restarts + world.restarts
        if done % 100 == 0 or done == options.seeds:
            sys.stdout.write(
                f"{done}/{options.seeds} worlds hold; {served} blocks served, {restarts} restarts\n"
            )
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
