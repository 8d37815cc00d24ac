"""`Manager` against a model of bytes: what each slot really holds, whoever wrote it, and when.

Engines write between reserve and seal; jobs move bytes at the moment they complete, in any order,
with failures, damage and lateness. Laws are checked on the bytes, not on what the manager thinks.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
)

from kvstrata.core.config import Limits
from kvstrata.core.ids import Holder, SequenceHash, SessionId, SlotId
from kvstrata.core.tier import DISK, HOST, TierName
from kvstrata.manager import LowerTier, Manager
from kvstrata.policy import LruPolicy
from kvstrata.pool import Pin, Pool
from kvstrata.testing.plants import (
    assert_machine_fails,
    free_a_late_read_at_once,
    free_slots_of_closed_sessions,
    keep_stale_writes,
    register_stale_seals,
    trust_what_was_read,
)
from kvstrata.transfer.base import EraseJob, Job, JobDone, ReadJob, SealJob, WriteJob

HOST_SLOTS, DISK_SLOTS = 6, 8
LIMITS = Limits(
    staging_timeout_s=5.0,
    hold_timeout_s=30.0,
    job_blocks_max=2,
    offload_blocks_in_flight_max=4,
    offload_backlog_blocks_max=6,
)
PARENTS = {1: None, 2: 1, 3: 2, 4: 3, 5: 2, 6: None, 7: 6, 8: 7, 9: 6}
GARBAGE = (b"garbage", 0)


def key(number: int) -> SequenceHash:
    return SequenceHash(number.to_bytes(16, "big"))


def path_to(number: int) -> list[SequenceHash]:
    parent = PARENTS[number]
    return [*(path_to(parent) if parent else []), key(number)]


CHAINS = st.sampled_from([path_to(number) for number in PARENTS])
HOLDERS = st.sampled_from(
    [Holder(SessionId(session), name) for session in (1, 2) for name in ("a", "b")]
)
SESSIONS = st.sampled_from([SessionId(1), SessionId(2)])
ENDS = st.sampled_from(["good", "good", "good", "failed", "damaged"])

# What a slot really holds: the key its bytes belong to, and when they were computed.
Content = tuple[bytes, int]


def seal_of(name: SequenceHash, content: Content) -> bytes:
    """Return the seal of `content` under `name`: like the real one it binds key and bytes."""
    good = content[0] == name
    return b"seal" + name if good else b"evil" + name


class ManagerMachine(RuleBasedStateMachine):
    """Random engines and a model executor around a real manager."""

    with_disk = True

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.host = self.make_host()
        self.disk = Pool(DISK_SLOTS, LruPolicy()) if self.with_disk else None
        self.manager = Manager(self.host, [LowerTier(DISK, self.disk)] if self.disk else [], LIMITS)
        self.host_bytes: dict[int, Content] = {}
        self.disk_bytes: dict[int, Content] = {}
        self.jobs: dict[int, Job] = {}
        self.ended: set[int] = set()
        self.filling: dict[Holder, dict[int, Content]] = {}
        self.zombies: dict[int, SessionId] = {}  # slots that a closed session may still write to
        self.acquired: dict[Holder, dict[int, tuple[SequenceHash, int, Content]]] = {}
        self.tick = 0  # orders what matters to a clear
        self.births: dict[int, int] = {}  # transfer -> tick of its decision
        self.host_since: dict[int, int] = {}  # slot -> tick of the decision to fill it
        self.disk_since: dict[int, int] = {}
        self.cleared = {HOST: 0, DISK: 0}
        self.cleared_all = 0

    def make_host(self) -> Pool:
        return Pool(HOST_SLOTS, LruPolicy())

    # -- engines -------------------------------------------------------------------------------

    def note_births(self) -> None:
        self.tick += 1
        for job in self.manager._state.outbox:
            self.births.setdefault(job.transfer, self.tick)

    @rule(holder=HOLDERS, chain=CHAINS)
    def lookup(self, holder: Holder, chain: list[SequenceHash]) -> None:
        answer = self.manager.lookup(holder, chain, self.now)
        self.note_births()
        if answer.pending:
            self.step()
        assert 0 <= answer.ready <= len(chain)
        assert 0 <= sum(answer.staged.values()) <= answer.ready
        assert answer.ready + answer.pending <= len(chain)
        assert bool(answer.why) == (answer.ready < len(chain))
        if answer.pending:
            assert answer.until > self.now, "told to wait until a moment that has passed"
        for name in chain[: answer.ready]:
            slot = self.host.match([name])[0]
            assert self.host._pins[slot], "ready, and not held"

    @rule(holder=HOLDERS, chain=CHAINS)
    def acquire(self, holder: Holder, chain: list[SequenceHash]) -> None:
        answer = self.manager.acquire(holder, chain, self.now)
        held = self.acquired.setdefault(holder, {})
        for name, slot, generation in zip(chain, answer.slots, answer.generations, strict=False):
            content = self.host_bytes.get(slot, GARBAGE)
            assert content[0] == name, f"{slot=} serves the bytes of {content}"
            assert content[1] > self.cleared_all, "a cleared block was served"
            assert self.host.generations[slot] == generation
            held[slot] = (name, generation, content)

    @rule(holder=HOLDERS)
    def release(self, holder: Holder) -> None:
        self.manager.release(holder)
        self.manager.release(holder)
        self.acquired.pop(holder, None)

    @rule(holder=HOLDERS, chain=CHAINS, skip=st.integers(0, 2))
    def reserve(self, holder: Holder, chain: list[SequenceHash], skip: int) -> None:
        skip = min(skip, len(chain) - 1)
        parent = chain[skip - 1] if skip else None
        offered = chain[skip:]
        answer = self.manager.reserve(holder, parent, offered)
        assert answer.indices == sorted(set(answer.indices))
        assert len(answer.indices) == len(answer.slots)
        mine = self.filling.setdefault(holder, {})
        busy = {slot for fills in self.filling.values() for slot in fills} | set(self.zombies)
        for index, slot in zip(answer.indices, answer.slots, strict=True):
            assert slot not in busy, "given out twice"
            busy.add(slot)
            self.tick += 1
            mine[slot] = (offered[index], self.tick)
            self.host_since[slot] = self.tick
            self.host_bytes[slot] = GARBAGE  # the engine has begun to write
        self.no_acquired_slot_changed()

    @rule(holder=HOLDERS, chain=CHAINS)
    def store(self, holder: Holder, chain: list[SequenceHash]) -> None:
        self.reserve(holder, chain, 0)
        self.seal(holder, HOST_SLOTS)

    @rule(holder=HOLDERS, count=st.integers(1, 4))
    def seal(self, holder: Holder, count: int) -> None:
        mine = self.filling.get(holder, {})
        slots = list(mine)[:count]
        for slot in slots:
            self.host_bytes[slot] = mine.pop(slot)
        self.manager.seal(holder, [SlotId(slot) for slot in slots])

    @rule(holder=HOLDERS, count=st.integers(1, 4))
    def abort(self, holder: Holder, count: int) -> None:
        mine = self.filling.get(holder, {})
        slots = list(mine)[:count]
        for slot in slots:
            del mine[slot]
        self.manager.abort(holder, [SlotId(slot) for slot in slots])

    def seal_what_is_not_mine(self, holder: Holder, slot: int) -> None:
        if slot in self.filling.get(holder, {}):
            return
        before = self.host.statistics(), replace(self.manager.counters), self.manager.pending
        with pytest.raises(ValueError, match="slot"):
            self.manager.seal(holder, [SlotId(slot)])
        with pytest.raises(ValueError, match="slot"):
            self.manager.abort(holder, [SlotId(slot)])
        after = self.host.statistics(), replace(self.manager.counters), self.manager.pending
        assert after == before

    def session_closed(self, session: SessionId) -> None:
        self.manager.session_closed(session)
        for slot in self.forget_session(session):
            self.zombies[slot] = session

    def session_dead(self, session: SessionId) -> None:
        self.manager.session_dead(session)
        self.forget_session(session)
        self.zombies = {slot: at for slot, at in self.zombies.items() if at != session}

    def forget_session(self, session: SessionId) -> list[int]:
        slots: list[int] = []
        for holder in [each for each in self.filling if each.session == session]:
            slots += self.filling.pop(holder)
        for holder in [each for each in self.acquired if each.session == session]:
            del self.acquired[holder]
        return slots

    def zombies_write(self) -> None:
        for slot in self.zombies:
            self.host_bytes[slot] = GARBAGE
        self.no_acquired_slot_changed()

    @rule(holder=HOLDERS, kind=st.sampled_from(["owner", "closed", "dead", "dead", "zombies"]))
    def disturb(self, holder: Holder, kind: str) -> None:
        """What is rare, as one rule, so that the machine mostly does what is common."""
        match kind:
            case "owner":
                for slot in range(-1, HOST_SLOTS + 1):
                    self.seal_what_is_not_mine(holder, slot)
            case "closed":
                self.session_closed(holder.session)
            case "dead":
                self.session_dead(holder.session)
            case _:
                self.zombies_write()

    @rule(tiers=st.sampled_from([(HOST,), (HOST,), (DISK,), (HOST, DISK)]))
    def clear(self, tiers: tuple[TierName, ...]) -> None:
        self.forget(tiers)

    @rule(holder=HOLDERS, chain=CHAINS, tiers=st.sampled_from([(DISK,), (HOST, DISK)]))
    def clear_while_writing(
        self, holder: Holder, chain: list[SequenceHash], tiers: tuple[TierName, ...]
    ) -> None:
        self.store(holder, chain)
        self.step()
        for job in self.unfinished(SealJob):
            self.end(self.jobs.pop(job.transfer), "good")
        self.step()
        self.forget(tiers)

    def forget(self, tiers: tuple[TierName, ...]) -> None:
        self.manager.clear(tiers)
        self.tick += 1
        self.cleared |= dict.fromkeys(tiers, self.tick)
        if HOST in tiers and (DISK in tiers or not self.disk):
            self.cleared_all = self.tick
        if HOST in tiers:
            assert self.host.resident() == []
        if DISK in tiers and self.disk:
            assert self.disk.resident() == []

    # -- time and jobs -------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0, 6.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.late()

    @rule(reader=HOLDERS, writer=HOLDERS, wanted=CHAINS, chain=CHAINS)
    def lose_patience(
        self,
        reader: Holder,
        writer: Holder,
        wanted: list[SequenceHash],
        chain: list[SequenceHash],
    ) -> None:
        """A read is given up; somebody needs slots before it has ended."""
        self.leave_on_disk(writer, wanted)
        self.lookup(reader, wanted)
        self.time_passes(6.0)
        self.store(writer, chain)

    @rule(how=ENDS)
    def settle(self, how: str) -> None:
        """Let everything end, the youngest job first."""
        for _ in range(6):
            self.step()
            for transfer in sorted(self.jobs, reverse=True):
                self.end(self.jobs.pop(transfer), how)

    def step(self) -> None:
        jobs = self.manager.step(self.now)
        self.tick += 1
        for job in jobs:
            self.births.setdefault(job.transfer, self.tick)
            assert job.transfer not in self.ended, "a transfer id was used again"
            assert job.transfer not in self.jobs, "a transfer id was used again"
            self.jobs[job.transfer] = job

    def late(self) -> None:
        for transfer in self.manager.late(self.now):
            assert transfer not in self.ended

    @rule(holder=HOLDERS, chain=CHAINS, how=ENDS)
    def read_back(self, holder: Holder, chain: list[SequenceHash], how: str) -> None:
        """Ask for what the host has just forgotten and the disk still has."""
        self.leave_on_disk(holder, chain)
        self.lookup(holder, chain)
        self.settle(how)

    def leave_on_disk(self, holder: Holder, chain: list[SequenceHash]) -> None:
        self.store(holder, chain)
        self.settle("good")
        self.forget((HOST,))

    @rule(pick=st.integers(0, 9), how=ENDS)
    def complete(self, pick: int, how: str) -> None:
        self.step()
        if not self.jobs:
            return
        transfer = sorted(self.jobs)[pick % len(self.jobs)]
        self.end(self.jobs.pop(transfer), how)

    def end(self, job: Job, how: str) -> None:
        self.ended.add(job.transfer)
        done = self.perform(job, how)
        self.no_acquired_slot_changed()
        self.manager.complete(done)

    def perform(self, job: Job, how: str) -> JobDone:
        """Move the job's bytes; of a failed or damaged job it is the last block that suffers."""
        if isinstance(job, EraseJob):
            return JobDone(job.transfer, (True,) * len(job.targets))
        last = len(job.slots) - 1
        ok = tuple(how != "failed" or index != last for index in range(len(job.slots)))
        if isinstance(job, ReadJob):
            for index, (source, slot) in enumerate(zip(job.sources, job.slots, strict=True)):
                content = self.disk_bytes.get(source, GARBAGE)
                damaged = index == last and how != "good"
                self.host_bytes[slot] = GARBAGE if damaged else content
                self.host_since[slot] = self.births[job.transfer]
        seals = tuple(
            seal_of(name, self.host_bytes.get(slot, GARBAGE))
            for name, slot in zip(job.keys, job.slots, strict=True)
        )
        if isinstance(job, WriteJob):
            ok = tuple(
                fine and seal == expected
                for fine, seal, expected in zip(ok, seals, job.checksums, strict=True)
            )
            for index, (slot, target) in enumerate(zip(job.slots, job.targets, strict=True)):
                damaged = index == last and how != "good"
                self.disk_bytes[target] = GARBAGE if damaged else self.host_bytes[slot]
                self.disk_since[target] = self.births[job.transfer]
        return JobDone(job.transfer, ok, seals)

    # -- laws ----------------------------------------------------------------------------------

    @invariant()
    def pools_agree_with_themselves(self) -> None:
        self.host.check()
        if self.disk:
            self.disk.check()

    @invariant()
    def no_acquired_slot_changed(self) -> None:
        for held in self.acquired.values():
            for slot, (name, generation, content) in held.items():
                assert self.host.generations[slot] == generation, f"{slot=} was given out: {name!r}"
                assert self.host_bytes[slot] == content, f"{slot=} changed while acquired"

    @invariant()
    def what_is_findable_is_what_it_says(self) -> None:
        for name in self.host.resident():
            slot = self.host.match([name])[0]
            content = self.host_bytes.get(slot, GARBAGE)
            assert content[0] == name, f"{slot=} holds {content}"
            assert content[1] > self.cleared_all, "stored before a clear, found after it"
            assert self.host_since[slot] > self.cleared[HOST]
        for name in self.disk.resident() if self.disk else []:
            slot = self.disk.match([name])[0]
            assert self.disk_since[slot] > self.cleared[DISK]

    @invariant()
    def counters_never_fall_below_zero(self) -> None:
        counters = self.manager.counters
        assert all(getattr(counters, name) >= 0 for name in counters.__slots__)
        assert self.manager.pending >= 0

    @invariant()
    def slots_of_writers_are_kept_for_them(self) -> None:
        found = self.host.statistics()
        filled = sum(map(len, self.filling.values()))
        reading = sum(len(job.slots) for job in self.unfinished(ReadJob))
        assert found.filling <= filled + reading
        assert found.filling + found.quarantined >= filled + len(self.zombies)

    def unfinished(self, kind: type) -> list[Job]:
        waiting = [*self.jobs.values(), *self.manager._state.outbox]
        return [job for job in waiting if isinstance(job, kind)]

    def teardown(self) -> None:
        """Faults stop, every reader lets go: what is left belongs to living writers."""
        for holder in list(self.acquired):
            self.release(holder)
        self.now += LIMITS.hold_timeout_s + 1
        for _ in range(200):
            self.late()
            self.step()
            if not self.manager.pending:
                break
            for transfer in sorted(self.jobs):
                self.end(self.jobs.pop(transfer), "good")
            self.pools_agree_with_themselves()
            self.what_is_findable_is_what_it_says()
        assert self.manager.pending == 0, "work that never ends"
        assert self.manager.holds == 0
        found = self.host.statistics()
        assert found.in_use == found.staged == 0
        assert found.filling == sum(map(len, self.filling.values()))
        assert found.quarantined == len(self.zombies)
        if self.disk:
            found = self.disk.statistics()
            assert found.in_use == found.staged == found.filling == found.quarantined == 0


