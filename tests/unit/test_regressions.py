"""Bugs that were found once; each test failed before its mend."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import zmq

from kvstrata.core.config import Limits, NodeConfig, TierConfig, parse_bytes, parse_tiers
from kvstrata.core.errors import ConfigError, KvstrataError
from kvstrata.core.ids import Holder, SequenceHash, SessionId
from kvstrata.core.tier import DISK, HOST, TierKind
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.manager import LowerTier, Manager
from kvstrata.policy import LruPolicy
from kvstrata.pool import Pool
from kvstrata.runtime import messages as wire
from kvstrata.runtime.node import Node
from kvstrata.runtime.process import start_ticks
from kvstrata.runtime.server import NodeServer
from kvstrata.storage.slab import SLAB_NAME, Slab
from kvstrata.tokens import Namespace
from kvstrata.transfer.base import JobDone, SealJob, WriteJob

LAYOUT = BlockLayout((Dimension("axis0", 8),), "float32", 4, writer="array")
NAMESPACE = Namespace("m", "", "", "float32", LAYOUT.geometry, 4)
BOTH = {HOST, DISK}


def key(number: int) -> SequenceHash:
    return SequenceHash(number.to_bytes(16, "big"))


def holder(name: str = "r") -> Holder:
    return Holder(SessionId(1), name)


def register(pool: Pool, hashes, parents) -> list:
    slots = pool.reserve(len(hashes)).slots
    pool.stage(slots)
    pool.register(slots, hashes, parents)
    return slots


# -- 01, 02: pool ------------------------------------------------------------------------------


def test_a_chain_that_grew_block_by_block_can_be_evicted_whole():
    pool = Pool(4, LruPolicy())
    for number in range(1, 5):
        register(pool, [key(number)], [key(number - 1) if number > 1 else None])
    found = pool.reserve(4)
    assert found is not None
    assert sorted(found.evicted) == [key(number) for number in range(1, 5)]
    pool.check()


def test_a_part_of_a_chain_whose_parents_are_colder_is_evicted_from_its_end():
    pool = Pool(5, LruPolicy())
    for number in range(1, 6):
        register(pool, [key(number)], [key(number - 1) if number > 1 else None])
    assert pool.reserve(3).evicted == [key(5), key(4), key(3)]
    pool.check()


def test_abort_of_a_registered_slot_is_a_bug_and_asserts():
    pool = Pool(2, LruPolicy())
    slots = register(pool, [key(1)], [None])
    with pytest.raises(AssertionError):
        pool.abort(slots)
    pool.check()


# -- 03, 10: manager ---------------------------------------------------------------------------


def store(manager: Manager, name: str, hashes) -> None:
    answer = manager.reserve(holder(name), None, hashes)
    manager.seal(holder(name), answer.slots)


def seals_of(job) -> tuple[bytes, ...]:
    return tuple(b"seal" + name for name in job.keys)


def done(job) -> JobDone:
    return JobDone(job.transfer, (True,) * len(job.keys), seals_of(job))


def test_a_block_sealed_again_after_a_clear_is_pending_until_it_is_registered():
    manager = Manager(Pool(4, LruPolicy()), [], Limits())
    store(manager, "old", [key(1)])
    [old] = manager.step(0.0)
    manager.clear({HOST})
    store(manager, "new", [key(1)])
    [new] = manager.step(0.0)
    manager.complete(done(old))
    assert manager.lookup(holder("asks"), [key(1)], 0.0).pending == 1
    manager.complete(done(new))
    assert manager.lookup(holder("asks"), [key(1)], 0.0).ready == 1


def test_a_block_stored_again_after_a_clear_is_written_again():
    disk = Pool(4, LruPolicy())
    manager = Manager(Pool(4, LruPolicy()), [LowerTier(DISK, disk)], Limits())
    store(manager, "old", [key(1)])
    [seal] = manager.step(0.0)
    manager.complete(done(seal))
    [old] = manager.step(0.0)
    assert isinstance(old, WriteJob)
    manager.clear(BOTH)
    store(manager, "new", [key(1)])
    [seal] = [job for job in manager.step(0.0) if isinstance(job, SealJob)]
    manager.complete(done(seal))
    manager.complete(done(old))
    for _ in range(5):
        for job in manager.step(0.0):
            manager.complete(
                done(job) if isinstance(job, WriteJob) else JobDone(job.transfer, (True,))
            )
    assert key(1) in disk


# -- 05, 06, 12: what callers can do to a daemon ------------------------------------------------


@pytest.fixture
def server(tmp_path):
    config = NodeConfig(parse_tiers(f"host:1MiB,disk:{tmp_path}:1MiB"))
    address = f"ipc://{tmp_path}/n.sock"
    server = NodeServer(config, address)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield server, thread
    if thread.is_alive():
        server.stop()
        thread.join(10)


class Caller:
    def __init__(self, address: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(address)
        self.session = 0

    def raw(self, data: bytes) -> None:
        self.socket.send(data)

    def call(self, call) -> object:
        self.socket.send(wire.encode(wire.Envelope(1, time.monotonic() + 5, self.session, call)))
        assert self.socket.poll(5000), "no answer: the daemon is dead"
        return wire.decode_reply(self.socket.recv()).answer

    def hello(self, pid: int | None = None, started: int | None = None) -> object:
        pid = os.getpid() if pid is None else pid
        started = start_ticks(os.getpid()) if started is None else started
        return self.call(
            wire.Hello(wire.PROTOCOL_VERSION, [wire.Process(pid, started)], LAYOUT, NAMESPACE)
        )

    def close(self) -> None:
        self.socket.close()
        self.context.term()


@pytest.fixture
def caller(server):
    caller = Caller(server[0].address)
    yield caller
    caller.close()


DEAD = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@DEAD
def test_bytes_that_are_no_text_do_not_end_the_daemon(caller):
    good = wire.encode(wire.Envelope(1, time.monotonic() + 5, 0, wire.Lookup("rrrr", b"")))
    caller.raw(good.replace(b"rrrr", b"\xff\xff\xff\xff"))
    assert isinstance(caller.call(wire.Stats()), wire.StatsAnswer)


@DEAD
@pytest.mark.parametrize("pid", [1 << 31, 1 << 40, 1 << 63])
def test_a_pid_beyond_the_systems_range_does_not_end_the_daemon(caller, pid):
    data = wire.encode(
        wire.Envelope(
            1,
            time.monotonic() + 5,
            0,
            wire.Hello(wire.PROTOCOL_VERSION, [wire.Process(pid, 1)], LAYOUT, NAMESPACE),
        )
    )
    caller.raw(data)
    caller.raw(wire.encode(wire.Envelope(2, time.monotonic() + 5, 0, wire.Stats())))
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if caller.socket.poll(100):
            reply = wire.decode_reply(caller.socket.recv())
            if reply.id == 2:
                return
    raise AssertionError("the daemon is dead")


@DEAD
def test_a_threads_id_is_no_process(caller):
    found, leave = [], threading.Event()
    thread = threading.Thread(
        target=lambda: (found.append(threading.get_native_id()), leave.wait(20))
    )
    thread.start()
    while not found:
        pass
    try:
        assert isinstance(caller.hello(found[0], start_ticks(found[0])), wire.Refused)
    finally:
        leave.set()
        thread.join()


@DEAD
def test_a_hash_named_twice_is_refused_and_harmless(caller):
    welcome = caller.hello()
    caller.session = welcome.session
    hashes = [key(1), key(2)]
    reserved = caller.call(wire.Reserve("w", b"", b"".join(hashes)))
    caller.call(wire.Seal("w", reserved.slots))
    deadline = time.monotonic() + 10
    while caller.call(wire.Stats()).stats["node"]["counters"]["written_blocks"] < 2:
        assert time.monotonic() < deadline
    caller.call(wire.Clear(["host"]))
    caller.call(wire.Lookup("r", key(1) + key(1) + key(2)))
    deadline = time.monotonic() + 10
    while caller.call(wire.Stats()).stats["node"]["pending"]:
        assert time.monotonic() < deadline
    assert isinstance(caller.call(wire.Lookup("r2", key(1) + key(1))), wire.Refused)
    assert isinstance(caller.call(wire.Reserve("w2", key(7), key(7))), wire.Refused)


def test_a_broken_parent_is_refused(caller):
    welcome = caller.hello()
    caller.session = welcome.session
    assert isinstance(caller.call(wire.Reserve("w", bytes(8), bytes(8))), wire.Refused)


def test_a_goodbye_leaves_no_descriptor_behind(caller):
    def cycle() -> None:
        caller.session = caller.hello().session
        caller.call(wire.Bye())

    cycle()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        cycle()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


# -- 07, 08, 09, 11: storage and configuration -------------------------------------------------


def test_a_slab_that_cannot_be_opened_is_a_config_error(tmp_path):
    (tmp_path / SLAB_NAME).mkdir()
    with pytest.raises(ConfigError):
        Slab.open(str(tmp_path), 1 << 20, LAYOUT)


def test_a_number_beyond_floats_is_a_config_error():
    with pytest.raises(ConfigError):
        parse_bytes("9" * 400, field="x")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("array", ["a=1 b"], [2]), ("array", ["a", "b"], [1, 2])),
        (("x [a=1] y", ["b"], [4]), ("x", ["a=1] y [b"], [4])),
    ],
)
def test_two_layouts_never_share_a_fingerprint(one, other):
    made = []
    for writer, names, sizes in (one, other):
        axes = tuple(Dimension(name, size) for name, size in zip(names, sizes, strict=True))
        try:
            made.append(BlockLayout(axes, "int8", 1, writer))
        except KvstrataError:
            continue
    assert len({layout.fingerprint for layout in made}) == len(made)


def node(directory) -> Node:
    tiers = (TierConfig(TierKind.HOST, 1 << 20), TierConfig(TierKind.DISK, 1 << 20, str(directory)))
    return Node(NodeConfig(tiers), LAYOUT, lambda: None)


def work(node: Node) -> None:
    deadline = time.monotonic() + 10
    while node.manager.pending:
        node.work(time.monotonic())
        assert time.monotonic() < deadline


def clear(node: Node, tiers) -> None:
    getattr(node, "clear", node.manager.clear)(tiers)


def test_a_clear_outlives_a_stop_that_follows_at_once(tmp_path):
    first = node(tmp_path)
    store(first.manager, "w", [key(1), key(2)])
    work(first)
    assert first.manager.counters.written_blocks == 2
    clear(first, BOTH)
    first.close()
    second = node(tmp_path)
    assert second.manager.counters.recovered_blocks == 0
    store(second.manager, "w", [key(3)])
    work(second)
    second.close()
    third = node(tmp_path)
    assert third.manager.counters.recovered_blocks == 1, "blocks after a clear are kept"
    third.close()


def test_a_clear_covers_lines_of_slots_that_are_free(tmp_path):
    """A slot whose write failed is free and keeps the line of the block that it held before."""
    slab = Slab.open(str(tmp_path), 1 << 20, LAYOUT)
    slots = slab.grid.slots
    slab.close()
    first = node(tmp_path)
    for number in range(slots):
        store(first.manager, "w", [key(number + 1)])
        work(first)
    first._executor._mover.close()  # from here on every write is refused or fails

    class Fails:
        def __init__(self) -> None:
            self.ended: list = []

        def submit(self, transfer, ops, _source, _target) -> bool:
            from kvstrata.transfer.base import Completion, Outcome

            every = tuple(range(len(ops)))
            self.ended.append(Completion(transfer, Outcome.FAILED, every, "planted"))
            return True

        def poll(self):
            ended, self.ended = self.ended, []
            return ended

        def cancel(self, transfer) -> None:
            pass

        def close(self) -> None:
            pass

    first._executor._mover = Fails()
    store(first.manager, "w", [key(999_999)])
    work(first)
    assert first.manager.counters.write_failed_blocks == 1
    first._executor._mover = good = type(first._executor._mover)()
    del good
    clear(first, BOTH)
    work(first)
    first.close()
    second = node(tmp_path)
    assert second.manager.counters.recovered_blocks == 0
    second.close()


# -- 13, 14 ------------------------------------------------------------------------------------


def test_acquiring_twice_counts_once():
    manager = Manager(Pool(4, LruPolicy()), [], Limits())
    store(manager, "w", [key(1)])
    manager.complete(done(manager.step(0.0)[0]))
    for _ in range(3):
        manager.acquire(holder(), [key(1)], 0.0)
    assert manager.counters.hit_blocks_host == 1


def test_a_hold_is_let_go_deepest_first():
    host = Pool(4, LruPolicy())
    manager = Manager(host, [], Limits())
    for number in (1, 2):
        register(host, [key(number)], [key(number - 1) if number > 1 else None])
    manager.acquire(holder(), [key(1)], 0.0)
    manager.acquire(holder(), [key(1), key(2)], 0.0)
    manager.release(holder())
    slots = host.match([key(1), key(2)])
    room = host.reserve(3)
    assert room is not None
    assert room.evicted == [key(2)]
    assert host.match([key(1)]) == slots[:1]


def test_a_secret_is_whole_or_not_there(tmp_path, monkeypatch):
    from kvstrata.runtime import secret

    config = NodeConfig(parse_tiers(f"host:1MiB,disk:{tmp_path}:1MiB"))
    monkeypatch.setattr(secret.os, "urandom", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        secret.load_secret(config)
    monkeypatch.undo()
    assert len(secret.load_secret(config)) == 32


def test_bytes_are_token_ids_one_each():
    from kvstrata.tokens import lineage_digests

    ids = list(range(64))
    assert lineage_digests(bytes(ids), 16) == lineage_digests(ids, 16)
    assert lineage_digests(bytearray(ids), 16) == lineage_digests(ids, 16)
