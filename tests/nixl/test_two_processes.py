"""Two processes over real NIXL: kill -9, SIGSTOP and restart of either, in mid-transfer.

What must hold: nobody waits past a deadline, no handle is left, and after a completion was polled
its memory is nobody else's any more.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import time

import numpy as np
import pytest

from kvstrata.storage.base import FileRegion, MemoryRegion
from kvstrata.transfer.base import CopyOp, Outcome

pytestmark = pytest.mark.nixl

SMALL = 8 << 20
LARGE = 256 << 20


@pytest.mark.usefixtures("transport")
def test_pull_and_push(start_peer, side):
    ours, peer = side(SMALL), start_peer(SMALL, 7)
    there = ours.agent.connect(peer.invitation)["arena"]
    ours.pull(1, there)
    assert ours.wait(1, 10).outcome is Outcome.DONE
    assert (ours.array == 7).all()
    ours.array[:] = 9
    ours.push(2, there)
    assert ours.wait(2, 10).outcome is Outcome.DONE
    assert peer.order("count", value=9) == SMALL
    ours.assert_nothing_left()


@pytest.mark.usefixtures("transport")
def test_only_the_pieces_that_were_asked_for_move(start_peer, side):
    ours, peer = side(SMALL), start_peer(SMALL, 7)
    there = ours.agent.connect(peer.invitation)["arena"]
    ops = [CopyOp(5000, 4096, 1000), CopyOp(SMALL - 10, 0, 10, 1), CopyOp(SMALL - 9, 0, 10, 2)]
    assert ours.backend.submit(1, ops, there, ours.region)
    completion = ours.wait(1, 10)
    assert completion.failed_ops == (2,)
    assert (np.flatnonzero(ours.array == 7) == [*range(10), *range(4096, 5096)]).all()


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("direction", ["pull", "push"])
def test_a_peer_killed_in_mid_transfer(direction, start_peer, side):
    ours, peer = side(LARGE, timeout_s=5.0), start_peer(LARGE, 7)
    there = ours.agent.connect(peer.invitation)["arena"]
    getattr(ours, direction)(1, there)
    ours.wait_until_posted()
    peer.kill()
    completion = ours.wait(1, 5)
    assert completion is not None, "a dead peer kept us waiting past the deadline"
    assert completion.outcome is Outcome.FAILED
    assert "gone" in completion.reason or "lost" in completion.reason
    assert completion.failed_ops
    ours.assert_quiet()
    ours.assert_nothing_left()
    assert ours.agent.statistics().peers_lost == 1
    _refused_at_once(ours, there)
    # Its next life has another name; the old one is forgotten.
    again = start_peer(LARGE, 5)
    fresh = ours.agent.connect(again.invitation)["arena"]
    ours.agent.disconnect(there.peer)
    ours.pull(3, fresh)
    assert ours.wait(3, 10).outcome is Outcome.DONE
    assert (ours.array == 5).all()
    assert ours.agent.statistics().peers == 1


def _refused_at_once(ours, there):
    begin, asked = time.monotonic(), ours.agent.statistics().requests
    ours.pull(2, there)
    completion = ours.wait(2, 5)
    assert completion.outcome is Outcome.FAILED
    assert completion.failed_ops == tuple(range(len(ours.ops)))
    assert time.monotonic() - begin < 1
    assert ours.agent.statistics().requests == asked, "NIXL was asked all the same"


@pytest.mark.usefixtures("sockets")
def test_killed_at_random_moments_nothing_lands_afterwards(start_peer, side):
    luck = random.Random(11)
    ours = side(LARGE)
    for name in range(6):
        peer = start_peer(LARGE, 7)
        there = ours.agent.connect(peer.invitation)["arena"]
        ours.array[:] = 0
        ours.pull(name, there)
        time.sleep(luck.uniform(0.0, 0.25))
        peer.kill()
        completion = ours.wait(name, 5)
        assert completion is not None
        moved = [op for index, op in enumerate(ours.ops) if index not in completion.failed_ops]
        assert all((ours.array[op.target_offset :][: op.length] == 7).all() for op in moved)
        ours.assert_quiet(0.2)
        ours.agent.disconnect(there.peer)
    ours.assert_nothing_left()
    assert ours.agent.statistics().peers == 0


def _stall(ours, peer):
    """Stop the peer while it sends; return its memory once our requests are overdue."""
    there = ours.agent.connect(peer.invitation)["arena"]
    ours.pull(1, there)
    ours.wait_until_landing(7)
    peer.signal(signal.SIGSTOP)
    assert ours.wait(1, 1.0) is None, "completed while bytes may still come"
    assert ours.agent.statistics().overdue > 0
    return there


@pytest.mark.usefixtures("sockets")
def test_a_stopped_peer_stalls_only_itself(start_peer, side, tmp_path):
    ours, peer = side(LARGE, timeout_s=0.5), start_peer(LARGE, 7)
    there = _stall(ours, peer)
    _refused_at_once(ours, there)
    near = MemoryRegion(memoryview(bytearray(b"a" * 4096)))
    target = MemoryRegion(memoryview(bytearray(4096)))
    assert ours.backend.submit(3, [CopyOp(0, 0, 4096)], near, target)
    assert ours.wait(3, 1).outcome is Outcome.DONE
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    assert ours.backend.submit(4, [CopyOp(0, 0, 4096)], near, FileRegion(descriptor))
    assert ours.wait(4, 1).outcome is Outcome.DONE
    os.close(descriptor)
    peer.signal(signal.SIGCONT)
    completion = ours.wait(1, 10)
    assert completion.outcome is Outcome.FAILED  # what was not posted in time was given up
    assert "did not answer within 0.5 s" in completion.reason
    ours.assert_quiet()
    ours.assert_nothing_left()
    ours.pull(5, there)
    assert ours.wait(5, 10).outcome is Outcome.DONE
    assert (ours.array == 7).all()


@pytest.mark.usefixtures("sockets")
def test_the_memory_of_an_overdue_request_cannot_be_given_back(start_peer, side):
    ours, peer = side(LARGE, timeout_s=0.3), start_peer(LARGE, 7)
    _stall(ours, peer)
    ours.region.view.release()
    del ours.array
    with pytest.raises(BufferError):
        ours.memory.close()
    peer.signal(signal.SIGCONT)
    assert ours.wait(1, 10) is not None


@pytest.mark.usefixtures("sockets")
def test_a_stopped_peer_that_is_killed(start_peer, side):
    ours, peer = side(LARGE, timeout_s=0.5), start_peer(LARGE, 7)
    _stall(ours, peer)
    peer.kill()
    assert ours.wait(1, 5).outcome is Outcome.FAILED
    ours.assert_quiet()
    ours.assert_nothing_left()


@pytest.mark.usefixtures("sockets")
def test_a_peer_is_not_removed_while_bytes_come_from_it(start_peer, side):
    ours, peer = side(LARGE, timeout_s=0.3), start_peer(LARGE, 7)
    there = _stall(ours, peer)
    ours.agent.disconnect(there.peer)
    assert ours.agent.statistics().peers == 1
    peer.signal(signal.SIGCONT)
    assert ours.wait(1, 10) is not None
    assert ours.agent.statistics().peers == 0
    ours.assert_quiet()


@pytest.mark.usefixtures("sockets")
def test_closing_with_requests_that_do_not_end(start_peer, side):
    ours, peer = side(LARGE, timeout_s=0.3, close_timeout_s=0.5), start_peer(LARGE, 7)
    _stall(ours, peer)
    begin = time.monotonic()
    ours.backend.close()
    assert time.monotonic() - begin < 2
    completion = ours.wait(1, 0.1)
    assert completion.outcome is Outcome.CANCELLED
    assert completion.failed_ops == tuple(range(len(ours.ops)))
    kept = ours.array.ctypes.data
    ours.region.view.release()
    ours.array = ours.backend = ours.agent = None
    gc.collect()
    with pytest.raises(BufferError):  # late bytes have somewhere to land
        ours.memory.close()
    fresh = side(LARGE)
    assert fresh.array.ctypes.data != kept
    peer.signal(signal.SIGCONT)
    fresh.assert_quiet(1.0)


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("direction", ["push", "pull"])
def test_an_initiator_killed_in_mid_transfer(direction, start_peer, side):
    """The owner of the memory lives on; after the connection broke nothing lands any more."""
    ours, peer = side(LARGE), start_peer(LARGE, 7)
    peer.order("connect", invitation=ours.invitation.hex())
    peer.order(direction, name=1)
    if direction == "push":
        ours.wait_until_landing(7)
    else:
        time.sleep(0.02)
    peer.kill()
    time.sleep(0.2)  # what lay in the sockets of our own process
    ours.assert_quiet()
    again = start_peer(LARGE, 5)
    again.order("connect", invitation=ours.invitation.hex())
    again.order("push", name=1)
    assert again.order("wait", timeout_s=10) == ["done"]
    assert (ours.array == 5).all()


@pytest.mark.usefixtures("sockets")
def test_an_initiator_that_is_stopped_goes_on_later(start_peer, side):
    ours, peer = side(LARGE), start_peer(LARGE, 7)
    peer.order("connect", invitation=ours.invitation.hex())
    peer.order("push", name=1)
    ours.wait_until_landing(7)
    peer.signal(signal.SIGSTOP)
    time.sleep(0.5)
    peer.signal(signal.SIGCONT)
    assert peer.order("wait", timeout_s=10) == ["done"]
    assert (ours.array == 7).all()


@pytest.mark.usefixtures("sockets")
@pytest.mark.parametrize("direction", ["push", "pull"])
def test_closing_while_a_peer_reaches_our_memory(direction, start_peer, side):
    """NIXL's threads would go on with memory that is no longer mapped: a crash of this process."""
    ours, peer = side(LARGE), start_peer(LARGE, 7)
    peer.order("connect", invitation=ours.invitation.hex())
    peer.order(direction, name=1)
    if direction == "push":
        ours.wait_until_landing(7)
    else:
        time.sleep(0.02)
    ours.backend.close()
    ours.region.view.release()
    ours.array = None
    ours.memory.close()
    assert peer.order("wait", timeout_s=10) in (["failed"], ["done"])
    time.sleep(0.3)
