"""SGLang's UnifiedCacheLinker with two tensor-parallel ranks, which load together or not at all.

Each rank has a linker and a daemon of its own, with its half of each page. One engine writes and
ends; another one serves all tests.
"""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
from kit import SharedDaemon

from kvstrata.storage.slab import SLAB_NAME

PAGE_TOKENS = 16


def whole_pages(prompt):
    """Return how many tokens of a prompt can come from kept pages: the last one is computed."""
    return (len(prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS


def tokens(answers):
    return [answer.tokens for answer in answers]


def cached(answers):
    return [answer.cached for answer in answers]


def counters(daemon):
    return daemon.statistics()["counters"]


def wait_saved(daemons):
    """Return once SGLang's last save has reached the daemons: two looks in a row see the same."""
    deadline = time.monotonic() + 30
    before, now = [], [counters(each)["stored_blocks"] for each in daemons]
    while before != now:
        assert time.monotonic() < deadline, "the saves do not end"
        time.sleep(0.3)
        before, now = now, [counters(each)["stored_blocks"] for each in daemons]


def find_again(engine, prompt, answer):
    """Ask until both ranks have found daemons that were started anew; each call is one step."""
    deadline = time.monotonic() + 30
    engine.forget()
    while not (found := engine.ask([prompt]))[0].cached:
        assert tokens(found) == [answer]
        assert time.monotonic() < deadline, "the engine does not find the daemons"
        time.sleep(0.2)
        engine.forget()
    engine.forget()


@pytest.fixture(scope="module")
def daemons():
    """A daemon for each rank, in folders that have its number."""
    folder = Path(tempfile.mkdtemp(prefix="kv"))
    made = []
    for rank in range(2):
        (folder / str(rank)).mkdir()
        made.append(SharedDaemon(folder / str(rank)))
    yield made
    for each in made:
        each.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def options(daemons):
    """SGLang's arguments of an engine of two ranks with the linker."""
    address = f"ipc://{daemons[0].folder.parent}/{{tp_rank}}/node.sock"
    ours = {"address": address, "retry_interval_s": 0.1}
    return {
        "tp_size": 2,
        "enable_hierarchical_cache": False,
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": {
            "linker": "KvstrataLinker",
            "linker_module_path": "kvstrata.connectors.sglang.linker",
            "linker_extra_config": ours,
        },
    }


@pytest.fixture(scope="module")
def many():
    """Two dozen prompts; none begins as another one does."""
    luck = random.Random(7)
    lengths = [luck.randrange(33, 300) for _ in range(20)] + [48, 64, 128, 129]
    return [[luck.randrange(3, 512) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def cold(engine_on, options, daemons, many):
    """The answers of an engine that has computed all, and ended."""
    with engine_on(None, **options) as first:
        answers = first.ask(many)
        assert cached(answers) == [0] * len(many)
        wait_saved(daemons)
    return tokens(answers)


@pytest.fixture(scope="module")
def refused(many):
    """Which loads of rank 1 are refused: in one pass over the prompts and in most of another."""
    return range(3, 2 * len(many) - 12, 3)


@pytest.fixture(scope="module")
def linked(engine_on, options, cold, refused):
    """An engine in which one rank, after the answer to its question, may have no page to lease."""
    assert cold
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFUSED_LOADS_OF_RANK_1", ",".join(map(str, refused)))
        with engine_on(None, **options) as engine:
            yield engine


def test_each_rank_keeps_its_half_of_every_page(daemons, many, cold):
    assert len(set(cold)) > len(many) // 2, "the same answers would show nothing"
    stored = [counters(each)["stored_blocks"] for each in daemons]
    assert stored[0] == stored[1] >= sum(map(whole_pages, many)) // PAGE_TOKENS
    layouts = [each.statistics()["layout"] for each in daemons]
    assert ["tp=0/2" in layouts[0], "tp=1/2" in layouts[1]] == [True, True]


def test_a_new_engine_loads_on_both_ranks_what_both_can_lease(linked, many, cold, refused):
    """Also among requests that are asked together, of which some load and others compute."""
    warm = linked.ask(many)
    assert tokens(warm) == cold
    assert cached(warm) == [
        0 if number in refused else whole_pages(prompt) for number, prompt in enumerate(many, 1)
    ]
    linked.forget()
    assert [each.tokens for each in linked.ask_at_once(many)] == cold
    linked.forget()
    again = linked.ask(many[:6])
    assert tokens(again) == cold[:6]
    assert cached(again) == [whole_pages(prompt) for prompt in many[:6]], "no more are refused"


def test_a_shard_that_one_rank_has_lost(linked, daemons, many, cold):
    lost = daemons[1]
    lost.signal(signal.SIGKILL)
    shutil.rmtree(lost.folder / "kv")
    lost.start()
    linked.forget()
    linked.ask(many[-1:])
    find_again(linked, many[-1], cold[-1])
    alone = linked.ask(many[:6])
    assert tokens(alone) == cold[:6]
    assert cached(alone) == [0] * 6
    wait_saved(daemons)
    linked.forget()
    again = linked.ask(many[:6])
    assert tokens(again) == cold[:6]
    assert cached(again) == [whole_pages(prompt) for prompt in many[:6]]


def test_shards_of_one_rank_that_are_corrupt_on_disk(linked, daemons, many, cold):
    harmed = daemons[0]
    wait_saved(daemons)
    harmed.signal(signal.SIGKILL)
    slab = harmed.folder / "kv" / SLAB_NAME
    content = bytearray(slab.read_bytes())
    for place in range(1 << 20, len(content), 20_000):  # the index lies before
        content[place] ^= 0x40
    slab.write_bytes(content)
    harmed.start()
    find_again(linked, many[-1], cold[-1])
    for _ in range(3):  # a miss that is staged behind; a hit, unless it was corrupt; a hit
        answers = linked.ask(many[:6])
        assert tokens(answers) == cold[:6]
        wait_saved(daemons)
        linked.forget()
    assert cached(answers) == [whole_pages(prompt) for prompt in many[:6]]
    assert counters(harmed)["corrupt_blocks"] > 0


def test_a_daemon_of_one_rank_that_hangs_or_is_killed(linked, daemons, many, cold):
    first, second = daemons
    second.signal(signal.SIGSTOP)
    assert tokens(linked.ask(many[:4])) == cold[:4]
    second.signal(signal.SIGCONT)
    for after_s in (0.05, 0.2):  # among requests that load, wait and run
        find_again(linked, many[0], cold[0])
        timer = threading.Timer(after_s, first.signal, [signal.SIGKILL])
        timer.start()
        at_once = linked.ask_at_once(many[:8])
        assert [each.tokens for each in at_once] == cold[:8]
        timer.join()
        first.start()


def test_pages_of_old_weights_are_found_by_no_rank(
    linked, daemons, make_llama, tmp_path, many, cold
):
    """Comes last: an engine with new weights is not served any more."""
    find_again(linked, many[0], cold[0])
    wait_saved(daemons)
    linked.update_weights(make_llama(tmp_path / "other", seed=1))
    before = [counters(each)["stored_blocks"] for each in daemons]
    other = linked.ask(many[:4])
    assert cached(other) == [0] * 4
    assert tokens(other) != cold[:4]
    assert [counters(each)["stored_blocks"] for each in daemons] == before
