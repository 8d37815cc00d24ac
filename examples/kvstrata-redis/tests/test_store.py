"""What Redis adds to the laws: its failures told apart, its deadlines, what others wrote."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from dataclasses import replace

import pytest
import redis

from kvstrata.core.errors import ChecksumError, ConfigError, LayoutError, TransferError
from kvstrata.core.ids import SequenceHash
from kvstrata.storage.envelope import HEADER_BYTES
from kvstrata.storage.keyed import PutAnswer
from kvstrata.testing.contracts.keyed_store import fresh_request
from kvstrata.testing.server import free_port
from kvstrata_redis import RedisStore
from kvstrata_redis.place import PASSWORD, USERNAME, parse_place

HEADER = os.urandom(HEADER_BYTES)
PAYLOAD = memoryview(os.urandom(50_000))


def key(number: int) -> SequenceHash:
    return SequenceHash(number.to_bytes(16, "big"))


def read(store, number, length=50_000):
    header, payload = bytearray(HEADER_BYTES), bytearray(length)
    found = store.get(key(number), memoryview(header), memoryview(payload))
    return None if found is None else (bytes(header), bytes(payload[:found]))


BLOCK = (HEADER, bytes(PAYLOAD))
SET = b"$3\r\nSET\r\n"


@pytest.fixture
def open_store():
    opened = []

    def make(url, timeout_s=2.0):
        opened.append(RedisStore(fresh_request(url, timeout_s)))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def foreign(redis_server):
    """A client of somebody else's."""
    client = redis.Redis(port=redis_server.port)
    yield client
    client.close()


class TestPlace:
    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://h", "h:6379, database 0, prefix kvstrata"),
            ("rediss://h:1/7?prefix=a/b", "h:1, database 7, prefix a/b"),
            ("unix:///run/r.sock?db=2&prefix=x", "/run/r.sock, database 2, prefix x"),
        ],
    )
    def test_what_is_a_place(self, url, shown):
        assert str(parse_place(url)) == shown

    @pytest.mark.parametrize(
        ("url", "words"),
        [
            ("http://h", "unknown scheme"),
            ("redis://", "misspelt"),
            ("redis://h/x", "misspelt"),
            ("redis://h:port", "URL is none"),
            ("unix://", "misspelt"),
            ("redis://h?prefix=a*", "odd characters"),
            ("redis://h?prefix=", "odd characters"),
            ("redis://h?password=hunter2", "has no option password"),
            ("redis://me:hunter2@h", "carries a user"),
            ("redis://h#hunter2", "carries a user"),
        ],
    )
    def test_what_is_none_is_refused_without_a_secret(self, url, words):
        with pytest.raises(ConfigError, match=words) as refusal:
            RedisStore.check(url)
        assert refusal.value.hint
        assert "hunter2" not in str(refusal.value)

    def test_secrets_come_from_the_environment(self):
        given = parse_place("redis://h").connection({USERNAME: "me", PASSWORD: "x"})
        assert (given["username"], given["password"]) == ("me", "x")


