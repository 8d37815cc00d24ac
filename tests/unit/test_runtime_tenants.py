"""Tenants through a real daemon: charged, guaranteed, cleared, and told why a prompt missed."""

from __future__ import annotations

import pytest

from kvstrata.core.errors import CallRefusedError, ConfigError
from kvstrata.core.tenants import tenant_tag
from kvstrata.runtime import messages as wire
from kvstrata.runtime.admin import AdminClient

NEVER = "never stored"


def held(stats) -> dict[str, dict[str, int]]:
    return {each["tenant"]: each["slots"] for each in stats["node"]["tenants"]}


@pytest.fixture
def disk_tiers(tmp_path) -> str:
    return f"host:1MiB,disk:{tmp_path / 'kv'}:1MiB"


def test_a_tenant_comes_back_to_its_guarantee(serve, connect, make_blocks) -> None:
    daemon = serve("host:64KiB", "n.sock", "--tenant", "vip=50%")
    others = connect(address=daemon.address, tenant="batch")
    vip = connect(address=daemon.address, tenant="vip")
    total = others.stats()["node"]["tiers"]["host"]["total"]
    assert total >= 8
    for seed in range(3 * total):
        others.put(*make_blocks(seed, 1))
    assert held(others.stats()) == {"vip": {}, "batch": {"host": total}}
    tokens, blocks = make_blocks(999, total // 2)
    assert vip.put(tokens, blocks) == total // 2
    for seed in range(1000, 1000 + 3 * total):
        others.put(*make_blocks(seed, 1))
    assert vip.lookup(tokens) == len(tokens)
    (row,) = [each for each in vip.stats()["node"]["tenants"] if each["tenant"] == "vip"]
    assert row == {
        "tenant": "vip",
        "slots": {"host": total // 2},
        "guaranteed": {"host": total // 2},
    }


@pytest.mark.parametrize("salts", [("", ""), ("a", "a"), ("", "b"), ("b", "")])
def test_a_tenant_finds_nothing_of_another(serve, connect, make_blocks, salts):
    daemon = serve()
    tokens, blocks = make_blocks(1, 3)
    first, second, nobody = (
        connect(address=daemon.address, tenant=name, salt=salt)
        for name, salt in (("a", salts[0]), ("b", salts[1]), ("", salts[0]))
    )
    assert first.put(tokens, blocks) == 3
    for other in (second, nobody):
        assert other.lookup(tokens) == 0
        assert other.get(tokens).shape[0] == 0
        assert other.why(tokens) == NEVER
    assert second.put(tokens, blocks) == 3
    assert first.get(tokens).shape[0] == second.get(tokens).shape[0] == 3
    assert held(second.stats()) == {"a": {"host": 3}, "b": {"host": 3}}


def test_tenants_share_where_the_operator_says_so_and_the_first_is_charged(
    serve, connect, make_blocks
):
    daemon = serve("host:1MiB", "n.sock", "--share-tenants")
    tokens, blocks = make_blocks(1, 3)
    first, second = (connect(address=daemon.address, tenant=name) for name in ("a", "b"))
    assert first.put(tokens, blocks) == 3
    assert second.put(tokens, blocks) == 0
    assert second.get(tokens).shape[0] == 3
    assert held(second.stats()) == {"a": {"host": 3}}


def test_clearing_a_tenant_survives_a_restart(serve, connect, make_blocks, disk_tiers) -> None:
    daemon = serve(disk_tiers)
    clients = {name: connect(address=daemon.address, tenant=name) for name in ("a", "b", "")}
    prompts = {name: make_blocks(seed, 2) for seed, name in enumerate(clients)}
    for name, client in clients.items():
        client.put(*prompts[name])
        client.wait_idle()
    with AdminClient(daemon.address) as admin:
        assert admin.clear(tenant="a") == 4
        admin.wait_idle(10.0)
        with pytest.raises(ConfigError, match="nothing of 'a' is kept"):
            admin.clear(tenant="a")
        with pytest.raises(ConfigError, match="in every tier"):
            admin.clear(["host"], tenant="b")
    daemon.kill()
    again = serve(disk_tiers, "m.sock")
    clients = {name: connect(address=again.address, tenant=name) for name in ("a", "b", "")}
    found = {name: client.lookup(prompts[name][0]) for name, client in clients.items()}
    assert found == {"a": 0, "b": 8, "": 8}
    client = clients[""]
    both = {"host": 2, "disk": 2}  # what was read into the host is theirs, too
    assert held(client.stats()) == {tenant_tag(name).hex(): both for name in ("b", "")}
    with AdminClient(again.address) as admin:
        assert admin.clear(tenant="b") == 4  # by a name that this daemon has not heard yet
        assert admin.clear(tenant="") == 4
    assert [each.lookup(prompts[name][0]) for name, each in clients.items()] == [0, 0, 0]


def test_clearing_a_namespace_by_model_and_by_tag(serve, connect, make_blocks) -> None:
    daemon = serve()
    tokens, blocks = make_blocks(1, 2)
    clients = [connect(address=daemon.address, namespace=name) for name in ("llama", "qwen")]
    for client in clients:
        client.put(tokens, blocks)
    with AdminClient(daemon.address) as admin:
        spaces = admin.stats()["node"]["namespaces"]
        assert {(each["model"], each["slots"]["host"]) for each in spaces} == {
            ("llama", 2),
            ("qwen", 2),
        }
        assert admin.clear(namespace="llama") == 2
        assert [client.lookup(tokens) for client in clients] == [0, 8]
        (tag,) = [each["tag"] for each in admin.stats()["node"]["namespaces"]]
        assert admin.clear(namespace=tag) == 2


class TestWhy:
    def test_another_namespace_is_named_with_what_differs(self, serve, connect, make_blocks):
        daemon = serve()
        tokens, blocks = make_blocks(1, 2)
        connect(address=daemon.address, namespace="llama rev 1", salt="s").put(tokens, blocks)
        other = connect(address=daemon.address, namespace="llama rev 2", salt="s")
        assert other.why(tokens) == (
            "stored under another namespace (model 'llama rev 1', not 'llama rev 2')"
        )
        assert other.why(make_blocks(2, 2)[0]) == NEVER
        assert other.why([1, 2]) == ""

    def test_another_salt_cannot_be_told_from_never_stored(self, serve, connect, make_blocks):
        daemon = serve()
        tokens, blocks = make_blocks(1, 2)
        connect(address=daemon.address, salt="theirs").put(tokens, blocks)
        connect(address=daemon.address, namespace="other", salt="theirs").put(tokens, blocks)
        probe = connect(address=daemon.address, salt="mine")
        assert probe.why(tokens) == probe.why(make_blocks(2, 2)[0]) == NEVER
        probe = connect(address=daemon.address, namespace="third", salt="mine")
        assert probe.why(tokens) == NEVER

    def test_another_salt_is_told_where_the_operator_allows_it(self, serve, connect, make_blocks):
        daemon = serve("host:1MiB", "n.sock", "--explain-across-salts")
        tokens, blocks = make_blocks(1, 2)
        connect(address=daemon.address, salt="theirs").put(tokens, blocks)
        probe = connect(address=daemon.address, salt="mine")
        assert probe.why(tokens) == "stored under another salt"

    def test_what_is_known_of_the_block_itself_comes_first(self, serve, connect, make_blocks):
        daemon = serve()
        tokens, blocks = make_blocks(1, 2)
        connect(address=daemon.address, namespace="a").put(tokens, blocks)
        ours = connect(address=daemon.address, namespace="b")
        ours.put(tokens, blocks)
        assert ours.why(tokens) == ""
        ours.forget(tokens[:4])
        assert ours.why(tokens).startswith("cleared in host")
        with AdminClient(daemon.address) as admin:
            assert admin.clear(namespace="a") == 2


def test_a_name_that_is_too_long_is_refused_at_once(connect) -> None:
    with pytest.raises(ConfigError, match="257 characters"):
        connect(tenant="n" * 257)


@pytest.mark.parametrize(
    ("parent", "family", "message"),
    [(b"", b"short", "5 bytes are not 16"), (bytes(16), bytes(16), "only the first block")],
)
def test_a_family_that_is_none_is_refused(serve, connect, parent, family, message) -> None:
    session = connect(address=serve().address)._session
    with pytest.raises(CallRefusedError, match=message):
        session.call(wire.Reserve("r", parent, b"k" * 16, [], "", family), wire.Reserved)
    with pytest.raises(CallRefusedError, match="are not 16"):
        session.call(wire.Why(b"k" * 16, family[:3]), wire.Because)
