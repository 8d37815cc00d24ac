"""Tenants in the brain: who is charged in each tier, after a restart, and what a clear takes."""

from __future__ import annotations

import pytest

from kvstrata.core.config import Limits, parse_tenants
from kvstrata.core.errors import ConfigError
from kvstrata.core.ids import Holder, SequenceHash, SessionId
from kvstrata.core.tenants import NO_TAG, TAG_BYTES, tenant_tag
from kvstrata.core.tier import DISK
from kvstrata.manager import LowerTier, Manager
from kvstrata.manager.mismatch import Families
from kvstrata.manager.tenants import Tenants
from kvstrata.pool import Pool
from kvstrata.storage.base import NOBODY, StoredBlock
from kvstrata.tokens import Namespace
from kvstrata.tokens.family import Family
from kvstrata.transfer.base import EraseJob, JobDone, ReadJob, SealJob, WriteJob

SPACE, OTHER = b"model-01", b"model-02"


def key(number: int) -> SequenceHash:
    return SequenceHash(number.to_bytes(16, "big"))


def keys(*numbers: int) -> list[SequenceHash]:
    return [key(number) for number in numbers]


class Node:
    """Two tiers of `slots`, and an index that remembers who is charged."""

    def __init__(self, *guarantees: str, slots: int = 10, disk_slots: int = 20) -> None:
        self.tenants = Tenants(parse_tenants(guarantees))
        self.host = Pool(slots, self.tenants.policy_for("lru", "host", 1000, slots))
        self.disk = Pool(disk_slots, self.tenants.policy_for("lru", "disk", 1000, disk_slots))
        limits = Limits(job_blocks_max=4)
        self.manager = Manager(self.host, [LowerTier(DISK, self.disk)], limits, "lru", self.tenants)
        self.lines: dict[int, StoredBlock] = {}
        self.turn = 0

    def holder(self) -> Holder:
        self.turn += 1
        return Holder(SessionId(1), str(self.turn))

    def complete(self, jobs) -> None:
        for job in jobs:
            count = len(job.targets if isinstance(job, EraseJob) else job.slots)
            if isinstance(job, WriteJob):
                rows = zip(job.targets, job.keys, job.parents, job.owners, strict=True)
                for place, (slot, name, parent, owner) in enumerate(rows):
                    written = job.written + count - 1 - place
                    self.lines[slot] = StoredBlock(slot, name, parent, b"", written, owner)
            elif isinstance(job, EraseJob):
                for slot in job.targets:
                    self.lines.pop(slot, None)
            self.manager.complete(JobDone(job.transfer, (True,) * count, (b"",) * count))

    def work(self, until: type | None = None):
        while jobs := self.manager.step(0.0):
            if until and any(isinstance(job, until) for job in jobs):
                return jobs
            self.complete(jobs)
        self.host.check()
        self.disk.check()
        return []

    def reserve(self, tenant: str, *numbers: int, parent: int | None = None, space: bytes = SPACE):
        holder = self.holder()
        above = None if parent is None else key(parent)
        owner = self.tenants.owner(space, tenant)
        return holder, self.manager.reserve(holder, above, keys(*numbers), (), 0.0, owner)

    def store(self, tenant: str, *numbers: int, parent: int | None = None, space: bytes = SPACE):
        holder, room = self.reserve(tenant, *numbers, parent=parent, space=space)
        self.manager.seal(holder, room.slots)
        self.work()
        return room

    def lookup(self, *numbers: int):
        holder = self.holder()
        while (found := self.manager.lookup(holder, keys(*numbers), 0.0)).pending:
            self.work()
        self.manager.release(holder)
        return found

    def held(self) -> dict[str, dict[str, int]]:
        found = self.tenants.statistics()["tenants"]
        return {each["tenant"]: each["slots"] for each in found if each["slots"]}

    def kept(self) -> tuple[set[int], set[int]]:
        return tuple(
            {int.from_bytes(each, "big") for each in pool.resident()}
            for pool in (self.host, self.disk)
        )  # type: ignore[return-value]


def test_blocks_are_charged_in_both_tiers_and_once() -> None:
    node = Node()
    node.store("a", 1, 2, 3)
    node.store("b", 1, 2, 4)
    assert node.held() == {"a": {"host": 3, "disk": 3}, "b": {"host": 1, "disk": 1}}
    spaces = node.tenants.statistics()["namespaces"]
    assert spaces == [{"tag": SPACE.hex(), "model": "", "slots": {"host": 4, "disk": 4}}]


