"""The wrapper's own rules, on real NIXL: bounds, names, registrations, quiet, idle."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kvstrata.core.errors import TransferError
from kvstrata.storage.base import FileRegion, MemoryRegion
from kvstrata.transfer.base import CopyOp, Outcome

pytestmark = pytest.mark.nixl


def _memory(length, value=0):
    return MemoryRegion(memoryview(bytearray([value]) * length))


@pytest.fixture
def agent():
    from kvstrata.transfer.backends.nixl import NixlAgent

    made = NixlAgent()
    yield made
    made.close()


@pytest.fixture
def backend():
    from kvstrata.transfer.backends.nixl import NixlBackend

    made = NixlBackend()
    yield made
    made.close()


def _run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )


def _wait(backend, name, timeout_s=10):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        for completion in backend.poll():
            assert completion.transfer == name
            return completion
        time.sleep(0.001)
    raise AssertionError("nothing completed")


def test_each_life_has_another_name(agent):
    from kvstrata.transfer.backends.nixl import NixlAgent

    other = NixlAgent()
    assert other.name != agent.name
    other.close()


IDLE = """
import json, time
from kvstrata.storage.base import MemoryRegion
from kvstrata.transfer.backends.nixl import NixlAgent, NixlBackend
from kvstrata.transfer.base import CopyOp
backend, other = NixlBackend(), NixlAgent()
far = MemoryRegion(memoryview(bytearray(4096)))
there = backend.agent.connect(other.export({"end": far}))["end"]
backend.submit(1, [CopyOp(0, 0, 4096)], MemoryRegion(memoryview(bytearray(4096))), there)
while not backend.poll():
    time.sleep(0.001)
