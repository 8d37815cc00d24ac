"""Requests that say how long their blocks are to be kept."""

from __future__ import annotations

import time

import pytest

from kvstrata.core.retention import BlockHint, Retention
from kvstrata.runtime.admin import AdminClient

pytestmark = pytest.mark.engine


@pytest.fixture
def hints():
    from kvstrata.connectors.vllm import hints

    return hints


@pytest.mark.parametrize("params", [None, {}, {"other": 1}, [], {"kvstrata": None}])
def test_a_request_that_asks_nothing(params, hints) -> None:
    assert hints.read_hints(params) == hints.RequestHints()


def test_what_is_asked_is_read(hints) -> None:
    found = hints.read_hints(
        {
            "kvstrata": {
                "retention": [{"end": 64, "priority": 90}],
                "tokens_from": {},
                "store": False,
                "tenant": "team",
                "pin_s": 60,
            }
        }
    )
    assert found.pin_s == 60
    assert found.tenant == "team"
    assert found.retention == [Retention(end=64, priority=90)]
    assert not found.store


@pytest.mark.parametrize(
    "wrong",
    [7, {"retention": 3}, {"retention": [{"priority": "high"}]}, {"retention": [{"ttl_s": -1}]},
     {"stor": True}, {"retention": [{}] * 1025}, {"retention": [{"start": 5, "end": 2}]},
     {"pin_s": -1}, {"pin_s": 3601}, {"pin_s": True}],
)  # fmt: skip
def test_a_wrong_hint_is_logged_and_ignored(wrong, hints, caplog) -> None:
    assert hints.read_hints({"kvstrata": wrong}) == hints.RequestHints()
    assert "is ignored" in caplog.text
    if isinstance(wrong, dict):
        theirs = hints.read_hints({"kvstrata": wrong | {"tenant": "team"}})
        assert theirs == hints.RequestHints(tenant="team")


@pytest.mark.parametrize("wrong", [{"tenant": 3}, {"tenant": "n" * 257}, {"tenant": ["a"]}])
def test_a_request_whose_tenant_cannot_be_read_is_nobodys(wrong, hints, caplog) -> None:
    assert hints.read_hints({"kvstrata": wrong}) is None
    assert "is ignored" in caplog.text


def test_ranges_are_counted_from_the_first_block_offered(hints) -> None:
    ranges = [Retention(0, 128, 80), Retention(64, 256, 50), Retention(512, None, 10)]
    assert hints.hints_for(ranges, 64, 0, 4) == [BlockHint(0, 2, 80), BlockHint(1, 3, 50)]
    assert hints.hints_for(ranges, 64, 2, 3) == [BlockHint(0, 1, 50)]
    assert hints.hints_for(ranges, 64, 8, 10) == [BlockHint(0, 2, 10)]


def asking(**hints):
    return {"extra_args": {"kv_transfer_params": {"kvstrata": hints}}}


def test_requests_say_how_long_they_are_kept(engine_on, prompts, reference, caplog):
    prompt, expected = prompts[2], reference[2]  # 4 full blocks

    def ask(**hints):
        """Return how many tokens came from the host for one more answer."""
        (answer,) = engine.ask([prompt], sampling=asking(**hints))
        engine.forget()
        assert answer.tokens == expected
        return answer.tokens_from["host"]

    with engine_on({"tiers": "host:64MiB"}) as engine:
        assert ask(store=False) == 0
        assert ask(store=False) == 0  # nothing was kept
        assert ask(retention=[{"start": 128, "ttl_s": 2.0}]) == 0
        assert ask(store=False) == 256
        time.sleep(2.1)
        assert ask(store=False) == 128
        assert engine.counters()["expired_blocks"] == 2
        assert ask(retention=[{"priority": 101}]) == 128
        assert "retention.priority: 101 is out of range" in caplog.text
        assert ask() == 256  # the wrong hint cost nothing


def test_requests_say_what_is_pinned(engine_on, prompts, reference):
    """Of 15 blocks in the host seven may be pinned: four of this prompt outlive any number more."""
    prompt, expected = prompts[2], reference[2]
    others = [[7 + number, *prompt[1:]] for number in range(6)]

    def flood():
        engine.ask(others, max_tokens=1)
        engine.forget()

    def ask(max_tokens=16, **hints):
        """Return how many tokens of the prompt came from the host; they are not stored anew."""
        (answer,) = engine.ask([prompt], max_tokens, sampling=asking(store=False, **hints))
        engine.forget()
        assert answer.tokens == expected[:max_tokens]
        return answer.tokens_from["host"]

    def pinned():
        """Return how many blocks leases keep."""
        with AdminClient(engine.connector.daemon_address) as admin:
            return admin.stats()["node"]["leased_blocks"]

    with engine_on({"tiers": "host:2MiB"}) as engine:
        engine.ask([prompt])
        flood()
        assert ask() == 0, "not pinned, it is evicted"
        # It ends in the step that saves its last block; the next one finds them all.
        engine.ask([prompt], 1, sampling=asking(pin_s=600))
        engine.wait_idle()
        engine.ask([prompts[3]])
        assert pinned() == 4
        flood()
        assert ask() == 256
        assert ask(pin_s=0) == 256
        assert pinned() == 0
        flood()
        assert ask() == 0


def test_requests_say_whose_they_are(engine_on, prompts, reference):
    with engine_on({"tiers": "host:64MiB", "tenant": "house"}) as engine:

        def ask(index, **hints):
            (answer,) = engine.ask([prompts[index]], sampling=asking(**hints))
            engine.forget()
            assert answer.tokens == reference[index]
            return answer.tokens_from["host"]

        assert ask(2, tenant="guest") == 0
        assert ask(2) == ask(2, tenant="other") == 0, "they are the guest's"
        assert ask(2, tenant=7) == 0, "nobody knows whose it is"
        assert ask(2, tenant="guest") == ask(2, tenant="house") == ask(2) == 256
        with AdminClient(engine.connector.daemon_address) as admin:
            rows = admin.stats()["node"]["tenants"]
        held = {each["tenant"]: each["slots"] for each in rows}
        assert held.keys() == {"guest", "house", "other"}
        assert held["guest"] == {"host": 4}  # as many full blocks as the prompt has