def test_what_is_staged_is_charged_to_its_owner_on_disk() -> None:
    node = Node("a=30%", slots=6)
    node.store("a", 1, 2)
    node.store("b", 11, parent=None)
    node.store("b", 21, 22, 23, 24, 25, 26)
    node.host.withdraw(keys(1, 2, 11))
    assert node.lookup(1, 2).ready == 2
    assert node.lookup(11).ready == 1
    assert {node.host.owner_of(slot) for slot in node.host.match(keys(1, 2))} == {
        node.tenants.owner(SPACE, "a")
    }
    assert node.host.owner_of(node.host.match(keys(11))[0]) == node.tenants.owner(SPACE, "b")
    node.work()


def test_a_chain_of_two_owners_is_staged_whole() -> None:
    node = Node(slots=8)
    node.store("a", 1, 2)
    node.store("b", 1, 2, 3)
    node.store("a", 1, 2, 3, 4)
    node.host.withdraw(keys(1, 2, 3, 4))
    assert node.lookup(1, 2, 3, 4).ready == 4
    assert node.held()["a"]["host"] == 3
    assert node.held()["b"]["host"] == 1


def test_a_guarantee_holds_in_the_host_and_is_counted_when_it_refuses() -> None:
    node = Node("a=60%", "b=host:40%")
    node.store("a", *range(1, 7))
    node.store("b", *range(11, 15))
    room = node.store("c", 21, 22)
    assert (room.slots, room.throttled) == ([], 2)
    counters = node.manager.counters
    assert (counters.throttled_quota_blocks, counters.throttled_reserve_blocks) == (2, 0)
    found = node.lookup(21)
    assert found.why == "not stored, quota in host, 0.0 s ago"
    with node.host.pin(node.host.match(keys(*range(1, 7)))):
        node.store("a", 31)
    assert counters.throttled_quota_blocks == 3
    assert node.store("a", 31).throttled == 0  # its own block makes room for it


def test_refused_because_all_is_held_is_not_refused_by_quota() -> None:
    node = Node("a=50%")
    node.store("c", *range(1, 11))
    with node.host.pin(node.host.match(keys(*range(1, 11)))):
        assert node.reserve("a", 21)[1].throttled == 1
    assert node.manager.counters.throttled_reserve_blocks == 1
    assert node.manager.counters.throttled_quota_blocks == 0


def test_a_guarantee_holds_on_disk_and_the_host_keeps_what_it_refuses() -> None:
    node = Node("a=100%", disk_slots=4)
    node.store("a", 1, 2, 3, 4)
    node.store("b", 11, 12)
    assert node.kept() == ({1, 2, 3, 4, 11, 12}, {1, 2, 3, 4})
    assert node.manager.counters.throttled_quota_blocks == 2
    assert node.manager.counters.throttled_write_blocks == 0


def test_a_restart_counts_blocks_for_their_tenants_again() -> None:
    first = Node()
    first.store("a", 1, 2)
    first.store("a", 7, space=OTHER)
    first.store("b", 11)
    old = StoredBlock(max(first.lines) + 1, key(90), None, b"", 99)
    node = Node("a=50%", disk_slots=6)
    found = sorted([*first.lines.values(), old], key=lambda block: block.written)
    node.manager.recover(found)
    assert old.owner == NOBODY
    assert node.held() == {
        "a": {"disk": 3},
        tenant_tag("b").hex(): {"disk": 1},
        "(unknown)": {"disk": 1},
    }
    node.store("c", 31, 32, 33, 34)
    assert node.held()["a"]["disk"] == 3  # its guarantee holds without its having come back
    assert node.manager.clear_owned(node.tenants.matching("", "a")) == 3
    node.work()
    assert not any(line.owner[TAG_BYTES:] == tenant_tag("a") for line in node.lines.values())


def test_clearing_a_tenant_takes_its_blocks_and_no_others() -> None:
    node = Node()
    node.store("a", 1, 2)
    node.store("b", 1, 2, 3)
    node.store("a", 8, space=OTHER)
    assert node.manager.clear_owned(node.tenants.matching("", "a")) == 6
    assert node.kept() == ({3}, {3})
    assert node.lookup(1).why == "cleared in disk, 0.0 s ago"
    node.work()
    assert {line.key for line in node.lines.values()} == {key(3)}
    node.store("b", 1, 2)
    assert node.lookup(1, 2, 3).ready == 3  # what hung on the cleared blocks is found again


@pytest.mark.parametrize("stage", [None, SealJob, WriteJob])
def test_clearing_takes_what_is_on_its_way(stage) -> None:
    node = Node()
    holder, room = node.reserve("a", 1, 2)
    _, kept = node.reserve("b", 11)
    if stage:
        node.manager.seal(holder, room.slots)
        jobs = node.work(until=stage)
        assert jobs
    assert node.manager.clear_owned(node.tenants.matching("", "a")) == (
        2 if stage is WriteJob else 0
    )
    if stage:
        node.complete(jobs)
    else:
        node.manager.seal(holder, room.slots)
    node.work()
    assert node.kept() == (set(), set())
    assert not node.lines
    assert node.held() == {"b": {"host": len(kept.slots)}}


