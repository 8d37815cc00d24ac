"""Whole daemons over a Redis tier: killed, deleted, and their server with them."""

from __future__ import annotations

import signal
import time

import pytest

from kvstrata.core.errors import ConfigError
from kvstrata_redis.place import PASSWORD


def tiers(server, prefix):
    return f"host:128KiB,store:redis:{server.url}?prefix={prefix}:4MiB"


def test_another_daemon_gives_back_bit_for_bit_what_a_killed_one_stored(
    serve, connect, make_blocks, redis_server
):
    where = tiers(redis_server, "killed")
    chains = [make_blocks(seed, 8) for seed in range(4)]
    first = serve(where)
    client = connect(first)
    for tokens, blocks in chains:
        assert client.put(tokens, blocks) == 8
        client.wait_idle()
    client.close()
    first.end(signal.SIGKILL)
    second = serve(where)
    client = connect(second)
    client.wait_idle()
    assert client.stats()["node"]["counters"]["adopted_blocks"] == 32
    for tokens, blocks in chains:
        assert client.get(tokens).tobytes() == blocks.tobytes()
    tier = client.stats()["node"]["tiers"]["store"]
    assert tier["hit_blocks"] == 32
    assert (tier["store"]["errors"], tier["moved"]["damaged"]) == (0, 0)
    client.clear()
    client.wait_idle()
    assert client.lookup(chains[0][0]) == 0
    assert second.end() == 0
    third = serve(where)
    client = connect(third)
    client.wait_idle()
    assert client.stats()["node"]["counters"]["adopted_blocks"] == 0, "what was cleared is gone"


def test_two_daemons_share_a_server(serve, connect, make_blocks, redis_server):
    where = tiers(redis_server, "shared")
    one, two = connect(serve(where)), connect(serve(where))
    tokens, blocks = make_blocks(1, 8)
    one.wait_idle()
    two.wait_idle()
    one.put(tokens, blocks)
    one.wait_idle()
    assert two.get(tokens).tobytes() == blocks.tobytes(), "it asks before it misses"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_fails_is_misses_and_no_hang(serve, connect, make_blocks, start_redis, how):
    server = start_redis()
    daemon = serve(tiers(server, "kv"), "--staging-timeout-s", "1")
    client = connect(daemon)
    tokens, blocks = make_blocks(1, 8)
    client.put(tokens, blocks)
    client.wait_idle()
    client.clear(["host"])
    assert client.get(tokens).tobytes() == blocks.tobytes()
    client.clear(["host"])
    server.signal(how)
    began = time.monotonic()
    assert client.get(tokens).shape[0] == 0, "a miss"
    assert time.monotonic() - began < 3
    others, other_blocks = make_blocks(2, 3)
    assert client.put(others, other_blocks) == 3
    assert client.get(others).tobytes() == other_blocks.tobytes(), "the daemon works on"
    if how == signal.SIGSTOP:
        server.signal(signal.SIGCONT)
        deadline = time.monotonic() + 25
        while client.get(tokens).tobytes() != blocks.tobytes():
            assert time.monotonic() < deadline, "the server is back"
            time.sleep(0.3)
    began = time.monotonic()
    assert daemon.end() == 0
    assert time.monotonic() - began < 10
    assert not [line for line in daemon.lines if "Traceback" in line]


def test_a_wrong_password_reaches_the_client_as_an_error_with_a_hint(serve, connect, start_redis):
    server = start_redis("--requirepass", "right")
    daemon = serve(tiers(server, "kv"), **{PASSWORD: "hunter2"})
    with pytest.raises(ConfigError, match="user or password are wrong") as refusal:
        connect(daemon)
    assert PASSWORD in refusal.value.hint
    assert "hunter2" not in "".join(daemon.lines) + str(refusal.value)


def test_a_bad_url_is_refused_before_the_daemon_serves(serve):
    daemon = serve("host:1MiB,store:redis:http://h:1MiB")
    assert daemon.end() != 0
    assert "unknown scheme 'http'" in "".join(daemon.lines)
