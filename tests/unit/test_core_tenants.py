"""Guarantees as texts: what is read, what is refused, and how many slots they make."""

from __future__ import annotations

import pytest

from kvstrata.core.config import NodeConfig, parse_tenants, parse_tiers
from kvstrata.core.errors import ConfigError
from kvstrata.core.tenants import Guarantee, TenantConfig, guaranteed_slots, tenant_tag

TIERS = parse_tiers("host:1GiB,disk:/var/kv:10GiB")


def test_shares_and_sizes() -> None:
    found = parse_tenants(["a=30%", " b=host:512MiB,disk:2.5% ", "", "=1%", "x=y=100%"])
    assert found == (
        TenantConfig("a", (Guarantee("", share=0.3),)),
        TenantConfig(
            "b", (Guarantee("host", size_bytes=512 << 20), Guarantee("disk", share=0.025))
        ),
        TenantConfig("", (Guarantee("", share=0.01),)),
        TenantConfig("x=y", (Guarantee("", share=1.0),)),
    )
    assert parse_tenants([]) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "guarantees nothing"),
        ("a=", "guarantees nothing"),
        ("a=,", "guarantees nothing"),
        (f"{'n' * 257}=1%", "guarantees nothing"),
        ("a=0%", "is not a share"),
        ("a=101%", "is not a share"),
        ("a=nan%", "is not a share"),
        ("a=many%", "is not a share"),
        ("a=8GiB", "names no tier"),
        ("a=host:8furlongs", "is not a size"),
        ("a=host:1GiB,host:2GiB", "more than one thing"),
        ("a=30%,host:1GiB", "more than one thing"),
    ],
)
def test_what_guarantees_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_tenants([text])
    assert caught.value.hint


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a=60%", "b=60%"], "add up to 120.0%"),
        (["a=host:1GiB", "b=host:1%"], "in tier 'host' add up to 101.0%"),
        (["a=1%", "a=2%"], "named twice"),
        (["a=tape:1GiB"], "tier 'tape'"),
        ([f"{number}=host:1KiB" for number in range(257)], "257 have guarantees"),
    ],
)
def test_what_the_tiers_cannot_hold_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        NodeConfig(TIERS, tenants=parse_tenants(texts))
    assert caught.value.hint


def test_tenths_add_up_to_the_whole() -> None:
    texts = [f"{number}=10%" for number in range(10)]
    config = NodeConfig(TIERS, tenants=parse_tenants(texts))
    assert guaranteed_slots(config.tenants, "host", 1 << 30, 100) == [10] * 10


def test_slots_are_rounded_down_and_tiers_that_are_not_named_have_none() -> None:
    tenants = parse_tenants(["a=29%", "b=host:512MiB", "c=disk:1GiB"])
    assert guaranteed_slots(tenants, "host", 1 << 30, 100) == [29, 50, 0]
    assert guaranteed_slots(tenants, "disk", 10 << 30, 15) == [4, 0, 1]


def test_a_tag_is_the_name_s_and_the_same_everywhere() -> None:
    assert len({tenant_tag(""), tenant_tag("a"), tenant_tag("b")}) == 3
    assert tenant_tag("a").hex() == "24f17fa779607250"
