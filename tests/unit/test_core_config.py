"""Sizes and tiers as an operator writes them: what is read, and how each mistake is told."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest

from kvstrata.core.config import (
    BYPASS_BYTES,
    Limits,
    NodeConfig,
    TierConfig,
    parse_bytes,
    parse_tiers,
    tier_names,
)
from kvstrata.core.errors import ConfigError
from kvstrata.core.tier import Admission, TierKind

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


HOST = TierConfig(TierKind.HOST, 2 * GIB)


BYPASSED = TierConfig(TierKind.HOST, BYPASS_BYTES, bypass=True)


def disk(directory: str, admission: Admission = Admission.WRITE_THROUGH) -> TierConfig:
    return TierConfig(TierKind.DISK, 20 * GIB, directory, admission)


def shared(directory: str, **more) -> TierConfig:
    return TierConfig(TierKind.SHARED, 20 * GIB, directory, **more)


def stored(url: str, **more) -> TierConfig:
    return TierConfig(TierKind.OBJECT, 20 * GIB, url=url, **more)


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
        ("host:2GiB,disk:/a:20GiB,disk:/b:20GiB", (HOST, disk("/a"), disk("/b"))),
        ("host:2GiB,disk:/a:20GiB:on-evict", (HOST, disk("/a", Admission.ON_EVICT))),
        ("host:2GiB,disk:/a:20GiB:frequency", (HOST, disk("/a", Admission.FREQUENCY))),
        ("host:2GiB,disk:/a:20GiB:write-through", (HOST, disk("/a"))),
        ("host:2GiB:bypass,disk:/a:20GiB", (replace(HOST, bypass=True), disk("/a"))),
        ("disk:/var/kv:20GiB", (BYPASSED, disk("/var/kv"))),
        ("host:2GiB,shared:/nfs/k:v:20GiB", (HOST, shared("/nfs/k:v"))),
        ("host:2GiB,shared:/n:20GiB:zstd", (HOST, shared("/n", codec="zstd"))),
        (
            "host:2GiB,shared:/n:20GiB:fp8+zstd:on-evict",
            (HOST, shared("/n", codec="fp8+zstd", admission=Admission.ON_EVICT)),
        ),
        ("host:2GiB,object:s3://b:20GiB", (HOST, stored("s3://b"))),
        (
            "host:2GiB,object:s3://b/p?endpoint=http://[::1]:9000&region=x:20GiB:frequency",
            (
                HOST,
                stored(
                    "s3://b/p?endpoint=http://[::1]:9000&region=x", admission=Admission.FREQUENCY
                ),
            ),
        ),
        (
            "object:az://c?endpoint=http://h:1:20GiB:zstd+aes,disk:/a:20GiB",
            (BYPASSED, stored("az://c?endpoint=http://h:1", codec="zstd+aes"), disk("/a")),
        ),
    ],
)
def test_tiers(text, expected) -> None:
    assert parse_tiers(text) == expected


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "tiers: 'nothing'"),
        (" , ", "tiers: 'nothing'"),
        ("disk:/var/kv:20GiB,host:2GiB", "tiers: 'disk,host'"),
        ("host:2GiB:bypass", "tiers: a bypassed host"),
        ("host:2GiB:bypass,disk:/a:1GiB:on-evict", "tiers: a bypassed host"),
        ("disk:/a:1GiB:frequency", "tiers: a bypassed host"),
        ("host:2GiB:skip", "tiers.host: '2GiB:skip'"),
        ("host:2GiB,disk:/a:1GiB:seldom", "tiers.disk: 'seldom'"),
        ("host:2GiB,host:2GiB", "tiers: 'host,host'"),
        ("host:2GiB,disk:/a:1GiB,disk:/a:2GiB", "tiers: two tiers"),
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
        ("host:2GiB,disk:/a:1GiB:zstd", "tiers.disk: 'zstd'"),
        ("host:2GiB,shared:1GiB", "tiers.shared: 'shared:1GiB' names no directory"),
        ("host:2GiB,shared:/a:1GiB:zstd:aes", "tiers.shared: 'aes'"),
        ("host:2GiB,shared:/a:ten", "tiers.shared: 'ten'"),
        ("host:2GiB,object:1GiB", "tiers.object: 'object:1GiB' names no URL"),
        ("host:2GiB,object:s3://b:lots", "tiers.object: 'lots'"),
        ("host:2GiB,object:s3://b:1GiB,object:s3://b:1GiB", "tiers: two tiers"),
    ],
)
def test_tiers_refused(text, field) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_tiers(text)
    assert_told(caught.value, field)


def test_a_node_knows_its_tiers() -> None:
    assert NodeConfig((HOST,)).host == HOST
    assert NodeConfig((HOST,)).lower == {}
    config = NodeConfig((HOST, disk("/d"), disk("/e")))
    assert config.lower == {"disk": disk("/d"), "disk2": disk("/e")}
    assert tier_names(config.tiers) == ["host", "disk", "disk2"]


def test_configuration_is_frozen() -> None:
    for record, field in (
        (HOST, "kind"),
        (NodeConfig((HOST,)), "tiers"),
        (Limits(), "transfer_threads"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field, 1)


def test_every_limit_is_positive() -> None:
    found = dataclasses.asdict(Limits())
    assert found.pop("offload_priority_min") == 0
    assert 0 < found["lease_share_max"] < 1
    assert 0 < found["demote_share"] < 1
    assert all(value > 0 for value in found.values())
