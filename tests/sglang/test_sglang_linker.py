"""SGLang's UnifiedCacheLinker: device to tiers without a host pool, layer by layer.

One engine serves all tests but the restart, which needs a second one.
"""

from __future__ import annotations

import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from kit import SharedDaemon

PAGE_TOKENS = 16


def whole_pages(prompt):
    """Return how many tokens of a prompt can come from kept pages: the last one is computed."""
    return (len(prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS


def tokens(answers):
    return [answer.tokens for answer in answers]


def cached(answers):
    return [answer.cached for answer in answers]


def linked_options(address, **ours):
    return {
        "enable_hierarchical_cache": False,
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": {
            "linker": "KvstrataLinker",
            "linker_module_path": "kvstrata.connectors.sglang.linker",
            "linker_extra_config": {"address": address, **ours},
        },
    }


def counters(daemon):
    return daemon.statistics()["counters"]


def wait_saved(daemon):
    """Return once SGLang's last save has reached the daemon: two looks in a row see the same."""
    deadline = time.monotonic() + 30
    before, now = -1, counters(daemon)["stored_blocks"]
    while before != now:
        assert time.monotonic() < deadline, "the saves do not end"
        time.sleep(0.3)
        before, now = now, counters(daemon)["stored_blocks"]


def find_again(engine, prompt, answer):
    """Ask until the engine has found a daemon that was started anew; each call is one step."""
    deadline = time.monotonic() + 30
    engine.forget()
    while not (found := engine.ask(prompt))[0].cached:
        assert tokens(found) == answer
        assert time.monotonic() < deadline, "the engine does not find the daemon"
        time.sleep(0.2)
        engine.forget()


@pytest.fixture(scope="module")
def common():
    """One daemon for the module."""
    folder = Path(tempfile.mkdtemp(prefix="kv"))
    shared = SharedDaemon(folder)
    yield shared
    if shared.process.poll() is None:
        shared.signal(signal.SIGCONT)
        shared.signal(signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def linked(engine_on, common):
    """One engine with the linker."""
    limits = {"retry_interval_s": 0.1, "call_timeout_s": 0.5}
    with engine_on(None, **linked_options(common.address, **limits)) as engine:
        yield engine


def test_cold_and_warm_answers_are_those_of_sglang_alone(linked, common, prompts, reference):
    cold = linked.ask(prompts)
    assert tokens(cold) == reference
    assert cached(cold) == [0] * len(prompts)
    wait_saved(common)
    linked.forget()
    warm = linked.ask(prompts)
    assert tokens(warm) == reference
    assert cached(warm) == [whole_pages(prompt) for prompt in prompts]
    wait_saved(common)


def test_pages_of_the_storage_backend_are_the_linkers(linked, engine, common, prompts, reference):
    with engine.attached(address=common.address):
        stored = engine.ask(prompts)
    assert tokens(stored) == reference
    assert [each.from_storage for each in stored] == [whole_pages(prompt) for prompt in prompts]
    own = [list(reversed(prompt)) for prompt in prompts[:4]]
    with engine.attached(address=common.address):
        there = engine.ask(own)
    wait_saved(common)
    linked.forget()
    here = linked.ask(own)
    assert tokens(here) == tokens(there)
    assert cached(here) == [whole_pages(prompt) for prompt in own]


def test_salts_are_isolated(linked, common, prompts, reference):
    for extra in ({"extra_key": "a"}, {"extra_key": "b"}):
        linked.forget()
        (first,) = linked.ask(prompts[7:8], **extra)
        assert (first.tokens, first.cached) == (reference[7], 0), extra
        wait_saved(common)
        linked.forget()
        (again,) = linked.ask(prompts[7:8], **extra)
        assert (again.tokens, again.cached) == (reference[7], whole_pages(prompts[7])), extra


@pytest.fixture(scope="module")
def small(engine_on, common):
    """An engine that computes in parts, and begins more requests than it has room to end."""
    options = {"chunked_prefill_size": 4 * PAGE_TOKENS, "schedule_conservativeness": 0.01}
    options |= linked_options(common.address, retry_interval_s=0.1, call_timeout_s=0.5)
    with engine_on(None, log_level="info", **options) as running:
        yield running


def test_a_new_engine_finds_every_page(linked, small, common, prompts, reference):
    linked.ask(prompts)
    wait_saved(common)
    assert linked.process.poll() is None
    warm = small.ask(prompts)
    assert tokens(warm) == reference
    assert cached(warm) == [whole_pages(prompt) for prompt in prompts]


def test_what_is_computed_in_parts_is_kept(linked, small, common, prompts):
    own = [list(reversed(prompt)) for prompt in prompts[4:8]]
    parted = small.ask(own)
    assert cached(parted) == [0] * len(own)
    sizes = [int(each) for each in re.findall(r"#new-token: (\d+)", small.log_text())]
    assert 0 < max(sizes) <= 4 * PAGE_TOKENS, "no prompt went in whole"
    wait_saved(common)
    linked.forget()
    whole = linked.ask(own)
    assert tokens(whole) == tokens(parted)
    assert cached(whole) == [whole_pages(prompt) for prompt in own]


def test_retracted_requests_answer_the_same(small, common, prompts):
    """Four requests begin with 100 tokens each and end with 380; there is room for 1024."""
    four = [prompts[number][:100] for number in (5, 6, 7, 11)]
    # With `ignore_eos` SGLang would keep room for all of an answer, and retract nothing.
    more = {"max_tokens": 280, "ignore_eos": False, "logit_bias": {"2": -100.0}}
    small.forget()
    alone = []
    for prompt in four:
        alone += small.ask_at_once([prompt], **more)
        small.forget()
    assert "Retract requests" not in small.log_text()
    for _ in range(2):  # the second time on kept pages
        assert small.ask_at_once(four, **more) == alone
        wait_saved(common)
        small.forget()
    assert "Retract requests" in small.log_text()
    assert cached(small.ask(four)) == [whole_pages(prompt) for prompt in four]


def test_requests_aborted_while_they_load_or_run_leave_right_pages(
    small, common, prompts, reference
):
    chosen = (0, 1, 5, 6, 7, 11)
    six, right = [prompts[n] for n in chosen], [reference[n] for n in chosen]
    small.forget()
    small.ask(six)
    wait_saved(common)
    ends = [six[n] + prompts[2][: 40 * n] for n in range(6)]  # those load, and go on in parts
    small.forget()
    whole = tokens(small.ask(ends))
    small.forget()
    for after_s in (0, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08):
        answers = small.ask_at_once(ends, abort_s={1: after_s, 3: after_s, 5: after_s})
        for number, answer in enumerate(answers):
            assert answer.tokens == whole[number][: len(answer.tokens)]
            assert answer.aborted or answer.tokens == whole[number]
            assert not answer.aborted or number in {1, 3, 5}
        small.forget()
    host = common.statistics()["tiers"]["host"]
    assert host["filling"] + host["staged"] + host["in_use"] == 0
    warm = small.ask(six)
    assert tokens(warm) == right
    assert cached(warm) == [whole_pages(prompt) for prompt in six]


def test_what_lies_on_disk_is_a_miss_now_and_a_hit_at_the_next_asking(
    linked, common, prompts, reference
):
    common.signal(signal.SIGKILL)
    common.start()  # with an empty host; the disk is recovered
    find_again(linked, prompts[-1:], reference[-1:])
    missed = 0
    for prompt, answer in zip(prompts[:6], reference[:6], strict=True):
        linked.forget()
        (first,) = linked.ask([prompt])
        assert first.tokens == answer
        missed += first.cached == 0
        wait_saved(common)
        linked.forget()
        (again,) = linked.ask([prompt])
        assert (again.tokens, again.cached) == (answer, whole_pages(prompt))
    assert missed, "nothing lay below the host"


def test_a_daemon_that_is_killed_or_hangs_costs_time_only(linked, common, prompts, reference):
    linked.forget()
    common.signal(signal.SIGSTOP)
    assert tokens(linked.ask(prompts[:6])) == reference[:6]
    common.signal(signal.SIGCONT)
    linked.forget()
    common.signal(signal.SIGKILL)
    alone = linked.ask(prompts)
    assert tokens(alone) == reference
    linked.forget()
    common.start()
    find_again(linked, prompts[-1:], reference[-1:])


def test_answers_under_eviction(linked, common, prompts, reference):
    common.signal(signal.SIGKILL)
    # 31 pages of 64 KiB in the host: most of what is asked for has been evicted to disk.
    common.tiers = f"host:2MiB,disk:{common.folder / 'small'}:16MiB"
    common.start()
    find_again(linked, prompts[-1:], reference[-1:])
    hits = 0
    for _ in range(3):
        answers = linked.ask(prompts)
        assert tokens(answers) == reference
        hits += sum(cached(answers))
        wait_saved(common)
        linked.forget()
    assert hits > 0


def test_pages_of_old_weights_are_never_found_under_new_ones(
    linked, common, make_llama, tmp_path, prompts, reference
):
    """Comes last: an engine with new weights is not served any more."""
    linked.forget()
    linked.ask(prompts[:1])
    wait_saved(common)
    linked.forget()
    (warm,) = linked.ask(prompts[:1])
    assert (warm.tokens, warm.cached) == (reference[0], whole_pages(prompts[0]))
    linked.update_weights(make_llama(tmp_path / "other", seed=1))
    before = counters(common)["stored_blocks"]
    first = linked.ask(prompts[:4])
    assert cached(first) == [0] * 4
    assert tokens(first) != reference[:4]
    linked.forget()
    again = linked.ask(prompts[:4])
    assert (tokens(again), cached(again)) == (tokens(first), [0] * 4)
    assert counters(common)["stored_blocks"] == before
