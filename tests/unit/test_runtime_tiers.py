"""Lists of tiers in a real daemon, with real files, as a client and an operator see them."""

from __future__ import annotations

import json

import pytest

from kvstrata.core.errors import ConfigError

SLAB_BYTES = 1 << 20


def disk(folder, way: str = "") -> str:
    return f"disk:{folder}:{SLAB_BYTES}{way}"


def tier_of(client, name: str) -> dict:
    return client.stats()["node"]["tiers"][name]


def test_blocks_come_back_from_the_second_disk_after_a_restart(connect, make_blocks, tmp_path):
    near, far = tmp_path / "near", tmp_path / "far"
    where = f"host:128KiB,{disk(near)},{disk(far)}"
    tokens, blocks = make_blocks(1, 6)
    client = connect(tiers=where)
    client.put(tokens, blocks)
    client.wait_idle()
    assert [tier_of(client, name)["idle"] for name in ("host", "disk", "disk2")] == [6, 6, 6]
    client.close()
    (near / "blocks.slab").unlink()
    again = connect(tiers=where)
    assert again.get(tokens).tobytes() == blocks.tobytes()
    again.wait_idle()
    assert tier_of(again, "disk2")["hit_blocks"] == 6
    assert tier_of(again, "disk")["idle"] == 6, "what came from below enters the tier between"


def test_a_damaged_copy_is_replaced_by_the_next_tiers(connect, make_blocks, tmp_path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    tokens, blocks = make_blocks(2, 4)
    client = connect(tiers=f"host:128KiB,{disk(near)},{disk(far)}")
    client.put(tokens, blocks)
    client.wait_idle()
    client.clear(["host"])
    path = near / "blocks.slab"
    data = path.read_bytes()
    at = data.index(blocks[1].tobytes())
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(8))
    assert client.get(tokens).tobytes() == blocks.tobytes()
    assert client.stats()["node"]["counters"]["corrupt_blocks"] == 1


def test_a_disk_alone_takes_all_that_it_accepted(connect, make_blocks, tmp_path) -> None:
    client = connect(tiers=f"host:80KiB:bypass,{disk(tmp_path)}")
    chains = [make_blocks(seed, 8) for seed in range(10)]
    stored = [client.put(tokens, blocks) for tokens, blocks in chains]
    client.wait_idle()
    counters = client.stats()["node"]["counters"]
    assert counters["evicted_unwritten_blocks"] == 0
    assert counters["written_blocks"] == counters["stored_blocks"] == sum(stored)
    for (tokens, blocks), count in zip(chains, stored, strict=True):
        assert client.get(tokens).tobytes() == blocks[:count].tobytes()


def test_on_evict_both_tiers_keep_different_blocks(connect, make_blocks, tmp_path) -> None:
    client = connect(tiers=f"host:256KiB,{disk(tmp_path, ':on-evict')}")
    chains = [make_blocks(seed, 6) for seed in range(16)]
    for tokens, blocks in chains:
        assert client.put(tokens, blocks) == 6
        client.wait_idle()
    host, below = tier_of(client, "host"), tier_of(client, "disk")
    assert below["admission"] == "on-evict"
    assert host["total"] < 96 < host["idle"] + below["idle"]
    assert below["idle"] < 96
    for tokens, blocks in chains:
        assert client.get(tokens).tobytes() == blocks.tobytes()
        client.wait_idle()  # what comes up pushes others down


def test_by_frequency_a_second_use_writes(connect, make_blocks, tmp_path) -> None:
    client = connect(tiers=f"host:128KiB,{disk(tmp_path, ':frequency')}")
    tokens, blocks = make_blocks(1, 3)
    client.put(tokens, blocks)
    client.wait_idle()
    assert tier_of(client, "disk")["idle"] == 0
    client.get(tokens)
    client.wait_idle()
    assert tier_of(client, "disk")["idle"] == 3


def test_an_operator_sees_and_clears_tiers_by_name(
    serve, connect, make_blocks, command, tmp_path
) -> None:
    daemon = serve(f"host:128KiB,{disk(tmp_path / 'a')},{disk(tmp_path / 'b')}")
    client = connect(address=daemon.address)
    tokens, blocks = make_blocks(1, 3)
    client.put(tokens, blocks)
    client.wait_idle()
    told = json.loads(command("stats", "--json", "--address", daemon.address).stdout)
    assert list(told["node"]["tiers"]) == ["host", "disk", "disk2"]
    cleared = command("clear", "--tier", "disk2", "--address", daemon.address)
    assert cleared.stdout == "3 blocks forgotten\n"
    assert client.lookup(tokens) == 12
    refused = command("clear", "--tier", "disk3", "--address", daemon.address)
    assert refused.returncode == 2
    assert "this daemon has host, disk, disk2" in refused.stderr


def test_two_tiers_in_one_directory_are_refused(connect, tmp_path) -> None:
    with pytest.raises(ConfigError, match="two tiers would keep their files"):
        connect(tiers=f"host:128KiB,{disk(tmp_path)},{disk(tmp_path)}")


def test_a_second_disk_that_cannot_be_opened_leaves_nothing_open(connect, tmp_path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "blocks.slab").write_bytes(b"somebody's notes")
    where = f"host:128KiB,{disk(tmp_path / 'good')},{disk(broken)}"
    with pytest.raises(ConfigError, match="is not a kvstrata slab"):
        connect(tiers=where)
    (broken / "blocks.slab").unlink()
    connect(tiers=where)


def test_a_disk_that_is_slower_than_computing_is_left_alone(connect, make_blocks, tmp_path) -> None:
    client = connect(tiers=f"host:128KiB,{disk(tmp_path)}", prefill_tokens_per_s=1e9)
    chains = [make_blocks(seed, 3) for seed in range(6)]
    for tokens, blocks in chains:
        client.put(tokens, blocks)
    client.wait_idle()
    ready = []
    for tokens, _ in chains:
        client.clear(["host"])
        ready.append(client.lookup(tokens))
    assert ready[0] == 12, "nothing was known of the disk"
    assert ready[-1] == 0, "nothing can read 12 tokens in 12 ns"
    assert client.why(chains[-1][0]).startswith("too slow to be worth it: 3 blocks of disk")
    assert client.stats()["node"]["costs"]["tiers"]["disk"]["known"]
    assert client.get(chains[0][0]).shape[0] in {0, 3}