def test_clearing_takes_what_is_being_read() -> None:
    node = Node()
    node.store("a", 1, 2)
    node.host.withdraw(keys(1, 2))
    holder = node.holder()
    assert node.manager.lookup(holder, keys(1, 2), 0.0).pending
    jobs = node.work(until=ReadJob)
    assert node.manager.clear_owned(node.tenants.matching("", "a")) == 2
    node.complete(jobs)
    node.work()
    assert node.manager.lookup(holder, keys(1, 2), 0.0).ready == 0
    node.manager.release(holder)
    assert node.kept() == (set(), set())
    assert node.held() == {}


def test_clearing_a_namespace_by_name_and_by_tag() -> None:
    node = Node()
    for tag, model in ((SPACE, "llama"), (OTHER, "qwen")):
        node.tenants.meet_namespace(tag, Namespace(model, "", "", "", "", 64))
    node.store("a", 1)
    node.store("b", 2)
    node.store("a", 3, space=OTHER)
    assert len(node.tenants.matching("llama", "a")) == 1
    assert node.manager.clear_owned(node.tenants.matching("llama", None)) == 4
    assert node.manager.clear_owned(node.tenants.matching(OTHER.hex(), "a")) == 2
    assert node.kept() == (set(), set())


@pytest.mark.parametrize(
    ("namespace", "tenant", "hint"),
    [("", "z", "'' (the default), a, b"), ("gpt", None, "llama (6d6f64656c2d3031)")],
)
def test_an_unknown_name_is_refused_with_those_that_are_known(namespace, tenant, hint) -> None:
    node = Node()
    node.tenants.meet_namespace(SPACE, Namespace("llama", "", "", "", "", 64))
    for number, name in enumerate(["b", "a", ""]):
        node.store(name, number)
    with pytest.raises(ConfigError, match="is kept") as caught:
        node.tenants.matching(namespace, tenant)
    assert caught.value.hint == f"known here: {hint}"


def test_owners_that_hold_nothing_make_room_for_new_ones() -> None:
    tenants = Tenants(parse_tenants(["vip=50%"]), owners_max=5)
    host = Pool(8, tenants.policy_for("lru", "host", 100, 8))
    manager = Manager(host, [], Limits(), None, tenants)
    numbers = {}
    for number, name in enumerate(["a", "b", "c", "d", "vip"]):
        numbers[name] = tenants.owner(SPACE, name)
        holder = Holder(SessionId(1), name)
        manager.reserve(holder, None, [key(number)], (), 0.0, numbers[name])
    assert numbers == {"a": 2, "b": 3, "c": 4, "d": 0, "vip": 1}  # the last ones found no number
    assert tenants.accounts[numbers["vip"]] == 1  # and a guarantee counts all the same
    assert tenants.tag_of(1) == NO_TAG + tenant_tag("vip")
    manager.abort(Holder(SessionId(1), "b"), host_slots(host, numbers["b"]))
    for _ in range(1024):
        found = tenants.owner(OTHER, "e")
    assert found == numbers["b"]
    assert tenants.tag_of(found) == OTHER + tenant_tag("e")


def host_slots(host: Pool, owner: int) -> list:
    return [
        slot
        for slot in range(host.slots_total)
        if host._state[slot] and host.owner_of(slot) == owner
    ]


class TestFamilies:
    def test_another_namespace_is_told_and_another_salt_only_if_allowed(self) -> None:
        families = Families()
        families.note(Family(b"p", b"s1"), b"n1")
        find = families.find
        assert find(Family(b"p", b"s1"), b"n2", across_salts=False) == (b"n1", b"s1")
        assert find(Family(b"p", b"s1"), b"n1", across_salts=True) is None
        assert find(Family(b"p", b"s2"), b"n1", across_salts=False) is None
        assert find(Family(b"p", b"s2"), b"n2", across_salts=False) is None
        assert find(Family(b"p", b"s2"), b"n1", across_salts=True) == (b"n1", b"s1")
        assert find(Family(b"q", b"s1"), b"n2", across_salts=True) is None

    def test_memory_is_bounded_and_the_oldest_goes(self) -> None:
        families = Families(limit=3)
        for number in range(5):
            families.note(Family(bytes([number]), b"s"), b"n")
            families.note(Family(b"\0", b"s%d" % number), b"n")
        assert len(families) == 3
        assert families.find(Family(b"\0", b"s0"), b"m", across_salts=False) is None
        assert families.find(Family(b"\0", b"s1"), b"m", across_salts=False) == (b"n", b"s1")
        assert families.find(Family(b"\1", b"s"), b"m", across_salts=False) is None
        assert families.find(Family(b"\4", b"s"), b"m", across_salts=False) == (b"n", b"s")
