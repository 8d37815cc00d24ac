"""Stores of other packages: what is refused at the start, and what none of them can do to us."""

from __future__ import annotations

import os
import threading
import time

import pytest

from kvstrata.core.config import NodeConfig, TierConfig, parse_tiers
from kvstrata.core.errors import ChecksumError, ConfigError, TransferError
from kvstrata.core.ids import SequenceHash
from kvstrata.core.tier import Admission, TierKind
from kvstrata.runtime.secret import load_secret
from kvstrata.storage import checked
from kvstrata.storage.checked import CheckedStore
from kvstrata.storage.deadline import HelperThreads
from kvstrata.storage.envelope import HEADER_BYTES
from kvstrata.storage.keyed import KeyedEntry, PutAnswer
from kvstrata.storage.plugged import check_plugged, open_plugged
from kvstrata.testing.contracts.keyed_store import KeyedStoreContract, fresh_request
from kvstrata.testing.keyed import MemoryKeyedStore

KEY = SequenceHash(bytes(16))
HEADER = bytes(range(HEADER_BYTES % 256)) + bytes(HEADER_BYTES - HEADER_BYTES % 256)
PAYLOAD = memoryview(bytes(range(250)) * 4)

VENDOR = """
import time
from kvstrata.core.errors import ConfigError
from kvstrata.testing.keyed import MemoryKeyedStore

class Good(MemoryKeyedStore):
    def __init__(self, request):
        super().__init__()
        assert request.url and request.capacity_bytes and request.timeout_s

    @staticmethod
    def check(url):
        if url == "bad":
            raise ConfigError("vendor: no such place", hint="try good")
        if url == "worse":
            raise KeyError("worse")

class Empty:
    def __init__(self, request):
        pass

class Wide(Good):
    def get(self, key, header):
        pass

class Vague(Good):
    exclusive = "yes"

class Negative(Good):
    @property
    def capacity_bytes(self):
        return -1
    @capacity_bytes.setter
    def capacity_bytes(self, value):
        pass

def refuses(request):
    raise ConfigError("vendor: no server", hint="start one")

def raises(request):
    raise LookupError("what")

def leaves(request):
    raise SystemExit(3)

def hangs(request):
    time.sleep(20)

number = 7
"""
NAMES = (
    *("Good", "Empty", "Wide", "Vague", "Negative"),
    *("refuses", "raises", "leaves", "hangs", "number", "absent"),
)


def install(folder, package, names, module="vendor_stores"):
    info = folder / f"{package.replace('-', '_')}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
    lines = [f"{name.lower()} = {module}:{name}" for name in names]
    (info / "entry_points.txt").write_text("\n".join(["[kvstrata.stores]", *lines, ""]))


@pytest.fixture
def vendor(tmp_path, monkeypatch):
    """Packages beside ours, as pip would leave them."""
    (tmp_path / "vendor_stores.py").write_text(VENDOR)
    (tmp_path / "vendor_broken.py").write_text("import a_library_that_is_not_there\n")
    (tmp_path / "vendor_exits.py").write_text("raise SystemExit(1)\n")
    install(tmp_path, "vendor-kv", NAMES)
    install(tmp_path, "vendor-broken", ["Broken"], "vendor_broken")
    install(tmp_path, "vendor-exits", ["Exits"], "vendor_exits")
    install(tmp_path, "vendor-one", ["Twice"])
    install(tmp_path, "vendor-two", ["Twice"])
    monkeypatch.syspath_prepend(tmp_path)


class TestGrammar:
    def test_name_url_size_codec_way(self):
        text = "host:1GiB,store:my-kv:scheme://h:1/p?x=y:2GiB:zstd:on-evict"
        assert parse_tiers(text)[1] == TierConfig(
            TierKind.STORE,
            2 << 30,
            admission=Admission.ON_EVICT,
            url="scheme://h:1/p?x=y",
            codec="zstd",
            plugin="my-kv",
        )

    @pytest.mark.parametrize("text", ["store:1GiB", "store:a:1GiB", "store::u:1GiB", "store:A:u:1"])
    def test_what_lacks_a_part_is_refused(self, text):
        with pytest.raises(ConfigError, match=r"tiers\.store") as refusal:
            parse_tiers(f"host:1GiB,{text}")
        assert "store:redis:redis://HOST" in refusal.value.hint


