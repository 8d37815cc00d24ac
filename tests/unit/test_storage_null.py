"""The store that keeps nothing: it says so at each call, and a daemon over it loses nothing."""

from __future__ import annotations

import pytest

from kvstrata.core.errors import ConfigError, TransferError
from kvstrata.core.ids import SequenceHash
from kvstrata.storage.envelope import HEADER_BYTES
from kvstrata.storage.keyed import PutAnswer
from kvstrata.storage.plugged import open_plugged
from kvstrata.testing.contracts.keyed_store import fresh_request

KEY = SequenceHash(bytes(16))
HEADER = bytes(HEADER_BYTES)


def test_nothing_stays_and_nobody_is_told_otherwise():
    store = open_plugged("null", fresh_request("null"))
    room = memoryview(bytearray(100))
    assert store.put(KEY, HEADER, room) is PutAnswer.FULL
    assert store.get(KEY, memoryview(bytearray(HEADER_BYTES)), room) is None
    assert store.peek(KEY) is None
    assert store.exists([KEY, KEY]) == [False, False]
    store.delete([KEY])
    assert list(store.entries()) == []
    found = store.statistics()
    assert (found.full, found.created, found.misses, found.deleted) == (1, 0, 2, 1)
    with pytest.raises(TransferError):
        store.put(SequenceHash(b"short"), HEADER, room)
    store.close()
    with pytest.raises(TransferError, match="closed"):
        store.get(KEY, memoryview(bytearray(HEADER_BYTES)), room)


def test_a_place_that_would_be_expected_to_keep_blocks_is_refused():
    with pytest.raises(ConfigError, match="keeps nothing"):
        open_plugged("null", fresh_request("/var/kv"))


def test_a_daemon_over_it_serves_from_its_host(connect, make_blocks, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(32)))
    client = connect(tiers="host:1MiB,store:null:null:1GiB", secret_file=str(secret))
    tokens, blocks = make_blocks(1, 4)
    client.put(tokens, blocks)
    client.wait_idle()
    assert client.get(tokens).tobytes() == blocks.tobytes()
    assert client.stats()["node"]["tiers"]["store"]["idle"] == 0
    client.clear(["host"])
    assert len(client.get(tokens)) == 0
