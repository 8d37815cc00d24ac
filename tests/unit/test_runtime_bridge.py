"""One daemon, clients of several layouts: who joins, what they read, what a restart finds."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from kvstrata.connectors.sglang.canary import fly_canary
from kvstrata.connectors.sglang.hostpages import FlatPages, PoolGeometry
from kvstrata.connectors.sglang.kept import KeptPages
from kvstrata.core.config import Limits, parse_tiers
from kvstrata.core.errors import ConfigError
from kvstrata.layout import (
    BlockLayout,
    Dimension,
    PagedCache,
    Shard,
    apply_transform,
    model_geometry,
    plan_transform,
)
from kvstrata.runtime.admin import AdminClient
from kvstrata.runtime.holding import choose_layout
from kvstrata.runtime.session import Session, SessionLimits
from kvstrata.storage.directory import DirectoryStore
from kvstrata.storage.slab import Slab
from kvstrata.tokens import Namespace

TOKENS = 16


def pool(order):
    return PoolGeometry(order, 3, 8, TOKENS, 2, 4, "float32").block_layout(Shard())


LAYOUTS = {
    "layer-first": pool("layer_first"),
    "page-first": pool("page_first"),
    "vllm": PagedCache(3, 2, 8, 8, "float32", "vec").block_layout(TOKENS),
    "vllm-tp2": PagedCache(3, 1, 4, 8, "float32", "vec16", 2).block_layout(TOKENS),
    "transformers": BlockLayout(
        tuple(
            Dimension(name, size)
            for name, size in (("layer", 3), ("kv", 2), ("head", 2), ("token", 16), ("channel", 4))
        ),
        "float32",
        TOKENS,
        "transformers-dynamic",
    ),
}
BYTES = LAYOUTS["vllm"].block_bytes


def chain(seed, count):
    digests = [hashlib.sha256(f"{seed}".encode()).digest()]
    while len(digests) < count:
        digests.append(hashlib.sha256(digests[-1]).digest())
    return digests


def pages(seed, count):
    luck = np.random.default_rng(seed)
    return FlatPages([luck.integers(0, 256, BYTES, np.uint8) for _ in range(count)])


def turned(page, source, target):
    written = bytearray(BYTES)
    apply_transform(plan_transform(source, target), page.tobytes(), written, "float32")
    return bytes(written)


@pytest.fixture
def join(run_directory):
    """Open pages of one layout at a daemon."""
    assert run_directory.is_dir()
    opened = []

    def make(address, layout, *, bridges=True):
        space = Namespace("m", "w", "", "float32", model_geometry(layout), layout.block_tokens)
        limits = SessionLimits(1.0, 20.0, 0.02)
        session = Session(address, layout, space, limits, bridges=bridges)
        kept = KeptPages(session, batch_timeout_s=5.0)
        opened.append(kept)
        kept.open()
        return kept

    yield make
    for each in opened:
        each.close()


def stats(address):
    with AdminClient(address) as admin:
        admin.wait_idle(20)
        return admin.stats()["node"]


def read_right(kept, layout, digests, sent, writer):
    """What `writer` sent is loaded in `layout`, every page of it, over poison."""
    target = pages(99, len(digests))
    assert kept.find(digests) == len(digests)
    assert kept.load(digests, target, range(len(digests))) == len(digests)
    for got, page in zip(target._arrays, sent._arrays, strict=True):
        assert got.tobytes() == turned(page, writer, layout)


@pytest.mark.parametrize("first", LAYOUTS)
def test_each_reads_what_each_has_written(serve, join, first):
    daemon = serve("host:4MiB")
    clients = {first: join(daemon.address, LAYOUTS[first])}
    clients |= {name: join(daemon.address, LAYOUTS[name]) for name in LAYOUTS if name != first}
    assert stats(daemon.address)["layout"] == LAYOUTS[first].describe()
    for seed, (name, writer) in enumerate(clients.items()):
        digests, sent = chain(seed, 3), pages(seed, 3)
        assert writer.save(digests, None, sent, range(3)) == [True] * 3
        for reader, kept in clients.items():
            read_right(kept, LAYOUTS[reader], digests, sent, LAYOUTS[name])


def test_the_canary_flies_through_the_bridge(serve, join):
    daemon = serve("host:4MiB")
    join(daemon.address, LAYOUTS["vllm-tp2"])
    kept = join(daemon.address, LAYOUTS["page-first"])
    space = pages(1, 2)
    assert fly_canary(kept, space, 1, BYTES, lambda page: space._arrays[page])


@pytest.mark.parametrize("below", ["disk:{}:8MiB", "shared:{}:8MiB"])
def test_a_restart_under_another_engine_finds_what_the_tiers_hold(serve, join, tmp_path, below):
    tiers = f"host:1MiB,{below.format(tmp_path)}"
    daemon = serve(tiers)
    digests, sent = chain(0, 4), pages(0, 4)
    writer = join(daemon.address, LAYOUTS["vllm-tp2"])
    assert writer.save(digests, None, sent, range(4)) == [True] * 4
    stats(daemon.address)
    for number, reader in enumerate(("page-first", "transformers", "vllm-tp2")):
        daemon.kill()
        daemon = serve(tiers, f"{number}.sock")
        kept = join(daemon.address, LAYOUTS[reader])
        assert stats(daemon.address)["layout"] == LAYOUTS["vllm-tp2"].describe()
        read_right(kept, LAYOUTS[reader], digests, sent, LAYOUTS["vllm-tp2"])
        assert stats(daemon.address)["counters"]["corrupt_blocks"] == 0


def test_an_engine_on_another_machine_finds_what_a_bucket_holds(
    serve, join, s3_server, monkeypatch, tmp_path
):
    """The layout that the bucket's blocks have is the one that the new daemon takes."""
    pytest.importorskip("obstore", reason="no obstore installed (kvstrata[object])")
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket, _, options = s3_server.url.partition("?")
    tiers = f"host:1MiB,object:{bucket}/{os.urandom(8).hex()}?{options}:8MiB"
    secret = tmp_path / "secret"
    secret.write_bytes(os.urandom(32))
    digests, sent = chain(0, 4), pages(0, 4)
    daemon = serve(tiers, "a.sock", "--secret-file", str(secret))
    writer = join(daemon.address, LAYOUTS["page-first"])
    assert writer.save(digests, None, sent, range(4)) == [True] * 4
    stats(daemon.address)
    other = serve(tiers, "b.sock", "--secret-file", str(secret))
    kept = join(other.address, LAYOUTS["vllm-tp2"])
    assert stats(other.address)["layout"] == LAYOUTS["page-first"].describe()
    read_right(kept, LAYOUTS["vllm-tp2"], digests, sent, LAYOUTS["page-first"])