@pytest.mark.usefixtures("vendor")
class TestOpening:
    def test_a_good_one(self):
        check_plugged("good", "anywhere")
        store = open_plugged("good", fresh_request("anywhere"))
        assert store.put(KEY, HEADER, PAYLOAD) is PutAnswer.CREATED
        store.close()

    def test_an_unknown_name_lists_what_is_installed(self):
        with pytest.raises(ConfigError, match="unknown store 'redsi'") as refusal:
            check_plugged("redsi", "u")
        assert "good" in refusal.value.hint
        assert "pip install" in refusal.value.hint
        assert "kvstrata.stores" in refusal.value.hint

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("broken", r"'broken' of vendor-broken 1\.5 .*a_library_that_is_not_there"),
            ("exits", r"'exits' of vendor-exits 1\.5 .* cannot be imported: SystemExit"),
            ("absent", r"'absent' of vendor-kv 1\.5 .* cannot be imported"),
            ("number", r"'number' of vendor-kv 1\.5 .* is a int and cannot be called"),
            ("twice", r"'twice' is offered by vendor-one 1\.5 and vendor-two 1\.5"),
        ],
    )
    def test_what_cannot_be_loaded_is_told_at_the_start(self, name, words):
        with pytest.raises(ConfigError, match=words) as refusal:
            check_plugged(name, "u")
        assert refusal.value.hint

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("empty", r"vendor-kv 1\.5 .* returned a Empty, which has no put, get, .*close"),
            ("wide", r"returned a Wide whose get does not take 3 arguments"),
            ("vague", r"returned a Vague whose exclusive is str"),
            ("negative", r"whose capacity_bytes is neither None nor"),
            ("refuses", "vendor: no server"),
            ("raises", r"vendor-kv 1\.5 .* cannot open its store: LookupError: what"),
            ("leaves", r"cannot open its store: SystemExit: 3"),
        ],
    )
    def test_what_is_no_store_is_refused_when_it_is_opened(self, name, words):
        with pytest.raises(ConfigError, match=words) as refusal:
            open_plugged(name, fresh_request("u"))
        assert refusal.value.hint

    def test_one_that_does_not_come_back_is_refused_in_time(self):
        began = time.monotonic()
        with pytest.raises(ConfigError, match="does not open its store: no answer"):
            open_plugged("hangs", fresh_request("u", timeout_s=0.1))
        assert time.monotonic() - began < 5

    def test_its_own_check_of_the_url(self):
        with pytest.raises(ConfigError, match="vendor: no such place"):
            check_plugged("good", "bad")
        with pytest.raises(ConfigError, match=r"vendor-kv 1\.5 .* refuses its URL: KeyError"):
            check_plugged("good", "worse")

    def test_a_password_in_the_url_is_refused_and_not_repeated(self):
        with pytest.raises(ConfigError, match="carries a password") as refusal:
            check_plugged("good", "redis://me:hunter2@host:1")
        assert "hunter2" not in str(refusal.value)


def test_a_store_tier_needs_a_secret_that_outlives_the_daemon(tmp_path):
    tiers = parse_tiers("host:1MiB,store:good:anywhere:1MiB")
    with pytest.raises(ConfigError, match="a store tier needs a secret that outlives") as refusal:
        load_secret(NodeConfig(tiers))
    assert "--secret-file" in refusal.value.hint
    (tmp_path / "secret").write_bytes(bytes(32))
    assert load_secret(NodeConfig(tiers, secret_file=str(tmp_path / "secret"))) == bytes(32)


class Odd(MemoryKeyedStore):
    """Does what it is told to do: `deed` maps a method to what it does in its place."""

    def __init__(self, **deeds):
        super().__init__()
        self.__dict__.update(deeds)


@pytest.fixture
def wrapped(monkeypatch):
    """Wrap stores with a deadline of 0.2 s; each is closed with the test."""
    monkeypatch.setattr(checked, "_GRACE_S", 0.0)
    made = []

    def wrap(store, threads_max=64):
        threads = HelperThreads("test", threads_max)
        made.append(CheckedStore(store, "store odd", timeout_s=0.2, threads=threads))
        return made[-1]

    yield wrap
    for each in made:
        each.close()


def say(answer):
    return lambda *_: answer


def throw(error):
    def deed(*_):
        raise error

    return deed


CALLS = {
    "put": lambda store: store.put(KEY, HEADER, PAYLOAD),
    "get": lambda store: store.get(KEY, memoryview(bytearray(256)), memoryview(bytearray(999))),
    "peek": lambda store: store.peek(KEY),
    "exists": lambda store: store.exists([KEY, KEY]),
    "delete": lambda store: store.delete([KEY]),
    "entries": lambda store: list(store.entries()),
}


class UnspeakableError(Exception):
    def __str__(self):
        raise ValueError("no words")


class TestContract(KeyedStoreContract):
    """The wrapper passes its seam's suite."""

    durable = False

    @pytest.fixture
    def open_store(self):
        return lambda: CheckedStore(
            MemoryKeyedStore(), "store memory", timeout_s=10, threads=HelperThreads("suite")
        )


