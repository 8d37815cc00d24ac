"""Whatever breaks, the request is answered, and rightly."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kit import SharedDaemon

from kvstrata.runtime import messages as wire
from kvstrata.runtime.session import Session
from kvstrata.storage.slab import SLAB_NAME

pytestmark = pytest.mark.engine

REQUEST_DEADLINE_S = 10.0
"""A request of the tiny model takes 0.1 s; a lost daemon may add its call timeout of 1 s."""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[SharedDaemon]:
    """A daemon that several engines could share."""
    shared = SharedDaemon(tmp_path)
    yield shared
    shared.signal(signal.SIGCONT)
    shared.signal(signal.SIGKILL)


@contextmanager
def striking(monkeypatch, kind: type, strike) -> Iterator[list[int]]:
    """Call `strike` once, just before the session's next call of this kind goes out."""
    real_call, real_tell = Session.call, Session.tell_all
    struck: list[int] = []

    def meet(messages):
        if any(isinstance(each, kind) for each in messages) and not struck:
            struck.append(1)
            strike()

    def call(self, message, answer):
        meet([message])
        return real_call(self, message, answer)

    def tell_all(self, messages):
        meet(messages)
        return real_tell(self, messages)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "call", call)
        patch.setattr(Session, "tell_all", tell_all)
        yield struck