# -- refusals ----------------------------------------------------------------------------------


def test_a_client_that_does_not_bridge_is_refused_as_ever(serve, join):
    daemon = serve("host:4MiB")
    join(daemon.address, LAYOUTS["vllm"])
    with pytest.raises(ConfigError, match="layout: this daemon holds blocks of") as caught:
        join(daemon.address, LAYOUTS["transformers"], bridges=False)
    assert "another daemon" in caught.value.hint
    with pytest.raises(ConfigError, match="the client has array"):
        join(daemon.address, BlockLayout((Dimension("axis0", 4),), "float32", TOKENS, "array"))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (PagedCache(3, 2, 8, 8, "float16").block_layout(TOKENS), "element types differ"),
        (PagedCache(3, 2, 8, 8, "float32").block_layout(32), "tokens in a block differ"),
        (PagedCache(4, 2, 8, 8, "float32").block_layout(TOKENS), "layers of the model differ"),
        (PagedCache(3, 4, 8, 8, "float32").block_layout(TOKENS), "KV heads of the model differ"),
        (PagedCache(3, 2, 8, 16, "float32").block_layout(TOKENS), "channels of a head differ"),
        (PagedCache(3, 2, 8, 8, "float32", "amx").block_layout(TOKENS), "packs its pages"),
        (replace(pool("layer_first"), shard=Shard(0, 2)), "KV heads of the model differ"),
        (PoolGeometry("layer_first", 3, 8, TOKENS, 1, 4, "float32").block_layout(Shard(0, 2)),
         "the sources hold"),
    ],
)  # fmt: skip
def test_what_cannot_be_bridged_is_refused_and_says_why(serve, join, other, said):
    daemon = serve("host:4MiB")
    first = join(daemon.address, LAYOUTS["vllm"])
    before = stats(daemon.address)
    with pytest.raises(ConfigError, match=said) as caught:
        join(daemon.address, other)
    assert caught.value.message.startswith("layout: this daemon holds blocks of")
    assert stats(daemon.address)["layout"] == before["layout"]
    assert first.save(chain(0, 1), None, pages(0, 1), [0]) == [True], "nothing has changed"


