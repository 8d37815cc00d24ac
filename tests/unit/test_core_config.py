"""Sizes and tiers as an operator writes them: what is read, and how each mistake is told."""

from __future__ import annotations

import dataclasses

import pytest

from kvstrata.core.config import Limits, NodeConfig, TierConfig, parse_bytes, parse_tiers
from kvstrata.core.errors import ConfigError
from kvstrata.core.tier import Tier

GIB = 1 << 30


def assert_told(error: ConfigError, field: str) -> None:
    """One sentence that names the field, and a hint."""
    assert error.message.startswith(field)
    assert not error.message.endswith(".")
    assert "\n" not in error.message
    assert error.hint
    assert "\n" not in error.hint
    assert str(error) == f"{error.message} (hint: {error.hint})"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("4096", 4096),
        ("4096b", 4096),
        ("1B", 1),
        ("2KiB", 2048),
        ("512MiB", 512 << 20),
        ("512mib", 512 << 20),
        ("2GiB", 2 * GIB),
        ("2 GiB", 2 * GIB),
        ("  2GiB ", 2 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("0.5KiB", 512),
        ("1kb", 1000),
        ("3MB", 3_000_000),
        ("20GB", 20_000_000_000),
        ("1TB", 10**12),
        ("1TiB", 1 << 40),
        ("1024TiB", 1 << 50),
        ("1125899906842624", 1 << 50),
    ],
)
def test_sizes(text, expected) -> None:
    assert parse_bytes(text, field="x") == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "GiB", "2 G iB", "2G", "2XiB", "-1GiB", "+1GiB", "1,5GiB", "1e3", ".5GiB"),
        *("1.GiB", "0x10", "nan", "inf", "2GiB;", "2GiB 3", "1_000", "1.5.5GiB"),
        *("0", "0GiB", "0.1", "1125899906842625", "1025TiB", "99999999TiB", "9" * 400),
    ],
)
def test_sizes_refused(text) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text, field="tiers.host")
    assert_told(caught.value, "tiers.host: ")
    assert repr(text) in caught.value.message


HOST = TierConfig(Tier.HOST, 2 * GIB)


def disk(directory: str) -> TierConfig:
    return TierConfig(Tier.DISK, 20 * GIB, directory)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host:2GiB", (HOST,)),
        (" host:2GiB ,", (HOST,)),
        ("host:2GiB,disk:/var/kv:20GiB", (HOST, disk("/var/kv"))),
        ("host:2GiB, disk:/var/kv:20GiB", (HOST, disk("/var/kv"))),
        ("host:2GiB,disk:/var/k:v:20GiB", (HOST, disk("/var/k:v"))),
        ("host:2GiB,disk:~/kv:20GiB", (HOST, disk("~/kv"))),
        ("host:2GiB,disk:a folder:20GiB", (HOST, disk("a folder"))),
    ],
)
def test_tiers(text, expected) -> None:
    assert parse_tiers(text) == expected


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "tiers: 'nothing'"),
        (" , ", "tiers: 'nothing'"),
        ("disk:/var/kv:20GiB", "tiers: 'disk'"),
        ("disk:/var/kv:20GiB,host:2GiB", "tiers: 'disk,host'"),
        ("host:2GiB,host:2GiB", "tiers: 'host,host'"),
        ("host:2GiB,disk:/a:1GiB,disk:/b:1GiB", "tiers: 'host,disk,disk'"),
        ("gpu:2GiB", "tiers: unknown tier 'gpu'"),
        ("host:2GiB,s3:bucket:1GiB", "tiers: unknown tier 's3'"),
        ("HOST:2GiB", "tiers: unknown tier 'HOST'"),
        ("2GiB", "tiers: unknown tier '2GiB'"),
        ("host", "tiers.host: ''"),
        ("host:", "tiers.host: ''"),
        ("host:much", "tiers.host: 'much'"),
        ("host:0", "tiers.host: '0'"),
        ("host:/shm:2GiB", "tiers.host: '/shm:2GiB'"),
        ("host:2GiB,disk:20GiB", "tiers.disk: 'disk:20GiB'"),
        ("host:2GiB,disk::20GiB", "tiers.disk: 'disk::20GiB'"),
        ("host:2GiB,disk:/var/kv", "tiers.disk: 'disk:/var/kv'"),
        ("host:2GiB,disk:/var/kv:", "tiers.disk: ''"),
        ("host:2GiB,disk:/var/kv:lots", "tiers.disk: 'lots'"),
        ("host:2GiB,disk", "tiers.disk: 'disk'"),
    ],
)
def test_tiers_refused(text, field) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_tiers(text)
    assert_told(caught.value, field)


def test_a_node_knows_its_tiers() -> None:
    assert NodeConfig((HOST,)).host == HOST
    assert NodeConfig((HOST,)).disk is None
    assert NodeConfig((HOST, disk("/d"))).disk == disk("/d")


def test_configuration_is_frozen() -> None:
    for record, field in (
        (HOST, "tier"),
        (NodeConfig((HOST,)), "tiers"),
        (Limits(), "transfer_threads"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field, 1)


def test_every_limit_is_positive() -> None:
    found = dataclasses.asdict(Limits())
    assert found.pop("offload_priority_min") == 0
    assert 0 < found["lease_share_max"] < 1
    assert all(value > 0 for value in found.values())
