"""Workers that split the heads: a block is whole once each of them has written its part."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.engine


def test_what_one_worker_could_not_do_was_not_done():
    from kvstrata.connectors.vllm.metadata import PageCopy, SaveJob, StepReport

    def job(name, *slots):
        return SaveJob(name, 1, PageCopy([], [], []), list(slots))

    first = StepReport({"a": 4, "b": 2}, [job("1", 3, 4), job("2", 5)], [job("3", 6)], 7, 10, 1.0)
    second = StepReport({"a": 1, "b": 2}, [job("1", 3, 4), job("3", 6)], [job("2", 5)], 7, 5, 2.0)
    both = first.aggregate(second)
    assert both.loaded == {"a": 1, "b": 2}
    assert [job.slots for job in both.saved] == [[3, 4]]
    assert sorted(job.slots for job in both.unsaved) == [[5], [6]]
    assert (both.step, both.workers) == (7, 2)
    assert (both.copied_bytes, both.copied_s) == (15, 2.0)
    third = both.aggregate(StepReport({"a": 4}, [], [job("1", 3, 4)], 7))
    assert third.loaded == {"a": 1, "b": 0}
    assert third.saved == []
    assert sorted(job.slots for job in third.unsaved) == [[3, 4], [5], [6]]


def test_two_workers_from_host_and_after_a_restart_from_disk(engine_on, prompts, tmp_path):
    extra = {"tiers": f"host:64MiB,disk:{tmp_path}:64MiB"}
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine_on(extra, **parallel) as engine:
        cold = engine.ask(prompts)
        engine.forget()
        warm = engine.ask(prompts)
        engine.wait_idle()
        counters = engine.counters()
    with engine_on(extra, **parallel) as engine:
        restarted = engine.ask(prompts)
    tokens = [[answer.tokens for answer in answers] for answers in (cold, warm, restarted)]
    assert tokens[0] == tokens[1] == tokens[2]
    assert [answer.tokens_from["host"] for answer in cold] == [0, 0, 0, 0]
    assert [answer.tokens_from["host"] for answer in warm] == [64, 128, 256, 0]
    assert [answer.tokens_from["disk"] for answer in restarted] == [64, 128, 256, 0]
    assert counters["corrupt_blocks"] == 0
