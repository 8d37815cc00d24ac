"""Counters in vLLM's statistics, its log line and its registry of metrics."""

from __future__ import annotations

import json
import os
import signal

import pytest

pytestmark = pytest.mark.engine


@pytest.fixture
def stats():
    from kvstrata.connectors.vllm.metrics import ConnectorStats

    return ConnectorStats()


def test_counts_survive_the_way_to_another_process(stats):
    from kvstrata.connectors.vllm.connector import KvstrataConnector

    stats.count("loads")
    stats.count("loaded_tokens", 64, "host")
    stats.waited(0.25)
    stats.count("failed_loads", 0)
    sent = json.loads(json.dumps(stats.take().to_dict()))
    assert stats.is_empty()
    assert stats.take() is None
    arrived = KvstrataConnector.build_kv_connector_stats(sent)
    assert arrived.data == {"loads": 1, "loaded_tokens": {"host": 64}, "waits": [0.25]}
    assert KvstrataConnector.build_kv_connector_stats().is_empty()


def test_counts_add_up_and_leave_their_parts_alone(stats):
    from kvstrata.connectors.vllm.metrics import ConnectorStats

    first = ConnectorStats({"loads": 1, "loaded_tokens": {"host": 64}, "waits": [1.0]})
    second = ConnectorStats({"loads": 2, "loaded_tokens": {"disk": 5, "host": 1}, "waits": [2.0]})
    both = first.aggregate(second)
    assert both.data == {
        "loads": 3,
        "loaded_tokens": {"host": 65, "disk": 5},
        "waits": [1.0, 2.0],
    }
    assert first.data == {"loads": 1, "loaded_tokens": {"host": 64}, "waits": [1.0]}
    assert stats.aggregate(first).data == first.data


def test_waits_are_bounded_and_the_rest_counted(stats):
    for _ in range(5000):
        stats.waited(1.0)
    assert len(stats.data["waits"]) + stats.data["uncounted_waits"] == 5000
    assert stats.data["uncounted_waits"] == 904


def test_the_log_line_says_what_happened():
    from kvstrata.connectors.vllm.metrics import ConnectorStats

    said = ConnectorStats(
        {
            "loaded_tokens": {"disk": 128},
            "loaded_bytes": 2_000_000_000,
            "load_seconds": 0.5,
            "waits": [0.01] * 9 + [0.5],
            "failed_loads": 1,
            "given_up": {"no daemon": 3},
        }
    ).reduce()
    assert said == {
        "kvstrata tokens from disk": 128,
        "kvstrata loaded MB": 2000.0,
        "kvstrata loaded GB/s": 4.0,
        "kvstrata saved MB": 0.0,
        "kvstrata wait p90 ms": 500.0,
        "kvstrata failed loads": 1,
        "kvstrata given up: no daemon": 3,
    }


def test_an_engine_counts_what_it_did(engine_on, prompts, tmp_path):
    from prometheus_client import REGISTRY

    def sample(name, **labels):
        labels = {"engine": "0", "model_name": str(model)} | labels
        return REGISTRY.get_sample_value(f"vllm:kvstrata_{name}", labels) or 0.0

    names = "loads failed_loads loaded_bytes saved_blocks saved_bytes load_seconds save_seconds"

    def samples():
        found = {name: sample(f"{name}_total") for name in names.split()}
        found |= {tier: sample("loaded_tokens_total", tier=tier) for tier in ("host", "disk")}
        found["no daemon"] = sample("given_up_total", why="no daemon")
        found["waits"] = sample("load_wait_seconds_count")
        return found

    extra = {"tiers": f"host:64MiB,disk:{tmp_path}:64MiB", "retry_interval_s": 3600}
    with engine_on(extra) as engine:
        model = engine.llm.llm_engine.vllm_config.model_config.served_model_name
        before = samples()
        engine.ask(prompts)  # 1 + 2 + 4 + 0 full blocks
        engine.forget()
        engine.ask(prompts)
        engine.wait_idle()
        block = engine.connector._scheduler.session.layout.block_bytes
    after = {name: value - before[name] for name, value in samples().items()}
    assert after["saved_blocks"] == 7
    assert after["saved_bytes"] == 7 * block
    assert after["loaded_bytes"] == 7 * block
    assert (after["loads"], after["waits"], after["failed_loads"]) == (3, 3, 0)
    assert (after["host"], after["disk"]) == (448, 0)
    assert 0 < after["load_seconds"] < 5
    assert 0 < after["save_seconds"] < 5
    with engine_on(extra) as engine:
        before = samples()
        engine.ask(prompts)
        pid = engine.connector.daemon_pid
        os.kill(pid, signal.SIGKILL)
        engine.forget()
        engine.ask(prompts)
    after = {name: value - before[name] for name, value in samples().items()}
    assert (after["host"], after["disk"]) == (0, 448)
    assert after["no daemon"] >= 3
