"""The object store against a Ceph RGW: its laws, its refusals, and a gateway killed or stopped."""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest

from kvstrata.core.errors import ConfigError, TransferError
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.base import MemoryRegion
from kvstrata.storage.envelope import HEADER_BYTES
from kvstrata.storage.keyed import PutAnswer
from kvstrata.testing.contracts.keyed_store import KeyedStoreContract
from kvstrata.transfer.base import Outcome

LENGTH = 1 << 20
LAYOUT = BlockLayout((Dimension("channel", LENGTH // 2),), "bfloat16", 8, "test")
HEADER = random.Random(0).randbytes(HEADER_BYTES)
PAYLOAD = memoryview(random.Random(1).randbytes(LENGTH))
TIMEOUT_S = 1.5
SECRET = "hunter2hunter2hunter2"
RATIO_MIN = 0.5  # machines are shared: this finds a path that has broken, not one that is slow
RUNS_MAX = 3


def key(number):
    return random.Random(number).randbytes(16)


def read(store, number):
    header, into = bytearray(HEADER_BYTES), bytearray(LENGTH)
    found = store.get(key(number), memoryview(header), memoryview(into))
    return None if found is None else (bytes(header), bytes(into[:found]))


def timed(call):
    begun = time.monotonic()
    with pytest.raises((TransferError, ConfigError)) as caught:
        call()
    assert time.monotonic() - begun < TIMEOUT_S + 0.5
    return caught.value


@pytest.fixture
def open_store(rgw_url):
    from kvstrata.storage.objects import ObjectStore

    return lambda: ObjectStore.open(rgw_url, LAYOUT, timeout_s=TIMEOUT_S)


@pytest.fixture
def gateway(ceph_server):
    """The server, whose gateway works again after the test whatever was done to it."""
    yield ceph_server
    ceph_server.gateway.close()
    ceph_server.start_gateway()


class TestObjectsOfCeph(KeyedStoreContract):
    @pytest.fixture
    def open_store(self, rgw_url):
        from kvstrata.storage.objects import ObjectStore

        return lambda: ObjectStore.open(rgw_url, LAYOUT)

    def test_it_says_that_conditions_are_honoured(self, store):
        assert store.exclusive


class TestRefusals:
    def test_a_wrong_secret(self, monkeypatch, open_store):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        error = timed(open_store)
        assert "SignatureDoesNotMatch" in str(error)
        assert "environment" in error.hint
        assert SECRET not in "".join(traceback.format_exception(error))

    def test_an_unknown_user(self, monkeypatch, open_store):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NOBODY")
        error = timed(open_store)
        assert "InvalidAccessKeyId" in str(error)
        assert "environment" in error.hint

    def test_a_missing_bucket(self, rgw_url):
        from kvstrata.storage.objects import ObjectStore

        url = rgw_url.replace("s3://kvstrata-test", "s3://nobody")
        error = timed(lambda: ObjectStore.open(url, LAYOUT, timeout_s=TIMEOUT_S))
        assert "bucket" in str(error)
        assert "create" in error.hint

    def test_a_thousand_and_one_are_deleted(self, open_store):
        store = open_store()
        keys = [key(number) for number in range(1001)]
        for each in (keys[0], keys[-1]):
            store.put(each, HEADER, PAYLOAD)
        store.delete(keys)
        assert list(store.entries()) == []


class TestFailures:
    def test_a_killed_gateway_is_an_error_and_its_next_life_has_the_blocks(
        self, gateway, open_store
    ):
        store = open_store()
        store.put(key(1), HEADER, PAYLOAD)
        gateway.gateway.close()  # kill -9
        assert timed(lambda: read(store, 1)).retryable
        assert timed(lambda: store.put(key(2), HEADER, PAYLOAD)).retryable
        assert timed(open_store).hint
        gateway.start_gateway()
        assert read(store, 1) == (HEADER, bytes(PAYLOAD))
        assert read(store, 2) is None

    def test_a_stopped_gateway_keeps_nobody_past_the_deadline(self, gateway, open_store):
        store = open_store()
        store.put(key(1), HEADER, PAYLOAD)
        gateway.gateway.signal(signal.SIGSTOP)
        assert timed(lambda: read(store, 1)).retryable
        assert timed(lambda: store.put(key(2), HEADER, PAYLOAD)).retryable
        assert timed(open_store).hint
        gateway.gateway.signal(signal.SIGCONT)
        assert read(store, 1) == (HEADER, bytes(PAYLOAD))
        # Whether the put arrived is open, and it says so: there whole, or not there.
        assert read(store, 2) in (None, (HEADER, bytes(PAYLOAD)))
        assert store.put(key(3), HEADER, PAYLOAD) is PutAnswer.CREATED

    def test_blocks_in_flight_when_it_is_killed_are_whole_or_not_there(self, gateway, open_store):
        """Through the mover, as a node does it: each block's answer is true, and none is torn."""
        store, count = open_store(), 48
        memory = MemoryRegion(memoryview(mmap.mmap(-1, LENGTH * count)))
        memory.view[:] = random.Random(7).randbytes(len(memory.view))
        told = threading.Event()
        mover = _Mover(store, memory, count, told)
        mover.start(write=True)
        while store.statistics().created < 8:
            time.sleep(0.001)
        gateway.gateway.close()
        completion = mover.wait()
        assert completion.outcome is Outcome.FAILED
        written = [place for place in range(count) if place not in completion.failed_ops]
        assert written
        gateway.start_gateway()
        kept = bytes(memory.view)
        memory.view[:] = bytes(len(memory.view))
        mover.start(write=False)
        loaded = mover.wait()
        there = [place for place in range(count) if place not in loaded.failed_ops]
        assert set(written) <= set(there), "a block that was said to be written is gone"
        for place in there:
            part = slice(place * LENGTH, (place + 1) * LENGTH)
            assert memory.view[part] == kept[part]
        assert mover.backend.statistics().damaged == 0
        mover.backend.close()


class _Mover:
    """The product's way of moving blocks `key(100 + place)` at `place` of a memory region."""

    def __init__(self, store, memory, count, told):
        from kvstrata.storage.codecs import CodecSettings, make_chain
        from kvstrata.transfer.backends.keyed import KeyedBackend, KeyedEnd, KeyedOp

        self.memory, self.told, self.name = memory, told, 0
        self.backend = KeyedBackend(threads=8, notify=told.set)
        chain = make_chain("none", CodecSettings("bfloat16"))
        self.end = lambda: KeyedEnd(store, chain, LAYOUT.fingerprint)
        self.ops = [
            KeyedOp(key(100 + place), place * LENGTH, LENGTH, place) for place in range(count)
        ]

    def start(self, *, write):
        self.name += 1
        self.told.clear()
        ends = (self.memory, self.end()) if write else (self.end(), self.memory)
        assert self.backend.submit(self.name, self.ops, *ends)

    def wait(self):
        assert self.told.wait(30), "nobody may wait for a dead server"
        (completion,) = self.backend.poll()
        return completion


@pytest.mark.usefixtures("rgw_url")
def test_putting_and_getting_keeps_up_with_the_bare_client(ceph_server, tmp_path, capsys):
    """`bench/objects.py` in short; the numbers of full runs are in `bench/results`.

    One round a run, so a busy moment can halve a ratio; a path that has broken is slow each time.
    """
    script = Path(__file__).parents[2] / "bench" / "objects.py"
    told = tmp_path / "told.json"
    command = [sys.executable, script, "--url", ceph_server.url, "--quick", "--json", told]
    best: dict[str, float] = {}
    for _ in range(RUNS_MAX):
        subprocess.run(command, check=True, capture_output=True, timeout=60, env=dict(os.environ))
        for each in json.loads(told.read_text())["paths"]:
            best[each["name"]] = max(each["ratio"], best.get(each["name"], 0.0))
        with capsys.disabled():
            sys.stdout.write(f"\nours over the bare client, best so far: {best}\n")
        if min(best.values()) >= RATIO_MIN:
            return
    raise AssertionError(f"below {RATIO_MIN} in each of {RUNS_MAX} runs: {best}")