time.sleep(0.2)
begin = time.process_time()
time.sleep(4)
print(json.dumps((time.process_time() - begin) / 4))
backend.close()
"""


def test_two_idle_connected_agents_use_under_three_percent_of_a_core_each():
    assert json.loads(_run(IDLE).stdout) / 2 < 0.03


QUIET = """
import logging, sys
from kvstrata.transfer.backends.nixl import NixlAgent
agent = NixlAgent()
logging.getLogger("nixl").warning("loud")
agent.close()
assert "torch" not in sys.modules
assert logging.raiseExceptions
"""


def test_nothing_on_stdout_and_no_torch():
    assert not _run(QUIET).stdout


EXIT = """
import sys
from kvstrata.transfer.backends.nixl import NixlAgent
agent = NixlAgent()
print("flushed")
sys.exit(3)
"""


def test_a_process_ends_with_its_own_status():
    """Unloading NIXL beside the system's RDMA libraries is a crash; nothing is unloaded."""
    done = subprocess.run(
        [sys.executable, "-c", EXIT], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (3, "flushed\n"), done.stderr


def test_descriptors_in_flight_are_bounded():
    from kvstrata.transfer.backends.nixl import NixlAgent

    agent = NixlAgent(descriptors_max=8)
    region = _memory(4096)
    address = agent.hold(region).address
    rows = np.array([[address, 16, 0]] * 9, np.uint64)
    with pytest.raises(TransferError, match="above 8") as refusal:
        agent.post((rows, rows), "memory", read=True, timeout_s=1)
    assert refusal.value.retryable
    assert agent.statistics().requests == 0
    agent.close()


def test_more_ops_than_descriptors_wait_their_turn(tmp_path):
    from kvstrata.transfer.backends.nixl import NixlAgent, NixlBackend

    backend = NixlBackend(NixlAgent(descriptors_max=3))
    source, count = _memory(64 << 10, 5), 500
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    ops = [CopyOp(at * 100, at * 100, 100, at) for at in range(count)]
    assert backend.submit(1, ops, source, FileRegion(descriptor))
    assert _wait(backend, 1).outcome is Outcome.DONE
    assert os.pread(descriptor, 1 << 20, 0) == b"\5" * 100 * count
    os.close(descriptor)
    backend.close()


def test_a_part_uses_the_registration_of_the_whole(agent):
    whole = _memory(1 << 20)
    part = MemoryRegion(whole.view[4096:8192])
    first = agent.hold(whole)
    assert agent.hold(part) is first
    agent.let_go(first)
    assert agent.statistics().registrations == 1
    agent.let_go(first)
    assert agent.statistics().registrations == 0


def test_overlapping_registrations_are_refused(agent):
    """NIXL takes them, and then finds neither."""
    whole = _memory(1 << 20)
    agent.hold(MemoryRegion(whole.view[4096:8192]))
    for begin, end in ((0, 1 << 20), (0, 5000), (5000, 10_000)):
        with pytest.raises(TransferError, match="overlaps"):
            agent.hold(MemoryRegion(whole.view[begin:end]))
    agent.hold(MemoryRegion(whole.view[8192:10_000]))
    assert agent.statistics().registrations == 2


def test_a_transfer_from_overlapping_memory_fails_with_a_reason(backend):
    whole = _memory(1 << 20)
    hold = backend.agent.hold(MemoryRegion(whole.view[4096:8192]))
    assert backend.submit(1, [CopyOp(0, 0, 10), CopyOp(20, 20, 10)], whole, _memory(100))
    completion = _wait(backend, 1)
    assert completion.failed_ops == (0, 1)
    assert "overlaps" in completion.reason
    backend.agent.let_go(hold)
    assert backend.agent.statistics().registrations == 0


def test_transfers_leave_no_registration_and_no_descriptor_behind(backend, tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name in range(20):
        descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        assert backend.submit(name, [CopyOp(0, 0, 64)], _memory(64), FileRegion(descriptor))
        _wait(backend, name)
        os.close(descriptor)
    assert backend.agent.statistics().registrations == 0
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_descriptor_that_is_closed_meanwhile_does_not_become_another_file(backend, tmp_path):
    source = _memory(8 << 20, 5)
    ops = [CopyOp(at, at, 1 << 16) for at in range(0, 8 << 20, 1 << 16)]
    right = os.open(tmp_path / "right", os.O_RDWR | os.O_CREAT)
    hold = backend.agent.hold_file(right)
    os.close(right)
    wrong = os.open(tmp_path / "wrong", os.O_RDWR | os.O_CREAT)
    assert wrong == right, "the number is used again"
    assert backend.submit(1, ops, source, FileRegion(hold.descriptor))
    assert _wait(backend, 1).outcome is Outcome.DONE
    backend.agent.let_go(hold)
    os.close(wrong)
    assert (tmp_path / "right").stat().st_size == 8 << 20
    assert (tmp_path / "wrong").stat().st_size == 0


def test_closed_and_read_only_files_fail_every_op_by_name(backend, tmp_path):
    (tmp_path / "file").write_bytes(bytes(4096))
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    ops = [CopyOp(0, 0, 512), CopyOp(512, 512, 512)]
    assert backend.submit(1, ops, _memory(4096), FileRegion(descriptor))
    assert _wait(backend, 1).failed_ops == (0, 1)
    os.close(descriptor)
    assert backend.submit(2, ops, _memory(4096), FileRegion(descriptor))
    completion = _wait(backend, 2)
    assert completion.failed_ops == (0, 1)
    assert "Bad file descriptor" in completion.reason
    assert backend.submit(3, ops, _memory(4096), _memory(4096))
    assert _wait(backend, 3).outcome is Outcome.DONE, "an error spoils nothing else"


def test_a_read_past_the_end_of_a_file_is_the_only_op_that_fails(backend, tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    descriptor = os.open(tmp_path / "file", os.O_RDWR)
    target = _memory(16 << 10)
    ops = [CopyOp(at, at, 1000) for at in range(0, 16_000, 1000)]
    assert backend.submit(1, ops, FileRegion(descriptor), target)
    completion = _wait(backend, 1)
    os.close(descriptor)
    assert completion.failed_ops == tuple(range(10, 16))
    assert target.view[:10_000] == b"x" * 10_000
    # Of several in one request NIXL would say neither which failed nor whether the others ended.
    assert backend.agent.statistics().requests == len(ops)


def test_regions_that_it_does_not_know_are_refused(backend):
    assert backend.submit(1, [CopyOp(0, 0, 8)] * 3, _memory(8), object())
    completion = _wait(backend, 1)
    assert completion.failed_ops == (0, 1, 2)
    assert "MemoryRegion to object" in completion.reason


def test_an_invitation_twice_is_one_peer(agent, backend):
    invitation = agent.export({"end": _memory(4096)})
    first = backend.agent.connect(invitation)
    assert backend.agent.connect(invitation) == first
    assert backend.agent.statistics().peers == 1
    backend.agent.disconnect(first["end"].peer)
    backend.agent.disconnect(first["end"].peer)
    assert backend.agent.statistics().peers == 0
    assert backend.submit(1, [CopyOp(0, 0, 8)], _memory(8), first["end"])
    assert "not connected" in _wait(backend, 1).reason
    assert backend.agent.connect(invitation) == first
    assert backend.submit(2, [CopyOp(0, 0, 8)], _memory(8), first["end"])
    assert _wait(backend, 2).outcome is Outcome.DONE


def test_later_invitations_offer_more(agent, backend):
    backend.agent.connect(agent.export({"one": _memory(4096)}))
    target = _memory(4096)
    there = backend.agent.connect(agent.export({"two": target}))["two"]
    assert backend.submit(1, [CopyOp(0, 0, 8)], _memory(8, 3), there)
    assert _wait(backend, 1).outcome is Outcome.DONE
    assert bytes(target.view[:8]) == b"\3" * 8


def test_an_agent_does_not_invite_itself(agent):
    with pytest.raises(TransferError, match="itself"):
        agent.connect(agent.export({"end": _memory(4096)}))
    assert agent.statistics().peers == 0


def test_metadata_of_somebody_else_is_refused(agent, backend):
    from kvstrata.transfer.backends.nixl import NixlAgent
    from kvstrata.transfer.backends.nixl.invitation import (
        Invitation,
        decode_invitation,
        encode_invitation,
    )

    other = NixlAgent()
    theirs = decode_invitation(other.export({"end": _memory(4096)}))
    forged = Invitation(agent.name, [], theirs.metadata)
    with pytest.raises(TransferError, match="sent the metadata of"):
        backend.agent.connect(encode_invitation(forged))
    broken = Invitation(agent.name, [], theirs.metadata[:-20])
    with pytest.raises(TransferError, match="NIXL refuses the metadata"):
        backend.agent.connect(encode_invitation(broken))
    assert backend.agent.statistics().peers == 0
    right = agent.export({"end": _memory(4096)})
    assert backend.agent.connect(right)["end"].peer == agent.name
    other.close()


def test_damaged_invitations_do_not_spoil_the_right_one(agent, backend):
    right = agent.export({"end": _memory(4096)})
    for at in range(0, len(right), 7):
        damaged = bytearray(right)
        damaged[at] ^= 1
        with pytest.raises(TransferError, match="refused"):
            backend.agent.connect(bytes(damaged))
    there = backend.agent.connect(right)["end"]
    assert backend.submit(1, [CopyOp(0, 0, 8)], _memory(8), there)
    assert _wait(backend, 1).outcome is Outcome.DONE


def test_the_secret_decides_who_can_invite(agent, backend):
    invitation = agent.export({"end": _memory(4096)}, secret=b"a" * 32)
    for secret in (None, b"b" * 32):
        with pytest.raises(TransferError, match="another secret"):
            backend.agent.connect(invitation, secret)
    assert backend.agent.connect(invitation, b"a" * 32)


def test_a_closed_agent_says_so(agent):
    agent.close()
    agent.close()
    with pytest.raises(TransferError, match="closed"):
        agent.hold(_memory(64))


@pytest.mark.usefixtures("agent")
def test_closing_ends_its_threads_before_the_memory_may_go():
    """Peers may be reaching that memory at this moment."""
    from kvstrata.transfer.backends.nixl import NixlAgent

    before = len(list(Path("/proc/self/task").iterdir()))
    other = NixlAgent()
    other.export({"end": _memory(4096)})
    assert len(list(Path("/proc/self/task").iterdir())) > before
    requests = other._requests  # somebody may still have a part of it in his hands
    other.close()
    assert len(list(Path("/proc/self/task").iterdir())) == before
    assert requests.statistics().registrations == 0


def test_plugins_that_do_not_start_are_told(tmp_path):
    from kvstrata.core.errors import ConfigError
    from kvstrata.transfer.backends.nixl import NixlAgent, NixlBackend

    with pytest.raises(ConfigError, match="no plug-in starts"):
        NixlAgent({"NOPE": {}})
    agent = NixlAgent({"UCX": {}, "NOPE": {}})
    assert list(agent.statistics().missing) == ["NOPE"]
    backend = NixlBackend(agent)
    assert ("memory", "file") not in backend.capabilities()
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    assert backend.submit(1, [CopyOp(0, 0, 8)], _memory(8), FileRegion(descriptor))
    assert "no plug-in" in _wait(backend, 1).reason
    os.close(descriptor)
    backend.close()


def test_probes_say_what_is_usable():
    from kvstrata.transfer.backends.nixl.probe import probe_plugins

    found = {each.plugin: each for each in probe_plugins(["UCX", "POSIX", "NOPE"])}
    assert found["UCX"].usable
    assert found["POSIX"].usable
    assert not found["NOPE"].usable
    assert found["NOPE"].why
    assert found["NOPE"].remedy


def test_an_object_plugin_that_loads_says_why_it_is_not_used():
    from kvstrata.transfer.backends.nixl.probe import probe_plugins

    for found in probe_plugins(["OBJ", "AZURE_BLOB"]):
        assert found.usable
        assert "obstore" in found.why
        assert "short read" in found.why


@pytest.mark.parametrize("queue", ["use_aio", "use_uring"])
def test_a_file_region_under_each_queue_of_posix(queue, tmp_path):
    """Past the page cache, there and back; what is behind the end fails and spoils nothing."""
    from kvstrata.transfer.backends.nixl import NixlAgent, NixlBackend

    backend = NixlBackend(NixlAgent({"POSIX": {queue: "true"}}))
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    near, back = (MemoryRegion(memoryview(mmap.mmap(-1, 1 << 20))) for _ in range(2))
    near.view[:] = os.urandom(1 << 20)
    ops = [CopyOp(at, at, 1 << 16, at >> 16) for at in range(0, 1 << 20, 1 << 16)]
    assert backend.submit(1, ops, near, FileRegion(descriptor))
    assert _wait(backend, 1).outcome is Outcome.DONE
    os.ftruncate(descriptor, 1 << 19)
    assert backend.submit(2, ops, FileRegion(descriptor), back)
    assert _wait(backend, 2).failed_ops == tuple(range(8, 16))
    assert back.view[: 1 << 19] == near.view[: 1 << 19]
    assert backend.submit(3, ops[:8], FileRegion(descriptor), back)
    assert _wait(backend, 3).outcome is Outcome.DONE
    found = backend.agent.statistics()
    assert (found.live, found.registrations) == (0, 0)
    backend.close()
    os.close(descriptor)


def test_the_one_op_that_nixl_does_not_take_fails_alone(agent, backend):
    """The owner exported less than somebody believes."""
    from kvstrata.transfer.backends.nixl import PeerMemory

    target = _memory(4096)
    there = backend.agent.connect(agent.export({"end": target}))["end"]
    wrong = PeerMemory(there.peer, there.label, there.address, there.length * 2)
    ops = [CopyOp(0, 0, 8), CopyOp(8, 5000, 8, 1), CopyOp(16, 16, 8, 2)]
    assert backend.submit(1, ops, _memory(64, 3), wrong)
    assert _wait(backend, 1).failed_ops == (1,)
    assert bytes(target.view[:32]) == b"\3" * 8 + bytes(8) + b"\3" * 8 + bytes(8)