class HostOnlyMachine(ManagerMachine):
    """A node without a disk never gives out a job that needs one."""

    with_disk = False

    @invariant()
    def only_seals_are_asked_for(self) -> None:
        assert all(isinstance(job, SealJob) for job in self.jobs.values())


TestManager = ManagerMachine.TestCase
TestManager.settings = settings(stateful_step_count=60)
TestManagerWithoutDisk = HostOnlyMachine.TestCase
TestManagerWithoutDisk.settings = settings(stateful_step_count=40)


# -- planted bugs ------------------------------------------------------------------------------


class PolicyNotToldOfAPin(Pool):
    def pin(self, slots, *, used=True):
        del used
        for slot in slots:
            self._pins[slot] += 1
        return Pin(slots, self._unpin)

    def _unpin(self, slots):
        for slot in slots:
            self._pins[slot] -= 1


def test_a_planted_bug_a_policy_told_nothing_of_pins_is_found() -> None:
    class Planted(ManagerMachine):
        def make_host(self) -> Pool:
            return PolicyNotToldOfAPin(HOST_SLOTS, LruPolicy())

        def pools_agree_with_themselves(self) -> None:
            """Let the bytes tell, not the pool's own validator."""

    assert_machine_fails(Planted, steps=60)


@pytest.mark.parametrize(
    "plant",
    [
        trust_what_was_read,
        register_stale_seals,
        keep_stale_writes,
        free_a_late_read_at_once,
        free_slots_of_closed_sessions,
    ],
)
def test_a_bug_planted_in_the_manager_is_found(plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)

    class Planted(ManagerMachine):
        pass

    assert_machine_fails(Planted, steps=60)
