"""The Client against real daemons: what was put comes back, to those it belongs to alone."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from kvstrata.core.errors import ConfigError, DaemonGoneError
from kvstrata.runtime import messages as wire


def same(found, expected) -> bool:
    return found.shape == expected.shape and found.tobytes() == expected.tobytes()


def test_round_trip_in_the_host(connect, make_blocks) -> None:
    client = connect(tiers="host:1MiB")
    tokens, blocks = make_blocks(1, 5)
    assert client.lookup(tokens) == 0
    assert client.get(tokens).shape == (0, 3, 5)
    assert client.put(tokens, blocks) == 5
    assert client.lookup(tokens) == 20
    assert same(client.get(tokens), blocks)
    assert client.get(tokens).dtype == np.float32


def test_put_counts_what_is_new(connect, make_blocks) -> None:
    client = connect(tiers="host:1MiB")
    tokens, blocks = make_blocks(1, 5)
    assert client.put(tokens[:12], blocks[:3]) == 3
    assert client.put(tokens[:12], blocks[:3]) == 0
    assert client.put(tokens, blocks) == 2
    assert client.put(tokens, np.zeros_like(blocks)) == 0, "kept blocks are left as they are"
    assert same(client.get(tokens), blocks)


def test_what_comes_back_is_a_copy(connect, make_blocks) -> None:
    client = connect(tiers="host:1MiB")
    tokens, blocks = make_blocks(1, 2)
    client.put(tokens, blocks)
    client.get(tokens)[:] = 0
    assert same(client.get(tokens), blocks)


def test_a_partial_block_is_no_hit(connect, make_blocks) -> None:
    client = connect(tiers="host:1MiB")
    tokens, blocks = make_blocks(1, 2)
    assert client.put(tokens[:3], blocks[:0]) == 0
    assert client.put([*tokens[:4], *tokens[4:7]], blocks[:1]) == 1
    assert client.lookup(tokens[:3]) == 0
    assert client.lookup(tokens[:7]) == 4
    assert client.lookup(tokens) == 4
    assert len(client.get(tokens)) == 1


def test_a_prefix_ends_at_the_first_other_token(connect, make_blocks) -> None:
    client = connect(tiers="host:1MiB")
    tokens, blocks = make_blocks(1, 4)
    client.put(tokens, blocks)
    for position in range(16):
        other = list(tokens)
        other[position] += 1
        assert client.lookup(other) == position // 4 * 4
        assert same(client.get(other), blocks[: position // 4])
    assert client.lookup(tokens[4:]) == 0, "the same tokens behind others are other blocks"


def test_round_trip_over_the_disk(connect, make_blocks, tmp_path) -> None:
    tiers = f"host:1MiB,disk:{tmp_path}:2MiB"
    client = connect(tiers=tiers)
    tokens, blocks = make_blocks(1, 20)
    client.put(tokens, blocks)
    client.wait_idle()
    assert client.clear(["host"]) == 20
    assert same(client.get(tokens), blocks)
    counters = client.stats()["node"]["counters"]
    assert (counters["written_blocks"], counters["hit_blocks_staged"]) == (20, 20)
    client.close()
    again = connect(tiers=tiers)
    assert again.stats()["node"]["counters"]["recovered_blocks"] == 20
    assert again.lookup(tokens) == 80
    assert same(again.get(tokens), blocks)
    assert again.clear() == 40
    again.close()
    assert connect(tiers=tiers).lookup(tokens) == 0, "cleared is cleared, after a restart too"


def test_more_than_the_host_holds(connect, make_blocks, tmp_path) -> None:
    client = connect(tiers=f"host:64KiB,disk:{tmp_path}:1MiB")
    slots = client.stats()["node"]["tiers"]["host"]["total"]
    for seed in range(6):
        client.put(*make_blocks(seed, slots // 2))
        client.wait_idle()
    for seed in range(6):
        tokens, blocks = make_blocks(seed, slots // 2)
        assert same(client.get(tokens), blocks)


def test_strangers_never_hit(serve, connect, make_blocks) -> None:
    address = serve().address
    ours = connect(address=address)
    tokens, blocks = make_blocks(1, 4)
    ours.put(tokens, blocks)
    twin = connect(address=address)
    assert same(twin.get(tokens), blocks)
    for strange in ({"salt": "a"}, {"namespace": "other"}, {"salt": "default"}, {"salt": " "}):
        stranger = connect(address=address, **strange)
        assert stranger.lookup(tokens) == 0
        assert stranger.put(tokens, blocks + 1) == 4
        assert same(stranger.get(tokens), blocks + 1)
    assert same(ours.get(tokens), blocks)
    assert ours.stats()["sessions"] == 6


def test_another_layout_is_refused_by_a_shared_daemon(serve, connect) -> None:
    address = serve().address
    ours = connect(address=address)
    others = ({"block_tokens": 8}, {"dtype": np.float16}, {"block_shape": (5, 3)})
    for other in (*others, {"dtype": np.int32}):
        with pytest.raises(ConfigError, match="layout") as caught:
            connect(address=address, **other)
        assert "another daemon" in caught.value.hint
    assert ours.stats()["sessions"] == 1


def test_two_clients_share_a_daemon(serve, connect, make_blocks) -> None:
    address = serve().address
    one, two = connect(address=address), connect(address=address)
    tokens, blocks = make_blocks(1, 6)
    assert one.put(tokens[:12], blocks[:3]) == 3
    assert two.put(tokens, blocks) == 3
    assert same(one.get(tokens), blocks)
    one.close()
    assert same(two.get(tokens), blocks)
    assert two.stats()["sessions"] == 1
    assert two.clear() == 6
    assert two.lookup(tokens) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, 3, 5), np.float32),
        np.zeros((3, 3, 5), np.float32),
        np.zeros((2, 5, 3), np.float32),
        np.zeros((2, 15), np.float32),
        np.zeros((2, 3, 5), np.float64),
        np.zeros((2, 3, 5), np.int32),
        np.zeros((2, 3, 5), ">f4"),
        [],
    ],
    ids=lambda wrong: f"{np.asarray(wrong).dtype.str}{np.shape(wrong)}",
)
def test_wrong_blocks_are_refused(connect, make_blocks, wrong) -> None:
    client = connect(tiers="host:1MiB")
    tokens, blocks = make_blocks(1, 2)
    with pytest.raises(ValueError, match="blocks: "):
        client.put(tokens, wrong)
    assert client.lookup(tokens) == 0
    assert client.put(tokens, blocks) == 2, "the refusal reserved nothing"


def test_bad_tokens_are_refused(connect) -> None:
    client = connect(tiers="host:1MiB")
    for call in (client.lookup, client.get):
        with pytest.raises(ValueError, match="token"):
            call([0, 1, 2, -1])


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"tiers": "gpu:1MiB"}, "tiers: "),
        ({"tiers": "host:1KiB"}, "tiers.host: "),
        ({"tiers": "host:1000TiB"}, "tiers.host: "),
        ({"tiers": "host:1MiB,disk:/proc/no:1MiB"}, "tiers.disk: "),
        ({"address": "tcp://localhost:1"}, "address: "),
        ({"dtype": "float12"}, "dtype: "),
        ({"dtype": np.complex64}, "dtype: "),
        ({"block_shape": (0,)}, "dimensions: "),
        ({"block_shape": ()}, "dimensions: "),
        ({"block_tokens": 0}, "block of 0 tokens"),
    ],
)
def test_wrong_settings_are_told(connect, run_directory, settings, field) -> None:
    with pytest.raises(ConfigError) as caught:
        connect(**settings)
    assert caught.value.message.startswith(field)
    assert caught.value.hint
    assert not [path for path in run_directory.rglob("*") if not path.is_dir()]


def test_nobody_at_the_address(connect, run_directory) -> None:
    with pytest.raises(DaemonGoneError, match="nothing listens"):
        connect(address=f"ipc://{run_directory}/n.sock")


def test_close_twice_and_calls_after_it(connect, make_blocks, run_directory, eventually) -> None:
    client = connect(tiers="host:1MiB")
    client.close()
    client.close()
    with pytest.raises(DaemonGoneError):
        client.lookup(make_blocks(1, 1)[0])
    eventually(lambda: not list((run_directory / "kvstrata").iterdir()))


@pytest.mark.parametrize("speed", [-1.0, float("nan"), float("inf")])
def test_what_is_no_speed_is_refused(connect, speed) -> None:
    with pytest.raises(ConfigError, match="prefill_tokens_per_s: ") as caught:
        connect(tiers="host:1MiB", prefill_tokens_per_s=speed)
    assert caught.value.hint


def test_a_speed_travels_with_each_lookup(connect, make_blocks) -> None:
    client = connect(tiers="host:1MiB", prefill_tokens_per_s=12_000)
    tokens, blocks = make_blocks(1, 5)
    client.put(tokens, blocks)
    assert client.lookup(tokens) == 20


@pytest.mark.parametrize("field", ["prefill_tokens_per_s", "copy_bytes_per_s"])
@pytest.mark.parametrize("speed", [-1.0, float("nan"), float("inf"), 1e19])
def test_no_daemon_takes_a_speed_that_is_none(field, speed) -> None:
    call = wire.Lookup("r", b"", **{field: speed})
    with pytest.raises(msgspec.ValidationError, match=field):
        wire.decode_envelope(wire.encode(wire.Envelope(1, 0.0, 0, call)))
