"""SGLang with kvstrata answers as it does alone, whatever is kept and wherever it lies.

One engine serves most tests, which attach and detach a storage while it runs; a restart, another
layout and another model each need one of their own.
"""

from __future__ import annotations

import signal
import time

from kvstrata.storage.slab import SLAB_NAME

PAGE_TOKENS = 16


def whole_pages(prompt):
    """Return how many tokens of a prompt can come from kept pages: the last one is computed."""
    return (len(prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS


def tokens(answers):
    return [answer.tokens for answer in answers]


def from_storage(answers):
    return [answer.from_storage for answer in answers]


def test_what_was_attached_and_detached_is_still_there_at_the_next_attach(
    engine, daemon, prompts, reference
):
    settings = {"address": daemon.address}
    with engine.attached(**settings):
        cold = engine.ask(prompts)
    assert tokens(cold) == reference
    assert from_storage(cold) == [0] * len(prompts)
    assert from_storage(engine.ask(prompts[:1])) == [0], "detached"
    with engine.attached(**settings):
        warm = engine.ask(prompts)
        assert tokens(warm) == reference
        assert from_storage(warm) == [whole_pages(prompt) for prompt in prompts]
        engine.clear()
        engine.forget()
        cleared = engine.ask(prompts)
    assert tokens(cleared) == reference
    assert from_storage(cleared) == [0] * len(prompts)


def test_without_zero_copy_it_is_slower_and_the_same(engine, daemon, prompts, reference):
    settings = {"address": daemon.address, "interface_v1": 0}
    with engine.attached(**settings):
        assert tokens(engine.ask(prompts[:6])) == reference[:6]
    with engine.attached(**settings):
        generic = engine.ask(prompts[:6])
    with engine.attached(address=daemon.address):
        zero_copy = engine.ask(prompts[:6])
    assert tokens(generic) == tokens(zero_copy) == reference[:6]
    assert from_storage(generic) == from_storage(zero_copy)
    assert from_storage(generic) == [whole_pages(prompt) for prompt in prompts[:6]]


def test_answers_under_eviction(engine, daemon, prompts, reference):
    # 31 pages of 64 KiB in the host: most of what is asked for has been evicted to disk.
    daemon.signal(signal.SIGKILL)
    daemon.tiers = f"host:2MiB,disk:{daemon.folder / 'small'}:16MiB"
    daemon.start()
    with engine.attached(address=daemon.address):
        for _ in range(3):
            assert tokens(engine.ask(prompts)) == reference
            daemon.statistics()
            engine.forget()
    counters = daemon.statistics()["counters"]
    assert counters["hit_blocks_staged"] > 0, "nothing came from disk"


def test_salts_are_isolated(engine, daemon, prompts, reference):
    prompt, answer = prompts[7], reference[7]
    with engine.attached(address=daemon.address):
        for extra in ({}, {"extra_key": "a"}, {"extra_key": "b"}):
            (first,) = engine.ask([prompt], **extra)
            assert (first.tokens, first.from_storage) == (answer, 0), extra
            daemon.statistics()
            engine.forget()
            (again,) = engine.ask([prompt], **extra)
            assert (again.tokens, again.from_storage) == (answer, whole_pages(prompt)), extra
            engine.forget()


def test_a_daemon_that_is_killed_and_comes_back_changes_no_answer(
    engine, daemon, prompts, reference
):
    with engine.attached(address=daemon.address, retry_interval_s=0.1, call_timeout_s=0.5):
        assert tokens(engine.ask(prompts[:6])) == reference[:6]
        daemon.statistics()
        engine.forget()
        daemon.signal(signal.SIGKILL)
        alone = engine.ask(prompts)
        assert tokens(alone) == reference
        assert from_storage(alone) == [0] * len(prompts)
        engine.forget()
        daemon.start()
        deadline = time.monotonic() + 30
        while not sum(from_storage(engine.ask(prompts[-1:]))):  # until it has found it again
            assert time.monotonic() < deadline, "the engine does not find the daemon"
            engine.forget()
        engine.forget()
        back = engine.ask(prompts[:6])
        assert tokens(back) == reference[:6]
        assert sum(from_storage(back)) > 0, "the disk was recovered"
        engine.forget()
        daemon.signal(signal.SIGSTOP)
        assert tokens(engine.ask(prompts)) == reference
        daemon.signal(signal.SIGCONT)


def test_corrupt_blocks_are_computed_again(engine, daemon, prompts, reference):
    with engine.attached(address=daemon.address):
        engine.ask(prompts)
    daemon.statistics()
    daemon.signal(signal.SIGKILL)
    slab = daemon.folder / "kv" / SLAB_NAME
    content = bytearray(slab.read_bytes())
    for place in range(1 << 20, len(content), 20_000):  # the index lies before
        content[place] ^= 0x40
    slab.write_bytes(content)
    daemon.start()
    with engine.attached(address=daemon.address):
        assert tokens(engine.ask(prompts)) == reference
    assert daemon.statistics()["counters"]["corrupt_blocks"] > 0


def test_a_wrong_attach_is_refused_with_the_remedy_and_the_engine_goes_on(
    engine, daemon, prompts, reference
):
    assert "known keys are address" in engine.attach_refused(adress="ipc:///x")
    missing = engine.attach_refused(address=f"ipc://{daemon.folder}/none.sock")
    assert "start kvstrata serve there first" in missing
    assert tokens(engine.ask(prompts[:3])) == reference[:3]
    with engine.attached(address=daemon.address):
        assert tokens(engine.ask(prompts[:3])) == reference[:3]


def test_an_engine_restart_in_another_layout_finds_every_page(
    engine, engine_on, daemon, prompts, reference
):
    with engine.attached(address=daemon.address):
        engine.ask(prompts)
    with engine_on({"address": daemon.address}, hicache_mem_layout="layer_first") as second:
        warm = second.ask(prompts)
    assert tokens(warm) == reference
    assert from_storage(warm) == [whole_pages(prompt) for prompt in prompts]


def test_two_engines_at_once_share_pages_and_one_computes_in_parts(
    engine, engine_on, daemon, prompts, reference
):
    settings = {"address": daemon.address}
    with (
        engine_on(settings, chunked_prefill_size=4 * PAGE_TOKENS) as second,
        engine.attached(**settings),
    ):
        for writer, reader, part in ((second, engine, slice(6)), (engine, second, slice(6, 12))):
            cold = writer.ask(prompts[part])
            assert tokens(cold) == reference[part]
            assert from_storage(cold) == [0] * 6
            writer.forget()  # once everything is written
            daemon.statistics()
            warm = reader.ask(prompts[part])
            assert tokens(warm) == reference[part]
            assert from_storage(warm) == [whole_pages(prompt) for prompt in prompts[part]]


def test_a_private_daemon_keeps_pages_on_disk_and_another_model_finds_none(
    engine, engine_on, prompts, reference, make_llama, tmp_path
):
    settings = {"tiers": f"host:64MiB,disk:{tmp_path / 'kv'}:64MiB"}
    for times in range(2):
        with engine.attached(**settings):  # each attach starts a daemon, each detach ends it
            answers = engine.ask(prompts)
        assert tokens(answers) == reference
        assert from_storage(answers) == [times * whole_pages(prompt) for prompt in prompts]
    other = make_llama(tmp_path / "other", seed=1)
    with engine_on(settings, model=other) as second:
        strange = second.ask(prompts[:4])
    assert from_storage(strange) == [0] * 4
    assert tokens(strange) != reference[:4]


def test_two_ranks_keep_a_shard_each(engine_on, prompts, reference, tmp_path):
    settings = {"tiers": f"host:16MiB,disk:{tmp_path}/{{tp_rank}}:16MiB"}
    with engine_on(settings, tp_size=2) as engine:
        assert tokens(engine.ask(prompts[:6])) == reference[:6]
        engine.forget()
        warm = engine.ask(prompts[:6])
    assert tokens(warm) == reference[:6]
    assert from_storage(warm) == [whole_pages(prompt) for prompt in prompts[:6]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_a_conversation_grows_and_each_turn_finds_the_ones_before(engine, daemon, prompts):
    asked, kept = list(prompts[4]), 1
    with engine.attached(address=daemon.address):
        for turn in range(4):
            (answer,) = engine.ask([asked])
            assert answer.from_storage == whole_pages(asked[:kept]), "the answer's own pages, too"
            daemon.statistics()
            engine.forget()
            kept = (len(asked) + len(answer.tokens) - 1) // PAGE_TOKENS * PAGE_TOKENS + 1
            asked += [*answer.tokens, *prompts[turn][:37]]


def test_new_weights_in_a_running_engine_find_nothing_of_the_old(
    engine_on, daemon, make_llama, prompts, reference, tmp_path
):
    """SGLang does not tell its storage of them: it must notice, and be told their name."""
    other = make_llama(tmp_path / "other", seed=1)
    with engine_on() as engine:
        with engine.attached(address=daemon.address):
            assert tokens(engine.ask(prompts[:4])) == reference[:4]
            daemon.statistics()
            engine.update_weights(other)
            updated = engine.ask(prompts[:4])
        assert from_storage(updated) == [0] * 4
        alone = engine.ask(prompts[:4])
        assert tokens(updated) == tokens(alone)
        assert tokens(updated) != reference[:4], "the same answers would show nothing"
        engine.forget()
        assert "weights_revision" in engine.attach_refused(address=daemon.address)
        settings = {"address": daemon.address, "weights_revision": "two"}
        with engine.attached(**settings):
            assert from_storage(engine.ask(prompts[:4])) == [0] * 4
            daemon.statistics()
            engine.forget()
            warm = engine.ask(prompts[:4])
        assert tokens(warm) == tokens(alone)
        assert from_storage(warm) == [whole_pages(prompt) for prompt in prompts[:4]]
