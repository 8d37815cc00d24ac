"""Blocks to and from keyed stores: what is not exactly the block is never called loaded."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.base import MemoryRegion
from kvstrata.storage.codecs import CodecSettings, make_chain
from kvstrata.storage.directory import DirectoryLimits, DirectoryStore
from kvstrata.storage.envelope import HEADER_BYTES, decode_envelope, encode_envelope
from kvstrata.storage.seal import seal
from kvstrata.testing.keyed import (
    DelayedKeyedStore,
    FaultyKeyedStore,
    KeyedFaults,
    MemoryKeyedStore,
)
from kvstrata.transfer.backends.keyed import (
    KeyedBackend,
    KeyedEnd,
    KeyedOp,
    KeyedResult,
)
from kvstrata.transfer.base import Outcome

LENGTH = 6000
LAYOUT = BlockLayout((Dimension("channel", LENGTH // 2),), "float16", 8, "test")
PRINT = LAYOUT.fingerprint
BLOCKS = 8
KEYS = [random.Random(number).randbytes(16) for number in range(BLOCKS)]
DATA = random.Random(77).randbytes(BLOCKS * LENGTH)
SECRET = bytes(range(32))


def encoded(text):
    for module in ("zstandard", "cryptography", "ml_dtypes") if text != "none" else ():
        pytest.importorskip(module, reason=f"no {module} installed (kvstrata[codecs])")
    return make_chain(text, CodecSettings("float16", SECRET))


def end_of(store, chain=None):
    return KeyedEnd(store, chain or make_chain("none", CodecSettings("float16")), PRINT)


def memory(data=bytes(BLOCKS * LENGTH)):
    return MemoryRegion(memoryview(bytearray(data)))


def plan(numbers=range(BLOCKS), **more):
    return [
        KeyedOp(KEYS[n], n * LENGTH, LENGTH, place, parent=KEYS[n - 1] if n else None, **more)
        for place, n in enumerate(numbers)
    ]


@pytest.fixture
def backend():
    backend = KeyedBackend(threads=8)
    yield backend
    backend.close()


def run(backend, ops, source, target, name=1):
    assert backend.submit(name, ops, source, target)
    deadline = time.monotonic() + 20
    while not (found := backend.poll()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    [completion] = found
    return completion


def write(backend, end, ops=None, data=DATA):
    done = run(backend, ops or plan(), memory(data), end)
    assert done.outcome is Outcome.DONE, done
    return done


def read(backend, end, ops=None):
    target = memory()
    done = run(backend, ops or plan(), end, target)
    return done, bytes(target.view)


def results(end):
    return [end.answers[place].result for place in sorted(end.answers)]


class TestRoundTrip:
    def test_header_and_payload(self, backend):
        end = end_of(MemoryKeyedStore())
        seals = [seal(KEYS[n] + PRINT, DATA[n * LENGTH :][:LENGTH]) for n in range(BLOCKS)]
        ops = [replace(op, seal=seals[op.first], namespace=b"n" * 8) for op in plan()]
        write(backend, end, ops)
        assert results(end) == [KeyedResult.CREATED] * BLOCKS
        block = end.store.blocks[KEYS[2]]
        header = decode_envelope(block[:HEADER_BYTES])
        assert (header.key, header.parent, header.seal) == (KEYS[2], KEYS[1], seals[2])
        assert (header.fingerprint, header.codec, header.namespace) == (PRINT, "none", b"n" * 8)
        assert block[HEADER_BYTES:] == DATA[2 * LENGTH : 3 * LENGTH]
        done, found = read(backend, end)
        assert done.outcome is Outcome.DONE
        assert found == DATA
        assert [end.answers[n].envelope.seal for n in range(BLOCKS)] == seals
        assert end.answers[0].envelope.parent is None

    def test_what_is_there_is_not_written_again(self, backend):
        end = end_of(MemoryKeyedStore())
        write(backend, end)
        write(backend, end, data=bytes(len(DATA)))
        assert results(end) == [KeyedResult.EXISTED] * BLOCKS
        assert read(backend, end)[1] == DATA
        assert (backend.statistics().created, backend.statistics().existed) == (BLOCKS, BLOCKS)

    def test_a_miss_fails_its_op_alone(self, backend):
        end = end_of(MemoryKeyedStore())
        write(backend, end, plan([0, 1, 3]))
        done, found = read(backend, end)
        assert done.failed_ops == (2, 4, 5, 6, 7)
        assert results(end)[2:4] == [KeyedResult.MISSED, KeyedResult.LOADED]
        assert found[: 2 * LENGTH] == DATA[: 2 * LENGTH]
        assert not any(found[2 * LENGTH : 3 * LENGTH])

    def test_a_full_store_is_no_error_and_says_so(self, backend):
        end = end_of(MemoryKeyedStore(capacity_bytes=3 * (LENGTH + HEADER_BYTES)))
        done = run(backend, plan(), memory(DATA), end)
        assert len(done.failed_ops) == BLOCKS - 3
        full = [answer for answer in end.answers.values() if answer.result is KeyedResult.FULL]
        assert len(full) == BLOCKS - 3
        assert all(answer.retryable for answer in full)

    @pytest.mark.parametrize("writer", ["none", "zstd", "zstd+aes"])
    @pytest.mark.parametrize("reader", ["none", "zstd", "aes"])
    def test_readers_and_writers_of_other_chains(self, backend, writer, reader):
        """Noise: every encoding of it is longer than the block itself."""
        store = MemoryKeyedStore()
        write(backend, end_of(store, encoded(writer)))
        end = end_of(store, encoded(reader))
        done, found = read(backend, end)
        if reader == "aes" and "aes" not in writer:
            assert set(results(end)) == {KeyedResult.REFUSED}
            assert len(store.blocks) == BLOCKS
        else:
            assert done.outcome is Outcome.DONE
            assert found == DATA

    def test_a_lossy_block_is_sealed_as_it_comes_back(self, backend):
        end = end_of(MemoryKeyedStore(), encoded("fp8+zstd"))
        data = bytes(each & 0x3F for each in DATA)  # no NaN among them
        host = seal(KEYS[0] + PRINT, data[:LENGTH])
        write(backend, end, [replace(op, seal=host) for op in plan([0])], data)
        done, found = read(backend, end, plan([0]))
        assert done.outcome is Outcome.DONE
        recorded = end.answers[0].envelope.seal
        assert recorded == seal(KEYS[0] + PRINT, found[:LENGTH]) != host

    def test_values_that_a_codec_cannot_hold_fail_their_op(self, backend):
        end = end_of(MemoryKeyedStore(), encoded("fp8"))
        data = bytes(each & 0x3F for each in DATA[:LENGTH]) + b"\xff" * LENGTH
        done = run(backend, plan([0, 1]), memory(data), end)
        assert done.failed_ops == (1,)
        assert "NaN" in done.reason
        assert list(end.store.blocks) == [KEYS[0]]


class TestNeverTheWrongBlock:
    @pytest.mark.parametrize("chain", ["none", "zstd", "zstd+aes"])
    def test_every_kind_of_flip_is_found_deleted_and_healed(self, backend, chain):
        luck = random.Random(5)
        store = MemoryKeyedStore()
        end = end_of(store, encoded(chain))
        write(backend, end, plan([0]))
        whole = store.blocks[KEYS[0]]
        for turn in range(200):
            spoilt = bytearray(whole)
            if turn % 4 == 3:
                del spoilt[luck.randrange(len(spoilt)) :]
            else:
                at = luck.randrange(HEADER_BYTES if turn % 4 else len(spoilt))
                spoilt[at] ^= 1 << luck.randrange(8)
            store.blocks[KEYS[0]] = bytes(spoilt)
            done, _ = read(backend, end, plan([0]))
            assert done.failed_ops == (0,)
            result = end.answers[0].result
            assert result in {KeyedResult.DAMAGED, KeyedResult.REFUSED}
            assert (KEYS[0] in store.blocks) is (result is KeyedResult.REFUSED)
            store.blocks[KEYS[0]] = whole
        found = backend.statistics()
        assert found.damaged + found.refused == 200
        assert found.refused < 20, "a flip in the version reads as a newer one"
        store.blocks.clear()
        write(backend, end, plan([0]))
        assert read(backend, end, plan([0]))[0].outcome is Outcome.DONE

    def test_a_whole_block_under_another_key(self, backend):
        store = MemoryKeyedStore()
        end = end_of(store)
        write(backend, end)
        store.blocks[KEYS[0]] = store.blocks[KEYS[1]]
        assert read(backend, end, plan([0]))[0].failed_ops == (0,)
        assert end.answers[0].result is KeyedResult.DAMAGED
        assert end.answers[0].reason.endswith("another block's key")

    def test_a_whole_payload_under_another_header(self, backend):
        """A header with a right CRC that claims a payload which is not its own."""
        store = MemoryKeyedStore()
        end = end_of(store)
        write(backend, end)
        mine, theirs = store.blocks[KEYS[0]], store.blocks[KEYS[1]]
        store.blocks[KEYS[0]] = mine[:HEADER_BYTES] + theirs[HEADER_BYTES:]
        assert read(backend, end, plan([0]))[0].failed_ops == (0,)
        assert end.answers[0].reason.endswith("payload differs from its seal")

    @pytest.mark.parametrize(
        ("change", "result"),
        [
            ({"fingerprint": b"x" * 16}, KeyedResult.DAMAGED),
            ({"raw_bytes": LENGTH - 1, "stored_bytes": LENGTH - 1}, KeyedResult.DAMAGED),
            ({"seal": b"s" * 16}, KeyedResult.DAMAGED),
            ({"tenant": b"somebody"}, KeyedResult.REFUSED),
            ({"namespace": b"anothers"}, KeyedResult.REFUSED),
            ({"codec": "lzma"}, KeyedResult.REFUSED),
        ],
    )
    def test_a_header_that_says_something_else(self, backend, change, result):
        store = MemoryKeyedStore()
        end = end_of(store)
        write(backend, end, plan(tenant=b"tenant-1", namespace=b"spacename"[:8]))
        block = store.blocks[KEYS[0]]
        header = replace(decode_envelope(block[:HEADER_BYTES]), **change)
        store.blocks[KEYS[0]] = encode_envelope(header) + block[HEADER_BYTES:]
        ops = plan([0], tenant=b"tenant-1", namespace=b"spacename"[:8])
        assert read(backend, end, ops)[0].failed_ops == (0,)
        assert end.answers[0].result is result
        assert (KEYS[0] in store.blocks) is (result is KeyedResult.REFUSED)

    @given(st.binary(max_size=2 * LENGTH))
    def test_any_bytes_under_a_key(self, data):
        store = MemoryKeyedStore()
        store.blocks[KEYS[0]] = data
        with_threads = KeyedBackend(threads=1)
        done, _ = read(with_threads, end_of(store), plan([0]))
        with_threads.close()
        assert done.failed_ops == (0,)

    def test_damage_on_the_way_is_read_again_and_not_deleted(self, backend):
        inner = MemoryKeyedStore()
        write(backend, end_of(inner))
        store = FaultyKeyedStore(inner, KeyedFaults(flip=0.2, cut=0.1), random.Random(8))
        end = end_of(store)
        loaded = damaged = 0
        for _ in range(60):
            done, found = read(backend, end)
            for n in range(BLOCKS):
                if n not in done.failed_ops:
                    assert found[n * LENGTH :][:LENGTH] == DATA[n * LENGTH :][:LENGTH]
                    loaded += 1
            damaged += results(end).count(KeyedResult.DAMAGED)
            write(backend, end_of(inner))
        assert damaged > 0
        assert backend.statistics().read_again > damaged
        assert loaded > 300

    def test_a_store_that_fails_fails_ops_and_changes_nothing(self, backend):
        inner = MemoryKeyedStore()
        end = end_of(FaultyKeyedStore(inner, KeyedFaults(fail=0.5), random.Random(2)))
        for name in range(50):
            done = run(backend, plan(), memory(DATA), end, name)
            for place in done.failed_ops:
                assert end.answers[place].result is KeyedResult.FAILED
                assert end.answers[place].retryable
        assert all(inner.blocks[KEYS[n]][HEADER_BYTES:] == DATA[n * LENGTH :][:LENGTH]
                   for n in range(BLOCKS))  # fmt: skip
        assert 100 < backend.statistics().failed < 300


class TestConcurrency:
    def test_the_blocks_of_one_transfer_move_side_by_side(self, backend):
        store = DelayedKeyedStore(MemoryKeyedStore(), 0.0, random.Random(1))
        store._wait = lambda: time.sleep(0.1)
        begun = time.monotonic()
        write(backend, end_of(store))
        assert time.monotonic() - begun < 0.5, "eight times 0.1 s, on eight threads"

    def test_a_cancelled_transfer_ends_soon(self):
        store = DelayedKeyedStore(MemoryKeyedStore(), 0.0, random.Random(1))
        store._wait = lambda: time.sleep(0.05)
        told = threading.Event()
        backend = KeyedBackend(threads=1, notify=told.set)
        end = end_of(store)
        backend.submit(1, plan() * 20, memory(DATA), end)
        time.sleep(0.02)
        backend.cancel(1)
        assert told.wait(2)
        [done] = backend.poll()
        assert done.outcome is Outcome.CANCELLED
        assert done.failed_ops == tuple(range(160))
        backend.close()

    def test_threads_have_names_and_end(self):
        backend = KeyedBackend(threads=3)
        names = {thread.name for thread in threading.enumerate()}
        assert {f"kvstrata-keyed-{index}" for index in range(3)} <= names
        backend.close()
        assert not any(t.name.startswith("kvstrata-keyed") for t in threading.enumerate())

    def test_a_store_that_hangs_does_not_hold_close_for_ever(self):
        store, asked, free = MemoryKeyedStore(), threading.Event(), threading.Event()

        def hang(*_arguments):
            asked.set()
            free.wait(20)

        store.get = hang
        backend = KeyedBackend(threads=2, close_timeout_s=0.2)
        backend.submit(1, plan(), end_of(store), memory())
        assert asked.wait(10)
        begun = time.monotonic()
        backend.close()
        assert 0.1 < time.monotonic() - begun < 2
        assert backend.poll() == []
        free.set()
        deadline = time.monotonic() + 10
        while not (found := backend.poll()):
            assert time.monotonic() < deadline
        assert found[0].outcome is Outcome.CANCELLED

    def test_two_ends_that_are_no_store_fail(self, backend):
        done = run(backend, plan(), memory(DATA), memory())
        assert len(done.failed_ops) == BLOCKS

    def test_a_bug_in_a_store_is_a_failed_op_and_no_dead_worker(self, backend, caplog):
        store = MemoryKeyedStore()
        store.get = lambda *_: 1 / 0
        done, _ = read(backend, end_of(store))
        assert done.failed_ops == tuple(range(BLOCKS))
        assert "ZeroDivisionError" in done.reason
        assert "unexpectedly" in caplog.text
        del store.get
        write(backend, end_of(store))


class TestRealStores:
    def test_a_directory(self, backend, tmp_path):
        store = DirectoryStore.open(
            str(tmp_path), 1 << 30, LAYOUT, limits=DirectoryLimits(collect_interval_s=None)
        )
        end = end_of(store)
        write(backend, end)
        assert read(backend, end)[1] == DATA
        [path] = tmp_path.rglob(f"{KEYS[3].hex()}.kv")
        with path.open("r+b") as file:
            file.seek(5000)
            file.write(b"\xff\x00\xff")
        done, _ = read(backend, end)
        assert done.failed_ops == (3,)
        assert not path.exists()
        store.close()

    def test_an_s3_server(self, backend, s3_url):
        from kvstrata.storage.objects import ObjectStore

        store = ObjectStore.open(s3_url, LAYOUT)
        end = end_of(store, encoded("zstd+aes"))
        write(backend, end)
        other = end_of(ObjectStore.open(s3_url, LAYOUT), encoded("zstd+aes"))
        assert read(backend, other)[1] == DATA
        store.delete([KEYS[1]])
        assert read(backend, other)[0].failed_ops == (1,)
        assert other.answers[1].result is KeyedResult.MISSED