class TestAtTheStart:
    """Each reason is told apart, in time, with a hint."""

    def refused(self, url, words, hint):
        began = time.monotonic()
        with pytest.raises(ConfigError, match=words) as refusal:
            RedisStore(fresh_request(url, 1.0))
        assert time.monotonic() - began < 3
        assert hint in refusal.value.hint
        assert not refusal.value.__cause__
        return refusal.value

    def test_nobody_listens(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"redis://127.0.0.1:{free.getsockname()[1]}"
        self.refused(url, "cannot be reached", "host, port or socket")
        self.refused("unix:///nowhere/at/all", "cannot be reached", "host, port or socket")

    def test_somebody_listens_and_says_nothing(self):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
            self.refused(url, "no answer in time", "stopped or overloaded")

    def test_a_wrong_password_a_missing_one_and_the_right_one(self, start_redis, monkeypatch):
        server = start_redis("--requirepass", "open-sesame")
        self.refused(server.url, "user or password are wrong", PASSWORD)
        monkeypatch.setenv(PASSWORD, "hunter2")
        error = self.refused(server.url, "user or password are wrong", PASSWORD)
        assert "hunter2" not in str(error)
        monkeypatch.setenv(PASSWORD, "open-sesame")
        store = RedisStore(fresh_request(server.url))
        assert store.put(key(1), HEADER, PAYLOAD) is PutAnswer.CREATED
        store.close()

    def test_a_user_without_rights(self, start_redis, monkeypatch):
        server = start_redis("--user", "weak", "on", ">pw", "~*", "+auth", "+ping")
        monkeypatch.setenv(USERNAME, "weak")
        monkeypatch.setenv(PASSWORD, "pw")
        self.refused(server.url, "may not do this", USERNAME)

    def test_memory_that_is_full(self, start_redis):
        server = start_redis("--maxmemory", "1", "--maxmemory-policy", "noeviction")
        self.refused(server.url, "memory is full", "maxmemory")

    def test_a_replica(self, start_redis, redis_server):
        server = start_redis("--replicaof", "127.0.0.1", str(redis_server.port))
        deadline = time.monotonic() + 20
        client = redis.Redis(port=server.port)
        while client.info("replication")["master_link_status"] != "up":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        client.close()
        self.refused(server.url, "is a replica", "primary")

    def test_a_node_of_a_cluster(self, start_redis):
        # By itself the bus listens at port + 10000, which a free port need not leave room for.
        server = start_redis("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        self.refused(server.url, "node of a cluster", "not part of a cluster")

    def test_a_database_that_is_not_there(self, redis_server):
        self.refused(f"{redis_server.url}/999", "the request failed", "number")

    def test_a_marker_of_somebody_else_stays(self, redis_server, foreign):
        request = fresh_request(redis_server.url)
        name = f"kvstrata:{request.layout.fingerprint.hex()}:KVSTRATA"
        foreign.set(name, "mine")
        with pytest.raises(LayoutError, match="is not kvstrata's"):
            RedisStore(request)
        assert foreign.get(name) == b"mine"


class TestWhileItRuns:
    def test_a_full_server_is_an_answer_and_what_is_there_stays(self, start_redis, open_store):
        server = start_redis("--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
        store = open_store(server.url)
        answers = [store.put(key(n), HEADER, PAYLOAD) for n in range(100)]
        stored = answers.count(PutAnswer.CREATED)
        assert 10 < stored < 100
        assert answers[stored:] == [PutAnswer.FULL] * (100 - stored)
        assert read(store, 0) == read(store, stored - 1) == BLOCK
        assert read(store, stored) is None
        found = store.statistics()
        assert (found.created, found.full, found.errors) == (stored, 100 - stored, 0)
        store.delete([key(n) for n in range(10)])
        assert store.put(key(200), HEADER, PAYLOAD) is PutAnswer.CREATED

    def test_what_a_server_evicts_is_a_miss(self, start_redis, open_store):
        server = start_redis("--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lru")
        store = open_store(server.url)
        assert {store.put(key(n), HEADER, PAYLOAD) for n in range(200)} == {PutAnswer.CREATED}
        found = [read(store, n) for n in range(200)]
        assert found.count(None) > 100
        assert all(each in {None, BLOCK} for each in found)
        assert found[-1] == BLOCK

    def test_a_killed_server_is_an_error_in_time_and_a_new_one_serves(
        self, start_redis, open_store
    ):
        server = start_redis("--appendonly", "yes", "--appendfsync", "always")
        store = open_store(server.url)
        store.put(key(1), HEADER, PAYLOAD)
        server.signal(signal.SIGKILL)
        for call in (
            lambda: read(store, 1),
            lambda: store.put(key(2), HEADER, PAYLOAD),
            lambda: store.exists([key(1)]),
            lambda: store.peek(key(1)),
            lambda: store.delete([key(1)]),
            lambda: list(store.entries()),
        ):
            began = time.monotonic()
            with pytest.raises(TransferError, match="cannot be reached") as caught:
                call()
            assert caught.value.retryable
            assert time.monotonic() - began < 2.5
        assert store.statistics().errors == 6
        server.close()
        start_redis(place=server)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(TransferError):
                assert read(store, 1) == BLOCK, "the same store, a new connection"
                return
            time.sleep(0.05)
        pytest.fail("it does not find the new server")

    def test_a_stopped_server_is_an_error_in_time_and_is_back_when_it_goes_on(
        self, start_redis, open_store
    ):
        server = start_redis()
        store = open_store(server.url, 0.6)
        store.put(key(1), HEADER, PAYLOAD)
        server.signal(signal.SIGSTOP)
        for call in (
            lambda: read(store, 1),
            lambda: store.exists([key(1)]),
            lambda: store.put(key(2), HEADER, PAYLOAD),
        ):
            began = time.monotonic()
            with pytest.raises(TransferError, match="no answer in time") as caught:
                call()
            assert caught.value.retryable
            assert time.monotonic() - began < 1.5
        server.signal(signal.SIGCONT)
        assert read(store, 1) == BLOCK
        answer = store.put(key(2), HEADER, PAYLOAD)
        assert answer in {PutAnswer.CREATED, PutAnswer.EXISTED}, "it may have arrived after all"
        assert read(store, 2) == BLOCK

    def test_a_password_that_changes_is_an_error_and_no_miss(self, start_redis, open_store):
        server = start_redis()
        store = open_store(server.url)
        store.put(key(1), HEADER, PAYLOAD)
        with redis.Redis(port=server.port) as client:
            client.config_set("requirepass", "new")
            client.execute_command("AUTH", "new")
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        with pytest.raises(TransferError, match="user or password") as caught:
            read(store, 1)
        assert not caught.value.retryable

    @pytest.mark.parametrize("arrived", [True, False])
    def test_a_put_whose_answer_was_lost_is_found_out(self, redis_server, open_store, arrived):
        with Cutter(redis_server.port, arrived=arrived) as cutter:
            store = open_store(f"redis://127.0.0.1:{cutter.port}")
            cutter.cut_next.set()
            assert store.put(key(1), HEADER, PAYLOAD) is PutAnswer.CREATED
            assert not cutter.cut_next.is_set(), "one answer was lost"
            assert read(store, 1) == BLOCK
            found = store.statistics()
            assert (found.retries, found.resolved, found.created) == (1, int(arrived), 1)
            assert store.put(key(1), HEADER, PAYLOAD) is PutAnswer.EXISTED


class Cutter:
    """Forwards to a server; cuts the connection on a SET, before or after the server got it."""

    def __init__(self, port: int, *, arrived: bool) -> None:
        self._target, self._arrived = port, arrived
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.cut_next = threading.Event()

    def __enter__(self):
        self._start(self._accept)
        return self

    def __exit__(self, *_):
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _start(self, work, *arguments):
        threading.Thread(target=work, args=arguments, name="cutter", daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            self._start(self._serve, near)

    def _serve(self, near):
        with near, socket.create_connection(("127.0.0.1", self._target)) as far:
            mute = threading.Event()
            self._start(self._back, far, near, mute)
            while data := near.recv(1 << 20):
                if SET in data and self.cut_next.is_set():
                    self.cut_next.clear()
                    if self._arrived:
                        while not data.endswith(b"NX\r\n"):
                            data += near.recv(1 << 20)
                        mute.set()
                        far.sendall(data)
                        time.sleep(0.1)
                    return
                far.sendall(data)

    @staticmethod
    def _back(far, near, mute):
        try:
            while data := far.recv(1 << 20):
                if not mute.is_set():
                    near.sendall(data)
        except OSError:
            pass


class TestWhatOthersWrote:
    @pytest.fixture
    def place(self, redis_server):
        request = fresh_request(redis_server.url)
        store = RedisStore(request)
        yield store, f"kvstrata:{request.layout.fingerprint.hex()}:"
        store.close()

    @pytest.mark.parametrize("what", ["list", "short", "empty", "giant"])
    def test_what_is_no_block_is_damage_and_can_be_deleted(self, place, foreign, what):
        store, prefix = place
        name = prefix + key(1).hex()
        if what == "list":
            foreign.rpush(name, "x")
        else:
            foreign.set(name, {"short": b"x" * 10, "empty": b"", "giant": b"x" * 10**7}[what])
        assert store.exists([key(1)]) == [True]
        with pytest.raises(ChecksumError):
            read(store, 1)
        assert store.put(key(1), HEADER, PAYLOAD) is PutAnswer.EXISTED
        store.delete([key(1)])
        assert store.put(key(1), HEADER, PAYLOAD) is PutAnswer.CREATED
        assert read(store, 1) == BLOCK

    def test_a_giant_is_not_fetched(self, place, foreign):
        store, prefix = place
        foreign.set(prefix + key(1).hex(), b"x" * 10**7)
        before = foreign.info("stats")["total_net_output_bytes"]
        with pytest.raises(ChecksumError):
            read(store, 1, 1000)
        assert foreign.info("stats")["total_net_output_bytes"] - before < 100_000

    def test_foreign_names_are_counted_and_never_touched(self, place, foreign):
        store, prefix = place
        foreign.set(prefix + "notes", "mine")
        foreign.set("elsewhere", "mine")
        store.put(key(1), HEADER, PAYLOAD)
        assert [entry.key for entry in store.entries()] == [key(1)]
        assert store.statistics().foreign == 1
        assert foreign.get(prefix + "notes") == b"mine"

    def test_a_long_listing_has_each_key_once_and_knows_its_age(self, place):
        store, _ = place
        for number in range(1500):
            store.put(key(number), HEADER, PAYLOAD[:100])
        found = list(store.entries())
        assert sorted(entry.key for entry in found) == [key(number) for number in range(1500)]
        assert all(abs(entry.used_s - time.time()) < 60 for entry in found)

    def test_a_listing_of_a_server_that_knows_no_ages(self, start_redis, open_store):
        server = start_redis("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lfu")
        store = open_store(server.url)
        store.put(key(1), HEADER, PAYLOAD)
        (entry,) = store.entries()
        assert (entry.stored_bytes, entry.used_s) == (HEADER_BYTES + len(PAYLOAD), 0.0)

    def test_two_prefixes_are_two_places(self, redis_server):
        request = fresh_request(redis_server.url + "?prefix=one")
        one = RedisStore(request)
        two = RedisStore(replace(request, url=redis_server.url + "?prefix=two"))
        one.put(key(1), HEADER, PAYLOAD)
        assert two.exists([key(1)]) == [False]
        one.close()
        two.close()
