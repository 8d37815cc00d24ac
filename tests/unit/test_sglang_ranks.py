"""Two ranks that hold halves of each page: neither ever finds, or is given, the other's half."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from kvstrata.connectors.sglang.hostpages import FlatPages, PoolGeometry
from kvstrata.connectors.sglang.identity import NUMERIC_ARGUMENTS, sglang_namespace
from kvstrata.connectors.sglang.kept import KeptPages
from kvstrata.core.config import NodeConfig, parse_tiers
from kvstrata.core.errors import ConfigError
from kvstrata.layout import Shard
from kvstrata.runtime.admin import AdminClient
from kvstrata.runtime.session import Session, SessionLimits

PAGE_TOKENS = 16
WHOLE, RANKS = Shard(), (Shard(0, 2), Shard(1, 2))
ARGUMENTS = dict.fromkeys(NUMERIC_ARGUMENTS) | {
    "model_path": "org/m", "load_format": "auto", "random_seed": 1, "dtype": "bfloat16",
    "kv_cache_dtype": "auto", "revision": "main", "kt_method": None, "trust_remote_code": False,
    "attention_backend": None,
}  # fmt: skip


def layout_of(shard, order="layer_first", heads=4):
    geometry = PoolGeometry(order, 2, 8, PAGE_TOKENS, heads // shard.tensor_size, 8, "bfloat16")
    return geometry.block_layout(shard)


def namespace_of(layout):
    return sglang_namespace(ARGUMENTS, layout, {"model_type": "llama"}, revision="r", name="")


def chain(seed, count):
    digests = [hashlib.sha256(f"{seed}".encode()).digest()]
    while len(digests) < count:
        digests.append(hashlib.sha256(digests[-1]).digest())
    return digests


def half(digest, rank):
    """Return a rank's half of a page, which the digest and the rank decide."""
    size = layout_of(RANKS[rank]).block_bytes
    return np.resize(np.frombuffer(hashlib.sha256(digest + bytes([rank])).digest(), np.uint8), size)


@pytest.fixture
def attach(run_directory, tmp_path):
    """Open a rank's pages at a daemon, or over private tiers, as the storage class does."""
    assert run_directory.is_dir()
    secret = tmp_path / "secret"  # one for all, or no daemon would find another's blocks anyway
    secret.write_bytes(b"s" * 32)
    secret.chmod(0o600)
    opened = []

    def make(where, layout, namespace=None):
        if where.startswith("host"):
            where = NodeConfig(parse_tiers(where), str(secret))
        limits = SessionLimits(call_timeout_s=1.0, retry_interval_s=0.02)
        namespace = namespace or namespace_of(layout)
        session = Session(where, layout, namespace, limits, bridges=True)
        opened.append(KeptPages(session, batch_timeout_s=5.0))
        opened[-1].open()
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def save(kept, digests, rank):
    source = FlatPages([half(each, rank) for each in digests])
    assert all(kept.save(digests, None, source, range(len(digests))))


def load_right(kept, digests, rank):
    """Return how many pages were loaded; each is this rank's half, and no other was touched."""
    arrays = [np.zeros_like(half(each, rank)) for each in digests]
    loaded = kept.load(digests, FlatPages(arrays), range(len(digests)))
    assert all((arrays[n] == half(digests[n], rank)).all() for n in range(loaded))
    assert not any(each.any() for each in arrays[loaded:])
    return loaded


@pytest.mark.parametrize("order", ["layer_first", "page_first"])
@pytest.mark.parametrize(
    ("first", "second"),
    [(RANKS[0], RANKS[1]), (RANKS[1], RANKS[0]), (WHOLE, RANKS[1]), (RANKS[0], WHOLE)],
    ids=["rank0-rank1", "rank1-rank0", "whole-rank1", "rank0-whole"],
)
def test_a_daemon_that_holds_another_part_refuses_the_rank(serve, attach, order, first, second):
    """Also where an address with {tp_rank} leads both ranks to it, and whatever they are named."""
    address = serve("host:4MiB").address
    owner, other = layout_of(first), layout_of(second, order)
    attach(address, owner)
    with pytest.raises(ConfigError, match="this daemon holds blocks of"):
        attach(address, other)
    with pytest.raises(ConfigError, match="this daemon holds blocks of"):
        attach(address, other, namespace_of(owner))


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "one-directory-below"])
def test_what_one_rank_has_stored_is_no_hit_of_the_other(attach, tmp_path, shared):
    """SGLang takes the least of what its ranks find, and of what they load."""
    tiers = f"host:4MiB,shared:{tmp_path / 'kv'}:8MiB" if shared else "host:4MiB"
    ranks = [attach(tiers, layout_of(shard)) for shard in RANKS]
    digests = chain(1, 6)
    save(ranks[0], digests, 0)
    for each in ranks if shared else ():
        with AdminClient(each.daemon_address) as admin:
            admin.wait_idle(20)
    assert [each.find(digests) for each in ranks] == [6, 0]
    assert load_right(ranks[1], digests, 1) == 0
    save(ranks[1], digests[:4], 1)
    assert [each.find(digests) for each in ranks] == [6, 4]
    ranks[1].forget(digests[2])
    assert [load_right(ranks[rank], digests[:4], rank) for rank in range(2)] == [4, 2]
    if shared:  # and the directory does serve who may have it
        again = attach(tiers, layout_of(RANKS[0]))
        assert again.find(digests) == 6
        assert load_right(again, digests, 0) == 6


def test_ranks_with_the_same_pages_share_them(serve, attach):
    """A latent cache is whole on every rank: one rank writes, and all find the same bytes."""
    address = serve("host:4MiB").address
    geometry = PoolGeometry("layer_first", 2, 8, PAGE_TOKENS, None, 64, "bfloat16")
    layout = geometry.block_layout(WHOLE)
    writer, reader = attach(address, layout), attach(address, layout)
    digests = chain(2, 3)
    pages = [np.resize(np.frombuffer(each, np.uint8), layout.block_bytes) for each in digests]
    assert all(writer.save(digests, None, FlatPages(pages), range(3)))
    assert reader.find(digests) == 3
    target = [np.zeros(layout.block_bytes, np.uint8) for _ in digests]
    assert reader.load(digests, FlatPages(target), range(3)) == 3
    assert all((target[n] == pages[n]).all() for n in range(3))