class TestAnswers:
    @pytest.mark.parametrize(
        ("call", "answer"),
        [
            *[("put", each) for each in (None, True, "created", 1)],
            *[("get", each) for each in (-1, 1000, True, 1.0, "9", b"")],
            *[("peek", each) for each in (bytes(257), "text", bytearray(256), 1)],
            *[("exists", each) for each in (None, [True], [True] * 3, (True, True), [1, 0], "ab")],
            *[("entries", each) for each in (None, 7)],
        ],
    )
    def test_what_can_be_no_answer_is_a_counted_error(self, wrapped, call, answer):
        store = wrapped(Odd(**{call: say(answer)}))
        with pytest.raises(TransferError) as caught:
            CALLS[call](store)
        assert caught.value.retryable
        assert "store odd" in str(caught.value)
        found = store.statistics()
        assert (found.errors, found.invalid) == (1, call != "entries")
        assert found.created + found.hits + found.misses == 0

    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize(
        "error",
        [
            ConnectionError("gone"),
            SystemExit(1),
            KeyboardInterrupt(),
            MemoryError(),
            UnspeakableError(),
            ConfigError("too late"),
            StopIteration(),
            GeneratorExit(),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_errors_that_are_not_ours_become_ours(self, wrapped, call, error):
        store = wrapped(Odd(**{call: throw(error)}))
        with pytest.raises(TransferError) as caught:
            CALLS[call](store)
        assert caught.value.retryable, "nothing is known of the block"
        assert store.statistics().errors == 1
        assert store.put(KEY, HEADER, PAYLOAD) is PutAnswer.CREATED if call != "put" else True

    def test_our_own_errors_pass(self, wrapped):
        for error in (
            TransferError("no", retryable=False),
            TransferError("no", retryable=True),
            ChecksumError("no"),
        ):
            store = wrapped(Odd(get=throw(error)))
            with pytest.raises(type(error)) as caught:
                CALLS["get"](store)
            assert caught.value.retryable is error.retryable

    def test_entries_that_are_none_are_left_out_and_too_many_end_the_listing(self, wrapped):
        good = KeyedEntry(KEY, 300, 0.0)
        odd = [None, (KEY, 1, 0), KeyedEntry(b"x", 1, 0.0), KeyedEntry(KEY, -1, 0.0)]
        store = wrapped(Odd(entries=lambda: iter([*odd, good])))
        assert list(store.entries()) == [good]
        assert store.statistics().invalid == 4

        def endless():
            while True:
                yield None

        with pytest.raises(TransferError, match="of them are none"):
            list(wrapped(Odd(entries=endless)).entries())

    def test_statistics_never_ask_the_store_and_believe_only_numbers(self, wrapped):
        store = wrapped(Odd(statistics=say("none")))
        store.exists([KEY])
        assert store.statistics().errors == 0
        asked = []
        inner = Odd()
        inner.statistics = lambda: asked.append(threading.current_thread().name) or ()
        store = wrapped(inner)
        store.exists([KEY])
        store.statistics()
        assert asked
        assert all(name.startswith("kvstrata-test-") for name in asked)


class TestMemoryOfOurs:
    def test_a_payload_cannot_be_changed_or_kept(self, wrapped):
        kept = []

        def put(_key, _header, payload):
            kept.append(payload)
            with pytest.raises(TypeError):
                payload[0] = 1
            return PutAnswer.CREATED

        block = bytearray(PAYLOAD)
        wrapped(Odd(put=put)).put(KEY, HEADER, memoryview(block))
        block[:] = bytes(len(block))
        assert bytes(kept[0]) == bytes(PAYLOAD), "it holds a copy, and nothing of ours"

    def test_what_is_written_after_the_answer_changes_nothing(self, wrapped):
        kept = []

        def get(_key, header, payload):
            header[:] = HEADER
            payload[:4] = b"kv!\n"
            kept.extend([header, payload])
            return 4

        header, payload = memoryview(bytearray(HEADER_BYTES)), memoryview(bytearray(999))
        assert wrapped(Odd(get=get)).get(KEY, header, payload) == 4
        kept[0][:] = bytes(HEADER_BYTES)
        kept[1][:4] = b"evil"
        assert (bytes(header), bytes(payload[:4])) == (HEADER, b"kv!\n")

    def test_a_call_that_was_given_up_writes_nowhere(self, wrapped):
        go = threading.Event()

        def get(_key, _header, payload):
            go.wait(20)
            payload[:4] = b"late"
            return 4

        store = wrapped(Odd(get=get))
        payload = memoryview(bytearray(999))
        with pytest.raises(TransferError, match=r"no answer within 0\.2 s") as caught:
            store.get(KEY, memoryview(bytearray(HEADER_BYTES)), payload)
        assert caught.value.retryable
        go.set()
        store.close()
        assert bytes(payload[:4]) == bytes(4)


class TestDeadlines:
    def test_calls_that_hang_are_bounded_and_come_back(self, wrapped):
        go = threading.Event()
        store = wrapped(Odd(exists=lambda keys: go.wait(20) and [True] * len(keys)), threads_max=2)
        for _ in range(2):
            with pytest.raises(TransferError, match="no answer"):
                store.exists([KEY])
        began = time.monotonic()
        with pytest.raises(TransferError, match="2 calls have not ended") as caught:
            store.exists([KEY])
        assert caught.value.retryable
        assert time.monotonic() - began < 0.1, "refused at once"
        assert (store.statistics().late, store.statistics().errors) == (3, 3)
        go.set()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                assert store.exists([KEY]) == [True]
                break
            except TransferError:
                time.sleep(0.01)
        for _ in range(20):
            assert store.exists([KEY, KEY]) == [True, True]
        names = [each.name for each in threading.enumerate() if "kvstrata-test-" in each.name]
        assert len(names) <= 2

    def test_close_does_not_wait_for_what_hangs(self, wrapped):
        go = threading.Event()
        store = wrapped(Odd(exists=lambda _: go.wait(20), close=lambda: go.wait(20)))
        with pytest.raises(TransferError):
            store.exists([KEY])
        began = time.monotonic()
        store.close()
        assert time.monotonic() - began < 3
        with pytest.raises(TransferError, match="closed"):
            store.exists([KEY])
        go.set()

    def test_threads_end_with_the_store(self, wrapped):
        store = wrapped(Odd())
        store.exists([KEY])
        store.close()
        assert not [each for each in threading.enumerate() if "kvstrata-test-" in each.name]


BEHAVIOURS = """
import os, time
from kvstrata.testing.keyed import MemoryKeyedStore
from kvstrata.storage.keyed import PutAnswer

class Moody(MemoryKeyedStore):
    '''As the file that the URL names says: good, or a way to misbehave.'''
    def __init__(self, request):
        super().__init__()
        self.path = request.url

    def mood(self):
        return open(self.path).read()

    def put(self, *args):
        if self.mood() == "raise":
            raise LookupError("put")
        if self.mood() == "hang":
            time.sleep(60)
        return super().put(*args)

    def get(self, key, header, payload):
        mood = self.mood()
        if mood == "hang":
            time.sleep(60)
        if mood == "raise":
            raise LookupError("get")
        if mood == "exit":
            raise SystemExit(1)
        length = super().get(key, header, payload)
        if mood == "flip" and length:
            payload[length // 2] ^= 1
        if mood == "length":
            return 10**9
        if mood == "other" and length:  # somebody else's block
            other = next(each for each in self.blocks if each != key)
            return super().get(other, header, payload)
        return length

    def exists(self, keys):
        mood = self.mood()
        if mood == "hang":
            time.sleep(60)
        return [True] if mood == "length" else super().exists(keys)
"""


@pytest.mark.parametrize("mood", ["raise", "exit", "flip", "length", "other", "hang"])
def test_a_daemon_serves_on_whatever_its_store_does(
    serve, connect, make_blocks, tmp_path, mood
) -> None:
    (tmp_path / "vendor_moody.py").write_text(BEHAVIOURS)
    install(tmp_path, "vendor-moody", ["Moody"], "vendor_moody")
    file, secret = tmp_path / "mood", tmp_path / "secret"
    file.write_text("good")
    secret.write_bytes(os.urandom(32))
    more = ("--secret-file", str(secret), "--staging-timeout-s", "1")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    where = f"host:128KiB,store:moody:{file}:4MiB"
    daemon = serve(where, "a.sock", *more, PYTHONPATH=path)
    client = connect(address=daemon.address)
    chains = [make_blocks(seed, 6) for seed in range(3)]
    for tokens, blocks in chains:
        client.put(tokens, blocks)
    client.wait_idle()
    client.clear(["host"])
    for tokens, blocks in chains:
        assert client.get(tokens).tobytes() == blocks.tobytes(), "through the plug-in"
    client.clear(["host"])
    file.write_text(mood)
    for tokens, _ in chains:
        began = time.monotonic()
        assert client.get(tokens).shape[0] == 0, "a miss"
        assert time.monotonic() - began < 3
    others, other_blocks = make_blocks(9, 3)
    assert client.put(others, other_blocks) == 3
    assert client.get(others).tobytes() == other_blocks.tobytes(), "the daemon works on"
    tier = client.stats()["node"]["tiers"]["store"]
    if mood in {"raise", "exit", "length"}:
        assert tier["store"]["errors"] > 0
    if mood == "length":
        assert tier["store"]["invalid"] > 0
    if mood in {"flip", "other"}:
        assert tier["moved"]["damaged"] > 0
    began = time.monotonic()
    assert daemon.end() == 0
    assert time.monotonic() - began < 9
