"""SGLang with kvstrata answers as it does alone, whatever is kept and wherever it lies."""

from __future__ import annotations

import os
import signal

from kvstrata.storage.slab import SLAB_NAME

PAGE_TOKENS = 16


def whole_pages(prompt):
    """Return how many tokens of a prompt can come from kept pages: the last one is computed."""
    return (len(prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS


def test_answers_survive_an_engine_restart(engine_on, daemon, prompts, reference, tmp_path):
    private = {"tiers": f"host:64MiB,disk:{tmp_path / 'kv'}:64MiB"}
    for settings in ({"address": daemon.address}, private):
        with engine_on(settings) as engine:
            cold = engine.ask(prompts)
        with engine_on(settings) as engine:
            warm = engine.ask(prompts)
        assert [answer.tokens for answer in cold] == reference
        assert [answer.from_storage for answer in cold] == [0] * len(prompts)
        assert [answer.tokens for answer in warm] == reference
        assert [answer.from_storage for answer in warm] == [whole_pages(p) for p in prompts]
    counters = daemon.statistics()["counters"]
    assert counters["corrupt_blocks"] == 0


def test_answers_under_eviction_and_in_every_layout(engine_on, daemon, prompts, reference):
    # 25 pages of 16 KiB in the host: most of what is asked for has been evicted to disk.
    daemon.signal(signal.SIGKILL)
    daemon.tiers = f"host:448KiB,disk:{daemon.folder / 'small'}:2MiB"
    daemon.start()
    for layout in ("layer_first", "page_first_direct"):
        with engine_on({"address": daemon.address}, hicache_mem_layout=layout) as engine:
            for _ in range(2):
                assert [answer.tokens for answer in engine.ask(prompts)] == reference
                engine.forget()
    node = daemon.statistics()
    assert node["tiers"]["host"]["evicted_blocks"] > 0, node
    assert node["counters"]["hit_blocks_staged"] > 0, "nothing came from disk"


def test_salts_and_extra_keys_are_isolated(engine_on, daemon, prompts, reference):
    prompt, answer = prompts[7], reference[7]
    with engine_on({"address": daemon.address}) as engine:
        for extra in ({}, {"extra_key": "a"}, {"extra_key": "b"}):
            (first,) = engine.ask([prompt], **extra)
            assert (first.tokens, first.from_storage) == (answer, 0), extra
            daemon.statistics()
            engine.forget()
            (again,) = engine.ask([prompt], **extra)
            assert (again.tokens, again.from_storage) == (answer, whole_pages(prompt)), extra
            engine.forget()


def test_another_models_pages_are_never_found(engine_on, daemon, prompts, tmp_path):
    from conftest import write_llama

    other = write_llama(tmp_path / "other", seed=1)
    settings = {"address": daemon.address}
    with engine_on(settings) as engine:
        engine.ask(prompts[:2])
    with engine_on(settings, model=other, served_model_name="same") as engine:
        answers = engine.ask(prompts[:2])
    assert [answer.from_storage for answer in answers] == [0, 0]


def test_a_daemon_that_is_killed_and_comes_back_changes_no_answer(
    engine_on, daemon, prompts, reference
):
    settings = {"address": daemon.address, "retry_interval_s": 0.1}
    with engine_on(settings) as engine:
        assert [answer.tokens for answer in engine.ask(prompts[:6])] == reference[:6]
        daemon.statistics()
        engine.forget()
        daemon.signal(signal.SIGKILL)
        alone = engine.ask(prompts)
        assert [answer.tokens for answer in alone] == reference
        assert [answer.from_storage for answer in alone] == [0] * len(prompts)
        engine.forget()
        daemon.start()
        engine.ask(prompts[:1])  # finds it again
        engine.forget()
        back = engine.ask(prompts[:6])
        assert [answer.tokens for answer in back] == reference[:6]
        assert sum(answer.from_storage for answer in back) > 0, "disk was recovered"
        engine.forget()
        os.kill(daemon.process.pid, signal.SIGSTOP)
        assert [answer.tokens for answer in engine.ask(prompts)] == reference
        os.kill(daemon.process.pid, signal.SIGCONT)


def test_corrupt_blocks_are_computed_again(engine_on, daemon, prompts, reference):
    with engine_on({"address": daemon.address}) as engine:
        engine.ask(prompts)
    daemon.statistics()
    daemon.signal(signal.SIGKILL)
    slab = daemon.folder / "kv" / SLAB_NAME
    content = bytearray(slab.read_bytes())
    for place in range(1 << 20, len(content), 20_000):  # the index lies before
        content[place] ^= 0x40
    slab.write_bytes(content)
    daemon.start()
    with engine_on({"address": daemon.address}) as engine:
        answers = engine.ask(prompts)
    assert [answer.tokens for answer in answers] == reference
    assert daemon.statistics()["counters"]["corrupt_blocks"] > 0