def _until_kept(engine, prompt, expected):
    """Ask until blocks come from kvstrata again; every answer on the way must be right."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        engine.forget()
        answer = engine.ask([prompt])[0]
        assert answer.tokens == expected
        if sum(answer.tokens_from.values()):
            return answer
    raise AssertionError("the cache did not come back")


@pytest.mark.parametrize(
    "kind",
    [wire.Lookup, wire.Acquire, wire.Release, wire.Reserve, wire.Seal],
    ids=lambda k: k.__name__,
)
def test_daemon_killed_in_a_request(
    engine_on, prompts, reference, daemon, monkeypatch, caplog, kind
):
    prompt, expected = prompts[2], reference[2]
    with engine_on({"address": daemon.address}) as engine:
        engine.ask([prompts[0]])
        if kind not in {wire.Reserve, wire.Seal}:  # those need something new to store
            engine.ask([prompt])
        engine.wait_idle()
        engine.forget()
        caplog.clear()
        with striking(monkeypatch, kind, lambda: daemon.signal(signal.SIGKILL)) as struck:
            started = time.monotonic()
            both = engine.ask([prompt, prompts[1]])  # the second meets what the first has lost
            took = time.monotonic() - started
        assert struck, f"the request made no {kind.__name__}"
        assert [each.tokens for each in both] == [expected, reference[1]]
        assert took < REQUEST_DEADLINE_S
        lost = [each for each in caplog.records if each.name.startswith("kvstrata")]
        assert [each.levelno for each in lost] == [logging.WARNING], [e.message for e in lost]
        assert "going on without the cache" in lost[0].message

        engine.forget()
        without = engine.ask([prompt, prompts[0]])
        assert [each.tokens for each in without] == [expected, reference[0]]
        assert all(each.tokens_from == {"host": 0, "disk": 0} for each in without)
        assert len([each for each in caplog.records if each.name.startswith("kvstrata")]) == 1

        daemon.start()
        _until_kept(engine, prompt, expected)


def test_hung_daemon_costs_one_call_timeout(
    engine_on, prompts, reference, daemon, monkeypatch, caplog
):
    with engine_on({"address": daemon.address, "call_timeout_s": 0.5}) as engine:
        engine.ask(prompts)
        engine.wait_idle()
        engine.forget()
        with striking(monkeypatch, wire.Lookup, lambda: daemon.signal(signal.SIGSTOP)):
            started = time.monotonic()
            answer = engine.ask([prompts[2]])[0]
            took = time.monotonic() - started
        assert answer.tokens == reference[2]
        assert 0.5 <= took < 3.0
        assert "no answer" in caplog.text
        daemon.signal(signal.SIGCONT)
        _until_kept(engine, prompts[2], reference[2])
        from kvstrata.runtime.admin import AdminClient

        engine.ask([prompts[3]])
        with AdminClient(daemon.address) as admin:
            stats = admin.stats()
        assert stats["sessions"] == 1, "the session of before must have been replaced"
        assert stats["node"]["holds"] == 0


def test_private_daemon_killed_is_started_anew(engine_on, prompts, reference, tmp_path):
    extra = {"tiers": f"host:64MiB,disk:{tmp_path}:64MiB"}
    with engine_on(extra) as engine:
        engine.ask(prompts)
        engine.wait_idle()
        first = engine.connector.daemon_pid
        os.kill(first, signal.SIGKILL)
        engine.forget()
        assert engine.ask([prompts[2]])[0].tokens == reference[2]
        answer = _until_kept(engine, prompts[2], reference[2])
        assert sum(answer.tokens_from.values()) == 256
        assert engine.counters()["recovered_blocks"] == 7, "its disk tier has survived"
        assert engine.connector.daemon_pid not in {0, first}
        second = engine.connector.daemon_pid
    assert not Path("/proc", str(second)).exists()


def test_a_reset_that_the_daemon_missed_is_made_good(engine_on, prompts, reference, daemon):
    """The weights may have changed meanwhile: no block of before may come back."""
    with engine_on({"address": daemon.address}) as engine:
        engine.ask(prompts)
        engine.wait_idle()
        daemon.signal(signal.SIGKILL)
        engine.ask([prompts[3]])
        assert engine.llm.reset_prefix_cache(reset_connector=True), "else vLLM stays paused"
        assert engine.connector._scheduler._clear_owed
        daemon.start()
        scheduler = engine.connector._scheduler
        deadline = time.monotonic() + 30
        while scheduler._clear_owed and time.monotonic() < deadline:
            engine.forget()
            answer = engine.ask([prompts[2]])[0]
            assert answer.tokens == reference[2]
            assert answer.tokens_from == {"host": 0, "disk": 0}
        assert not scheduler._clear_owed
        counters = engine.counters()
        assert counters["recovered_blocks"] == 7
        assert counters["hit_blocks_staged"] == 0
        _until_kept(engine, prompts[2], reference[2])


def test_flipped_byte_on_disk_is_a_miss(engine_on, prompts, reference, tmp_path):
    extra = {"tiers": f"host:64MiB,disk:{tmp_path}:64MiB"}
    with engine_on(extra) as engine:
        engine.ask([prompts[2]])
        engine.wait_idle()
    flipped = _flip_block(tmp_path / SLAB_NAME, index=1)
    assert flipped
    with engine_on(extra) as engine:
        answer = engine.ask([prompts[2]])[0]
        assert answer.tokens == reference[2]
        assert answer.tokens_from == {"host": 0, "disk": 64}, "block 1 and what hangs on it"
        assert engine.counters()["corrupt_blocks"] == 1
        engine.wait_idle()
        engine.forget()
        again = engine.ask([prompts[2]])[0]
        assert again.tokens == reference[2]
        assert sum(again.tokens_from.values()) == 256, "recomputed and kept again"


def _flip_block(path: Path, index: int) -> bool:
    """Flip one bit in the payload of the chain's `index`-th block, found through the index."""
    from kvstrata.storage.entry import ENTRY_BYTES, decode_entry

    data = bytearray(path.read_bytes())
    slots, stride, block = (int.from_bytes(data[at : at + 8], "little") for at in (28, 36, 44))
    lines = range(4096, 4096 + slots * ENTRY_BYTES, ENTRY_BYTES)
    found = [
        decode_entry(bytes(data[at : at + ENTRY_BYTES]), slot, block)
        for slot, at in enumerate(lines)
    ]
    entries = {entry.parent: entry for entry in found if entry}
    entry = entries[None]
    for _ in range(index):
        entry = entries[entry.key]
    base = -(-(4096 + slots * ENTRY_BYTES) // 4096) * 4096
    with path.open("r+b") as file:
        file.seek(base + entry.slot * stride + block // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))
    return True


def test_slot_reused_under_the_copy_is_recomputed(engine_on, prompts, reference, monkeypatch):
    """vLLM's policy is left at its default, fail: a cache must not fail a request."""
    from kvstrata.connectors.vllm.worker import WorkerHalf

    with engine_on({"tiers": "host:64MiB"}) as engine:
        engine.ask(prompts)
        engine.forget()
        real_load = WorkerHalf.load

        def load(self, plan):
            self._follow(plan)
            for job in plan.loads:
                self._arena.generations[job.copy.slots[2]] += 1  # as if given out meanwhile
            real_load(self, plan)

        with monkeypatch.context() as patch:
            patch.setattr(WorkerHalf, "load", load)
            answer = engine.ask([prompts[2]])[0]
    assert answer.tokens == reference[2]
    assert answer.tokens_from == {"host": 64, "disk": 0}, "the good part of the prefix is kept"


def test_unmappable_arena_means_no_cache(engine_on, prompts, reference, monkeypatch, caplog):
    from kvstrata.core.errors import DaemonGoneError
    from kvstrata.storage.arena import Arena

    def attach(*_):
        raise DaemonGoneError("cannot map")

    with engine_on({"tiers": "host:64MiB"}) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(Arena, "attach", attach)
            for _ in range(2):
                assert [each.tokens for each in engine.ask(prompts)] == reference
                engine.forget()
        assert engine.counters()["stored_blocks"] == 0
    assert "cannot map" in caplog.text


def test_a_worker_that_can_load_nothing_holds_up_no_request(engine_on, prompts, reference):
    """vLLM asks again whenever nothing of a load arrived; somebody has to stop."""
    with engine_on({"tiers": "host:64MiB"}) as engine:
        engine.ask(prompts)
        engine.forget()
        tried = []
        engine.worker._load = lambda job: tried.append(job.request) or job.copy.pages
        answers = engine.ask(prompts)
        assert [answer.tokens for answer in answers] == reference
        assert max(map(tried.count, tried)) == 2
        assert sum(sum(answer.tokens_from.values()) for answer in answers) == 0
