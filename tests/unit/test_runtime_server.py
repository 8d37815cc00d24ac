"""A daemon and callers that are broken or hostile: it answers, refuses or drops, and lives."""

from __future__ import annotations

import os
import random
import time

import msgspec
import pytest
import zmq

from kvstrata.core.errors import CallRefusedError
from kvstrata.layout import BlockLayout, Dimension
from kvstrata.runtime import messages as wire
from kvstrata.runtime.process import start_ticks
from kvstrata.tokens import Namespace

LAYOUT = BlockLayout((Dimension("axis0", 3), Dimension("axis1", 5)), "float32", 4, "array")
SPACE = Namespace("default", "", "", "float32", LAYOUT.geometry, 4)
KEYS = [bytes([number]) * 16 for number in range(8)]


class Raw:
    """A DEALER that says what it likes."""

    def __init__(self, address: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvtimeo = 5000
        self.socket.connect(address)
        self.session = 0
        self.last = 0

    def send(self, call, *, in_s: float = 5.0, session: int | None = None) -> int:
        self.last += 1
        session = self.session if session is None else session
        self.socket.send(
            wire.encode(wire.Envelope(self.last, time.monotonic() + in_s, session, call))
        )
        return self.last

    def ask(self, call, session: int | None = None):
        number = self.send(call, session=session)
        reply = wire.decode_reply(self.socket.recv())
        assert reply.id == number
        return reply.answer

    def hello(self, **other):
        me = wire.Process(os.getpid(), start_ticks(os.getpid()))
        values = {"protocol": wire.PROTOCOL_VERSION, "processes": [me], "layout": LAYOUT}
        answer = self.ask(wire.Hello(**(values | {"namespace": SPACE} | other)))
        self.session = getattr(answer, "session", self.session)
        return answer

    def stats(self):
        return self.ask(wire.Stats()).stats

    def close(self) -> None:
        self.socket.close()
        self.context.term()


@pytest.fixture
def raw(serve):
    """A raw caller of a fresh daemon with a host tier of few slots."""
    caller = Raw(serve("host:64KiB").address)
    yield caller
    caller.close()


def refused(answer, words: str) -> None:
    assert isinstance(answer, wire.Refused)
    assert words in answer.message


def store(raw, keys=tuple(KEYS), request: str = "fill") -> None:
    """Put blocks of zeros under `keys` by raw calls."""
    got = raw.ask(wire.Reserve(request, b"", b"".join(keys)))
    assert raw.ask(wire.Seal(request, got.slots)) == wire.Done()


def test_random_bytes_are_dropped_and_counted(raw) -> None:
    luck = random.Random(7)
    for length in [0, 1, 2, 3, 5, 17, 100, 5000]:
        for _ in range(20):
            raw.socket.send(luck.randbytes(length))
    assert raw.stats()["malformed_messages"] == 160
    assert isinstance(raw.hello(), wire.Welcome)


def test_every_damage_of_a_good_message(raw, eventually) -> None:
    raw.hello()
    data = wire.encode(
        wire.Envelope(5, time.monotonic() + 60, raw.session, wire.Lookup("r", KEYS[0]))
    )
    luck = random.Random(7)
    for position in range(len(data)):
        raw.socket.send(data[:position])
        raw.socket.send(data[:position] + bytes([luck.randrange(256)]) + data[position + 1 :])
    other = Raw(raw.socket.last_endpoint.decode())
    assert isinstance(other.hello(), wire.Welcome)
    eventually(lambda: other.stats()["malformed_messages"] >= len(data))
    assert isinstance(other.hello(), wire.Welcome)
    other.close()


@pytest.mark.parametrize("frames", [2, 3, 9])
def test_more_frames_than_a_call_has(raw, frames) -> None:
    raw.socket.send_multipart([b"x"] * frames)
    assert raw.stats()["malformed_messages"] == 1


def test_deeply_nested_and_wrongly_typed(raw) -> None:
    tagged = [{"type": "Lookup", "request": "r", "hashes": b"", "more": 1}]
    tagged += [{"type": "Nothing"}, {"type": "Lookup", "request": "", "hashes": b""}]
    tagged += [{"type": "Lookup", "request": "x" * 513, "hashes": b""}]
    tagged += [{"type": "Seal", "request": "r", "slots": [-1]}, {"type": "Done"}]
    for call in tagged:
        envelope = {"id": 1, "deadline": time.monotonic() + 5, "session": 0, "call": call}
        raw.socket.send(msgspec.msgpack.encode(envelope))
    raw.socket.send(b"\x91" * 100_000)
    assert raw.stats()["malformed_messages"] == len(tagged) + 1


@pytest.mark.parametrize("session", [0, 1, -1, 2**52, 2**63 - 1])
def test_unknown_sessions(raw, session) -> None:
    raw.hello()
    calls = [wire.Lookup("r", KEYS[0]), wire.Acquire("r", KEYS[0]), wire.Release(["r"])]
    calls += [wire.Reserve("r", b"", KEYS[0]), wire.Seal("r", [0]), wire.Abort("r", [0])]
    for call in calls:
        refused(raw.ask(call, session=session), "session: unknown or closed")
    assert raw.ask(wire.Bye(), session=session) == wire.Done()
    assert raw.stats()["sessions"] == 1


def test_before_the_first_hello(raw) -> None:
    refused(raw.ask(wire.Lookup("r", b"")), "session: ")
    assert raw.stats()["node"] is None


@pytest.mark.parametrize("length", [1, 15, 17, 31])
def test_broken_lengths_of_hashes(raw, length) -> None:
    raw.hello()
    for call in (wire.Lookup, wire.Acquire):
        refused(raw.ask(call("r", bytes(length))), "hashes: ")
    refused(raw.ask(wire.Reserve("r", b"", bytes(length))), "hashes: ")
    if length < 16:
        refused(raw.ask(wire.Reserve("r", bytes(length), bytes(16 - length))), "parent: ")
    with pytest.raises(CallRefusedError, match="hashes: "):
        wire.split_hashes(bytes(length))


def test_a_hash_named_twice(raw) -> None:
    raw.hello()
    for call in (wire.Lookup("r", KEYS[0] * 2), wire.Acquire("r", KEYS[0] * 2)):
        refused(raw.ask(call), "named twice")
    refused(raw.ask(wire.Reserve("r", b"", KEYS[0] * 2)), "named twice")
    refused(raw.ask(wire.Reserve("r", KEYS[0], KEYS[0])), "named twice")


def test_foreign_slots(raw) -> None:
    raw.hello()
    ours = raw.ask(wire.Reserve("ours", b"", b"".join(KEYS[:3])))
    assert len(ours.slots) == 3
    other = Raw(raw.socket.last_endpoint.decode())
    other.hello()
    for caller, request in ((other, "ours"), (other, "x"), (raw, "theirs")):
        for call in (wire.Seal, wire.Abort):
            refused(caller.ask(call(request, ours.slots)), "slots: ")
            refused(caller.ask(call(request, [10**9])), "slots: ")
    refused(raw.ask(wire.Seal("ours", [*ours.slots, ours.slots[0]])), "slots: ")
    assert raw.stats()["node"]["tiers"]["host"]["filling"] == 3, "refusals changed nothing"
    assert raw.ask(wire.Seal("ours", ours.slots)) == wire.Done()
    other.close()


def test_a_late_call_is_not_served(raw) -> None:
    raw.hello()
    for in_s in (0.0, -1.0, -1e9):
        raw.send(wire.Reserve("r", b"", KEYS[0]), in_s=in_s)
    told = raw.stats()
    assert told["late_calls"] == 3
    assert told["node"]["tiers"]["host"]["filling"] == 0


def test_an_oversized_message_ends_its_sender_only(raw) -> None:
    other = Raw(raw.socket.last_endpoint.decode())
    assert isinstance(other.hello(), wire.Welcome)
    raw.socket.send(bytes((16 << 20) + 1))
    store(other)
    assert other.stats()["node"]["tiers"]["host"]["total"] > 0
    other.close()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"protocol": 99}, "protocol: "),
        ({"namespace": Namespace("m", "", "", "float32", "g", 8)}, "block_tokens: "),
        ({"processes": [wire.Process(2**31 - 1, 1)]}, "is not running"),
        ({"processes": [wire.Process(os.getpid(), 1)]}, "is not running"),
    ],
)
def test_hellos_refused(raw, other, words) -> None:
    refused(raw.hello(**other), words)
    assert raw.stats()["sessions"] == 0
    assert isinstance(raw.hello(), wire.Welcome)


def test_a_layout_that_cannot_be(raw) -> None:
    """Numbers that overflow or contradict each other are refused where they arrive."""
    hello = msgspec.to_builtins(
        wire.Hello(wire.PROTOCOL_VERSION, [wire.Process(os.getpid(), 1)], LAYOUT, SPACE)
    )
    for field, value in (("dtype", "float12"), ("block_tokens", 0), ("dimensions", [])):
        broken = hello | {"layout": hello["layout"] | {field: value}}
        envelope = {"id": 1, "deadline": time.monotonic() + 5, "session": 0, "call": broken}
        raw.socket.send(msgspec.msgpack.encode(envelope))
    assert raw.stats()["malformed_messages"] == 3


def test_a_session_gives_back_what_it_held(raw) -> None:
    raw.hello()
    store(raw)
    other = Raw(raw.socket.last_endpoint.decode())
    other.hello()
    other.ask(wire.Acquire("r", b"".join(KEYS)))
    assert other.ask(wire.Bye()) == wire.Done()
    refused(other.ask(wire.Lookup("r", b"")), "session: ")
    told = raw.stats()
    assert (told["sessions"], told["node"]["holds"]) == (1, 0)
    other.close()
