"""kill -9 and SIGSTOP of either side: nothing is left behind, and calls come back by themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq
from kit import SharedDaemon

from kvstrata.core.errors import CallTimeoutError, DaemonGoneError
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.runtime.session import Session, SessionLimits
from kvstrata.tokens import Namespace

PARENT = """
import sys, time
import numpy as np
from kvstrata import Client
client = Client(block_shape=(4,), dtype=np.float32, block_tokens=4, tiers=sys.argv[1])
client.put(list(range(40)), np.ones((10, 4), np.float32))
print(client.stats()["pid"], flush=True)
time.sleep(600)
"""


def gone(pid: int) -> bool:
    """Return whether no process `pid` runs; a zombie of ours counts as gone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def names(folder: str | Path) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def left_in(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if not path.is_dir()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_private_daemon_ends_with_its_parent(run_directory, tmp_path, eventually, number) -> None:
    shared_memory = names("/dev/shm")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, f"host:1MiB,disk:{tmp_path}/kv:1MiB"],
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        daemon = int(parent.stdout.readline())
        assert not gone(daemon)
        assert len(left_in(run_directory)) == 2, "a socket and a lock while it lives"
        parent.send_signal(number)
        parent.wait(10)
        eventually(lambda: gone(daemon))
    assert left_in(run_directory) == []
    assert names(tmp_path / "kv") == {"blocks.slab", "secret"}
    held = {name for name in names("/dev/shm") - shared_memory if "kvstrata" in name}
    assert not held


def test_a_daemon_whose_parent_died_before_it_was_ready(run_directory) -> None:
    import msgspec

    from kvstrata.core.config import NodeConfig, parse_tiers
    from kvstrata.runtime.addresses import private_address
    from kvstrata.runtime.daemon import PrivateOrder

    with subprocess.Popen([sys.executable, "-c", ""]) as parent:
        parent.wait(10)
    reader, writer = os.pipe()
    os.close(reader)
    order = PrivateOrder(
        NodeConfig(parse_tiers("host:1MiB")), private_address(), parent.pid, 1, writer
    )
    done = subprocess.run(
        [sys.executable, "-m", "kvstrata.runtime.daemon", msgspec.json.encode(order).decode()],
        pass_fds=[writer],
        stderr=subprocess.PIPE,
        timeout=30,
        check=False,
    )
    os.close(writer)
    assert left_in(run_directory) == []
    assert b"Traceback" not in done.stderr, done.stderr.decode()