def test_what_must_separate_does_though_the_bytes_could_be_bridged(serve, join):
    """One daemon, equal layouts, other numbers: another model finds nothing."""
    daemon = serve("host:4MiB")
    digests = chain(0, 2)
    join(daemon.address, LAYOUTS["vllm"]).save(digests, None, pages(0, 2), range(2))
    layout = LAYOUTS["transformers"]
    ours = Namespace("m", "w", "", "float32", model_geometry(layout), TOKENS)
    for field in ("model", "weights", "numerics", "kv_dtype", "geometry"):
        session = Session(daemon.address, layout, replace(ours, **{field: "other"}), bridges=True)
        kept = KeptPages(session, batch_timeout_s=5.0)
        kept.open()
        assert kept.find(digests) == 0, field
        kept.close()


# -- which layout a daemon takes ---------------------------------------------------------------


def choose(tiers, own):
    found = parse_tiers(tiers)
    lower = {each.kind.value: each for each in found[1:]}
    return choose_layout(SimpleNamespace(lower=lower, limits=Limits()), own)


def test_a_slab_decides_before_a_directory_and_both_only_if_bridged(tmp_path):
    own, theirs = LAYOUTS["transformers"], LAYOUTS["vllm-tp2"]
    disk, shared = tmp_path / "disk", tmp_path / "shared"
    tiers = f"host:1MiB,shared:{shared}:4MiB,disk:{disk}:4MiB"
    assert choose(tiers, own) == own, "nothing is there"
    DirectoryStore.open(str(shared), 4 << 20, LAYOUTS["vllm"]).close()
    assert choose(tiers, own) == LAYOUTS["vllm"]
    Slab.open(str(disk), 4 << 20, theirs).close()
    assert choose(tiers, own) == theirs
    other = PagedCache(7, 2, 8, 8, "float32").block_layout(TOKENS)
    assert choose(tiers, other) == other, "the slab will refuse it"
    assert not (tmp_path / "nowhere").exists()
    assert choose(f"host:1MiB,shared:{tmp_path / 'nowhere'}:4MiB", own) == own
    assert not (tmp_path / "nowhere").exists(), "looking makes nothing"


def test_in_a_directory_ones_own_layout_comes_first(tmp_path):
    tiers = f"host:1MiB,shared:{tmp_path}:4MiB"
    lowest, *others, own = sorted(LAYOUTS.values(), key=lambda each: each.fingerprint)
    for layout in (others[0], lowest):
        DirectoryStore.open(str(tmp_path), 4 << 20, layout).close()
    assert choose(tiers, own) == lowest
    DirectoryStore.open(str(tmp_path), 4 << 20, own).close()
    assert choose(tiers, own) == own


def test_a_damaged_front_is_left_to_who_opens_it(tmp_path):
    own = LAYOUTS["transformers"]
    (tmp_path / "blocks.slab").write_bytes(b"KVSTRATA" + bytes(5000))
    assert choose(f"host:1MiB,disk:{tmp_path}:4MiB", own) == own
