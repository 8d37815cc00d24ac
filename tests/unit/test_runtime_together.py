"""Several calls in one round trip: each counts for itself, and all share one deadline."""

from __future__ import annotations

import signal
import time

import pytest

from kvstrata.core.errors import CallRefusedError, CallTimeoutError
from kvstrata.runtime import messages as wire


def test_a_refused_call_keeps_none_behind_it_back(serve, connect, eventually) -> None:
    session = connect(address=serve().address)._session
    keys = [bytes([number]) * 16 for number in range(100)]
    reserved = session.reserve("ours", None, keys)
    each = [wire.Seal("ours", [slot]) for slot in reserved.slots]
    with pytest.raises(CallRefusedError):
        session.tell_all([wire.Seal("stranger", reserved.slots[:1]), *each])
    assert session.welcome is not None, "a refusal does not end the session"
    assert eventually(lambda: session.lookup("look", keys).ready == len(keys))


def test_all_of_them_wait_no_longer_than_one(serve, connect) -> None:
    daemon = serve()
    session = connect(address=daemon.address, limits={"call_timeout_s": 0.3})._session
    daemon.signal(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(CallTimeoutError):
        session.tell_all([wire.Release(["nothing"])] * 10)
    assert 0.25 < time.monotonic() - began < 1.5
    assert session.welcome is None, "what became of them is unknown, so the session is void"
    daemon.signal(signal.SIGCONT)