def test_a_private_daemon_is_started_again(connect, make_blocks, tmp_path, eventually) -> None:
    client = connect(tiers=f"host:1MiB,disk:{tmp_path}:1MiB")
    tokens, blocks = make_blocks(1, 8)
    client.put(tokens, blocks)
    client.wait_idle()
    before = client.stats()["pid"]
    os.kill(before, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(DaemonGoneError):
        client.get(tokens)
    assert time.monotonic() - begin < 2
    found = eventually(lambda: [client.get(tokens)], ignore=DaemonGoneError)[0]
    assert found.tobytes() == blocks.tobytes(), "what had reached the disk is still there"
    assert client.stats()["pid"] != before
    more, others = make_blocks(2, 3)
    assert client.put(more, others) == 3
    assert client.get(more).tobytes() == others.tobytes()


def test_every_call_tells_that_the_daemon_is_gone(connect, make_blocks) -> None:
    tokens, blocks = make_blocks(1, 2)
    calls = {
        "lookup": lambda client: client.lookup(tokens),
        "get": lambda client: client.get(tokens),
        "put": lambda client: client.put(tokens, blocks),
        "stats": lambda client: client.stats(),
        "clear": lambda client: client.clear(),
        "wait_idle": lambda client: client.wait_idle(2),
    }
    slow = {}
    for name, call in calls.items():
        client = connect(tiers="host:1MiB", limits={"retry_interval_s": 60})
        os.kill(client.stats()["pid"], signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(DaemonGoneError):
            call(client)
        if time.monotonic() - begin > 2:
            slow[name] = time.monotonic() - begin
        begin = time.monotonic()
        with pytest.raises(DaemonGoneError):
            call(client)
        assert time.monotonic() - begin < 0.5, "a daemon that is known to be gone costs nothing"
        client.close()
    assert not slow


def test_a_served_daemon_that_comes_back(serve, connect, make_blocks, tmp_path, eventually) -> None:
    tiers = f"host:1MiB,disk:{tmp_path}:1MiB"
    daemon = serve(tiers)
    clients = [connect(address=daemon.address, salt=salt) for salt in ("", "b")]
    tokens, blocks = make_blocks(1, 8)
    for add, client in enumerate(clients):
        client.put(tokens, blocks + add)
    clients[0].wait_idle()
    daemon.kill()
    begin = time.monotonic()
    for client in clients:
        with pytest.raises(DaemonGoneError):
            client.lookup(tokens)
    assert time.monotonic() - begin < 2
    for client in clients:
        with pytest.raises(DaemonGoneError):
            client.lookup(tokens)
    serve(tiers)
    for add, client in enumerate(clients):
        found = eventually(lambda c=client: [c.get(tokens)], ignore=DaemonGoneError)[0]
        assert found.tobytes() == (blocks + add).tobytes()
    assert clients[0].stats()["sessions"] == 2


def test_a_client_of_a_hung_daemon_goes_on(serve, connect, make_blocks, eventually) -> None:
    daemon = serve()
    client = connect(address=daemon.address, limits={"call_timeout_s": 0.3})
    tokens, blocks = make_blocks(1, 3)
    client.put(tokens, blocks)
    daemon.signal(signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(CallTimeoutError):
        client.lookup(tokens)
    assert 0.25 < time.monotonic() - begin < 1.5
    for _ in range(20):
        begin = time.monotonic()
        with pytest.raises(DaemonGoneError):
            client.lookup(tokens)
        assert time.monotonic() - begin < 0.3, "afterwards it is not waited for"
    daemon.signal(signal.SIGCONT)
    ignore = (DaemonGoneError, CallTimeoutError)
    assert eventually(lambda: client.lookup(tokens), ignore=ignore) == 12
    assert client.get(tokens).tobytes() == blocks.tobytes()
    assert client.stats()["sessions"] == 1
    assert client.stats()["late_calls"] >= 1, "the call whose caller had gone was not served"


def test_sessions_of_dead_clients_end(serve, connect, eventually) -> None:
    daemon = serve()
    program = PARENT.replace("tiers=sys.argv[1]", "address=sys.argv[1]").replace("(4,)", "(3, 5)")
    program = program.replace("(10, 4)", "(10, 3, 5)")
    ours = connect(address=daemon.address)
    with subprocess.Popen(
        [sys.executable, "-c", program, daemon.address], stdout=subprocess.PIPE, text=True
    ) as other:
        assert int(other.stdout.readline()) == daemon.pid
        assert ours.stats()["sessions"] == 2
        other.kill()
    eventually(lambda: ours.stats()["sessions"] == 1)
    assert ours.lookup(range(40)) == 40, "what it had stored stays"


def test_many_sessions_of_one_process_leave_nothing_in_the_daemon(serve, connect) -> None:
    daemon = serve()
    connect(address=daemon.address).close()
    before = len(names(f"/proc/{daemon.pid}/fd"))
    for _ in range(20):
        connect(address=daemon.address).close()
    assert len(names(f"/proc/{daemon.pid}/fd")) <= before + 3


def test_closing_a_private_daemon_is_quick(connect) -> None:
    slow = []
    for _ in range(8):
        client = connect(tiers="host:1MiB")
        begin = time.monotonic()
        client.close()
        slow.append(time.monotonic() - begin)
    assert max(slow) < 0.7, slow


def test_a_daemon_that_ends_between_hello_and_answer_is_not_waited_for(tmp_path, eventually):
    """The socket connects to the next daemon by itself, which never saw that hello."""
    address = f"ipc://{tmp_path}/node.sock"
    layout = BlockLayout((Dimension("channel", 4),), "float32", 4, "test")
    namespace = Namespace("m", "w", "", "float32", layout.geometry, 4)
    session = Session(address, layout, namespace, SessionLimits(retry_interval_s=0.1))
    with zmq.Context() as context:
        with context.socket(zmq.ROUTER) as dying:
            dying.linger = 0
            dying.bind(address)
            assert not session.usable()
            assert dying.poll(5000), "the hello came"
            dying.recv_multipart()
        daemon = SharedDaemon(tmp_path)
        try:
            eventually(session.usable)
            session.close()
        finally:
            daemon.signal(signal.SIGKILL)


def test_a_session_with_a_daemon_that_ended_is_not_usable(serve, connect, eventually):
    """SGLang's half makes no call before it has mapped the memory, which a dead daemon has not."""
    daemon = serve()
    limits = {"call_timeout_s": 0.3, "retry_interval_s": 0.05}
    session = connect(address=daemon.address, limits=limits)._session
    assert session.usable()
    daemon.signal(signal.SIGKILL)
    eventually(lambda: not session.usable())
