"""vLLM's second model runner calls a connector by a class of its own: that class, on a CPU engine.

The runner itself needs a GPU. What it calls, in which order and with what, is vLLM's
`v1/worker/gpu/kv_connector.py`, which runs anywhere; the steps and the KV are a real engine's.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.engine

FIELDS = (
    "finished_sending", "finished_recving", "failed_recving", "invalid_block_ids",
    "kv_connector_stats", "kv_cache_events", "kv_connector_worker_meta",
)  # fmt: skip


class SecondRunner:
    """Calls the worker half as vLLM's second model runner does, in place of the first one."""

    def __init__(self, monkeypatch):
        from kvstrata.connectors.vllm import KvstrataConnector

        self.active, self.told = None, []
        self._patch = monkeypatch
        real_register, real_load = (
            KvstrataConnector.register_kv_caches,
            KvstrataConnector.start_load_kv,
        )

        def register(connector, caches):
            real_register(connector, caches)
            self.caches = caches

        def start(connector, forward_context, **kwargs):
            self.told.append(set(kwargs))
            real_load(connector, forward_context, **kwargs)

        monkeypatch.setattr(KvstrataConnector, "register_kv_caches", register)
        monkeypatch.setattr(KvstrataConnector, "start_load_kv", start)

    def take_over(self, engine):
        """From now on its steps are called as the second runner calls them."""
        from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
        from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

        self.active = ActiveKVConnector(engine.llm.llm_engine.vllm_config, self.caches)
        self._patch.setattr(
            KVConnectorModelRunnerMixin, "_get_kv_connector_output", staticmethod(self._step)
        )

    @contextmanager
    def _step(self, scheduler_output, *, defer_finalize=False):
        from vllm.v1.outputs import KVConnectorOutput

        assert not defer_finalize
        names = list(scheduler_output.num_scheduled_tokens)
        batch = SimpleNamespace(
            idx_mapping=list(range(len(names))),
            req_ids=names,
            num_tokens=scheduler_output.total_num_scheduled_tokens,
        )
        self.active.pre_forward(scheduler_output, batch if names else None, {})
        output = KVConnectorOutput()
        yield output
        self.active.finish_forward()
        done = self.active.post_forward(scheduler_output.finished_req_ids)
        for field in FIELDS:
            setattr(output, field, getattr(done, field))


def test_the_second_model_runners_calls(engine_on, prompts, reference, tmp_path, monkeypatch):
    extra = {"tiers": f"host:64MiB,disk:{tmp_path}:64MiB"}
    runner = SecondRunner(monkeypatch)
    with engine_on(extra, max_num_batched_tokens=96) as engine:
        runner.take_over(engine)
        cold = engine.ask(prompts)
        engine.forget()
        warm = engine.ask(prompts)
        engine.forget()
        (lone,) = engine.ask(prompts[2:3])  # while it waits nobody computes anything
        engine.forget()
        # Nothing arrives: vLLM hears of it from this class, too.
        monkeypatch.setattr(engine.worker, "_load", lambda job: job.copy.pages)
        failed = engine.ask(prompts)
        runner.active.reset_capture_state()
    assert [a.tokens for a in cold] == [a.tokens for a in warm] == reference
    assert lone.tokens == reference[2]
    assert lone.tokens_from["host"] == 256
    assert [a.tokens for a in failed] == reference
    assert [a.tokens_from["host"] for a in warm] == [64, 128, 256, 0]
    assert not any(sum(a.tokens_from.values()) for a in failed)
    with_forward = {"scheduler_output", "request_state_indices", "request_ids", "num_tokens"}
    assert with_forward | {"attn_metadata"} in runner.told
    assert set() in runner.told, "a step without a forward pass"
